"""Files beside the weights: those that make another model of a folder, and those that travel with the weights.

The yardstick is what transformers makes of the same folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tepatch
from tepatch.checkpoint.beside import MAX_CONFIG_BYTES, stated_weights
from tepatch.cli import app
from tepatch.errors import CheckpointError
from tepatch.hf.texts import MAX_BYTES, read_config_text
from tepatch.verify import judge, verify

peft = pytest.importorskip("peft", reason="needs peft")

Make = Callable[..., Any]
Save = Callable[..., Path]

IDS = torch.randint(1, 128, (2, 11), generator=torch.Generator().manual_seed(0))
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PIECE = "shard-00000-model-00001-of-00001.safetensors"
COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda folder, out: tepatch.load("auto", folder),
    "plan": lambda folder, out: tepatch.plan("llama", folder),
    "convert": lambda folder, out: tepatch.convert("llama", folder, out / "te"),
    "certify": lambda folder, out: tepatch.certify("llama", folder, folder),
    "verify": lambda folder, out: verify("llama", folder, token_ids=IDS),
    "save": lambda folder, out: tepatch.save(tepatch.load("llama", folder), out / "saved"),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(IDS).logits
    return out


def put_adapter(base: Path, folder: Path, *, safe: bool = True) -> Any:
    """Writes an adapter of the model in ``base`` to ``folder``, and returns what transformers makes of that."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    if not safe:  # which transformers finds and does not read; PEFT does
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    return stock


def taken(error: CheckpointError) -> Any:
    """The model that the lines of an error make."""
    made: dict[str, Any] = {"tepatch": tepatch, "peft": peft}
    for line in error.problems[0].details[:2]:
        exec(line, made)
    return made["model"]


def assert_same(found: torch.Tensor, expected: torch.Tensor, model: Any) -> None:
    assert_close(found, expected, terms=forward_terms(model.config, keys=IDS.shape[1]), name="logits")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_an_adapter_beside_the_model_is_refused_and_the_advice_applies_it(
    safe: bool, shards: int, tiny_llama: Make, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=shards)
    alone = logits(AutoModelForCausalLM.from_pretrained(folder))
    stock = put_adapter(folder, folder, safe=safe)
    expected = logits(stock)
    assert (expected - alone).abs().max() > 0.05 * alone.abs().max(), "transformers applies it"
    with pytest.raises(CheckpointError, match="an adapter is in the folder") as caught:
        tepatch.load("llama", folder)
    assert_same(logits(taken(caught.value)), expected, stock)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("beside", ["an adapter", "an adapter's config", "pieces"])
def test_all_commands_refuse_what_makes_another_model_and_leave_nothing(
    command: str, beside: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    if beside == "pieces":
        save_file({"w": torch.zeros(1)}, folder / PIECE)
    else:
        put_adapter(folder, folder)
    if beside == "an adapter's config":  # transformers then looks for its weights, and fails
        (folder / "adapter_model.safetensors").unlink()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="transformers would"):
        COMMANDS[command](folder, out)
    assert os.listdir(out) == []


def test_the_command_line_refuses_it_too(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    put_adapter(folder, folder)
    result = CliRunner().invoke(app, ["plan", "llama", str(folder)])
    assert result.exit_code == 1
    assert "an adapter is in the folder of the model" in result.stderr


def test_where_a_folder_is_needed_the_adapter_is_moved(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    put_adapter(folder, folder)
    with pytest.raises(CheckpointError, match=r"move adapter_config\.json and adapter_model\.safetensors to a folder"):
        verify("llama", folder, token_ids=IDS)
    (tmp_path / "adapter").mkdir()
    for name in ADAPTER:
        (folder / name).rename(tmp_path / "adapter" / name)
    assert judge(verify("llama", folder, token_ids=IDS)).passed


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_folder_of_an_adapter_is_told_as_that_and_the_advice_loads_both(
    named: str, has_config: bool, safe: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder, adapter = save_checkpoint(tiny_llama()), tmp_path / "adapter"
    stock = put_adapter(folder, adapter, safe=safe)
    if has_config:
        (adapter / "config.json").write_bytes((folder / "config.json").read_bytes())
    location = adapter if named == "folder" else adapter / f"adapter_model.{'safetensors' if safe else 'bin'}"
    with pytest.raises(CheckpointError, match=r"of an adapter, and not of a model") as caught:
        tepatch.load("llama", location)
    assert_same(logits(taken(caught.value)), logits(stock), stock)


@pytest.mark.parametrize("text", ["{}", "no json", '{"base_model_name_or_path": 3}'])
def test_an_adapter_that_says_no_base_is_told_as_that(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not say what model the adapter is for"):
        tepatch.load("llama", tmp_path)


def test_pieces_of_a_distributed_save_are_told_as_that(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    save_file({"w": torch.zeros(1)}, folder / PIECE)
    with pytest.raises(CheckpointError, match=rf"name the file, if it is meant: {folder / 'model.safetensors'}; else"):
        tepatch.load("llama", folder)
    tepatch.load("llama", folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pieces of a distributed save, .*\n.*\n.*write it whole"):
        tepatch.load("llama", folder)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_file_that_the_config_names_is_the_one(
    is_sharded: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(seed=0))
    other = load_file(save_checkpoint(tiny_llama(seed=1), name="other") / "model.safetensors")
    save_file(other, folder / "mine.safetensors", metadata={"format": "pt"})
    stated = "mine.safetensors.index.json" if is_sharded else "mine.safetensors"
    if is_sharded:
        (folder / stated).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, "mine.safetensors")})
        )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": stated}))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    model = tepatch.load("llama", folder)
    assert_same(logits(model), logits(stock), stock)
    assert torch.equal(model.state_dict()["lm_head.weight"], other["lm_head.weight"])
    tepatch.save(model, tmp_path / "saved")
    tepatch.convert("llama", folder, tmp_path / "te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    for name in ("saved", "back"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again), logits(stock))
    with pytest.raises(CheckpointError, match=r"variant='fp16' has no meaning: config\.json names the file"):
        tepatch.load("llama", folder, variant="fp16")


@pytest.mark.parametrize("stated", ["model.bin", 3, "weights", "../model.safetensors"])
def test_a_config_that_names_no_file_of_weights_is_refused(
    stated: object, tiny_llama: Make, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(tiny_llama())
    save_file({"w": torch.zeros(1)}, folder.parent / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": stated}))
    with pytest.raises(CheckpointError, match=r"names no file that can be read|leads out of the folder"):
        tepatch.load("llama", folder)


def test_no_part_of_an_adapter_travels_and_what_comes_back_loads(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    stock = AutoModelForCausalLM.from_pretrained(folder)
    put_adapter(folder, folder)
    file = folder / "model.safetensors"
    converted = tepatch.convert("llama", file, tmp_path / "te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    saved = tepatch.save(tepatch.load("llama", file), tmp_path / "saved")
    for name in ("te", "back", "saved"):
        assert not ADAPTER & set(os.listdir(tmp_path / name))
    for notes in (converted.notes, saved.notes):
        assert any("adapter_config.json" in note for note in notes)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(stock))


def test_every_file_travels_whole_or_is_told(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)
    read = set(os.listdir(folder))
    names = ["README.md", "LICENSE", "tokenizer.json", "modules.json", "params.json", "consolidated.00.pth", ".hidden"]
    names += ["model.onnx", "model.onnx_data", "openvino_model.xml", "openvino_model.bin", "optimizer.pt", "odd\tname"]
    names += ["trainer_state.json", "pytorch_model.bin", "model.fp16.safetensors", "adapter_model.safetensors"]
    for name in names:
        (folder / name).write_bytes(b"[]")
    for name in ("1_Pooling", "onnx", ".cache"):
        (folder / name).mkdir()
    converted = tepatch.convert("llama", folder, tmp_path / "te")
    saved = tepatch.save(tepatch.load("llama", folder), tmp_path / "saved")
    there = set(os.listdir(folder)) - read
    weights = {"pytorch_model.bin", "model.fp16.safetensors", "adapter_model.safetensors", "openvino_model.bin"}
    weights |= {"consolidated.00.pth"}  # told when the model was loaded
    for made, notes, known in ((tmp_path / "te", converted.notes, set()), (tmp_path / "saved", saved.notes, weights)):
        text = "\n".join(notes)
        told = {name for name in there if name in text or ascii(name) in text}
        copied = {name for name in there if (made / name).exists()}
        assert copied | told | known == there
    assert {"README.md", "LICENSE", "tokenizer.json"} <= set(os.listdir(tmp_path / "te"))
    assert not {"modules.json", "params.json", "model.onnx", "openvino_model.xml"} & set(os.listdir(tmp_path / "te"))


def test_a_config_beyond_any_size_is_not_read(tmp_path: Path) -> None:
    """Nor is it passed over: what reads the config itself refuses it."""
    text = json.dumps({"transformers_weights": "other.safetensors"})
    (tmp_path / "config.json").write_text(text)
    assert stated_weights(tmp_path) == "other.safetensors"
    (tmp_path / "config.json").write_text(text + " " * MAX_CONFIG_BYTES)
    assert stated_weights(tmp_path) == ""
    assert MAX_BYTES <= MAX_CONFIG_BYTES
    with pytest.raises(CheckpointError, match="is larger than"):
        read_config_text(tmp_path, "config.json")
