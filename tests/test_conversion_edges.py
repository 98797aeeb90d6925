"""Conversions at the edges: edited files, odd names, other configs, values that do not fit, what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tepatch
from tepatch.checkpoint.manifest import read_manifest
from tepatch.errors import CheckpointError, LoadError, PlanError, SaveError
from tepatch.plugins import PluginHost, default_host
from tepatch.transfer.steps import same_bits

Make = Callable[..., Any]
Save = Callable[..., Path]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_are_read_in_the_dtype_that_their_file_has(
    dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(dtype=torch.bfloat16)
    te, back = tmp_path / "te", tmp_path / "back"
    tepatch.convert("llama", save_checkpoint(stock), te)
    cast = {name: tensor.to(dtype) for name, tensor in tensors_in(te).items()}
    save_file(cast, te / "tepatch.safetensors")
    tepatch.convert("llama", te, back)
    expected = {name: tensor.to(dtype).to(torch.bfloat16) for name, tensor in stock.state_dict().items()}
    found = tensors_in(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["with space", "no\u00a0break", "tab\there", "joined\u200d"])
def test_any_name_of_a_folder_makes_a_manifest_that_can_be_read(
    name: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    source = save_checkpoint(tiny_llama(), name=name)
    tepatch.convert("llama", source, tmp_path / "te")
    manifest = read_manifest(tmp_path / "te")
    assert manifest is not None
    assert manifest.source.isprintable()
    tepatch.load("llama", tmp_path / "te", backend="reference")


def test_the_config_that_is_passed_is_the_one_that_is_written(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = type(stock.config).from_pretrained(folder)
    config.rms_norm_eps = 0.5
    converted = tepatch.convert("llama", folder, tmp_path / "te", config=config)
    assert json.loads((tmp_path / "te" / "config.json").read_text())["rms_norm_eps"] == 0.5
    assert any("config that was passed" in note for note in converted.notes)
    (folder / "config.json").unlink()
    tepatch.convert("llama", folder, tmp_path / "alone", config=config)
    assert tepatch.load("llama", tmp_path / "alone", backend="reference").config.rms_norm_eps == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_that_becomes_infinite_in_any_dtype_is_named(
    dtype: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(dtype=torch.float64)
    with torch.no_grad():
        stock.model.layers[1].mlp.up_proj.weight[3, 3] = 1e300
    folder = save_checkpoint(stock)
    with pytest.raises(LoadError, match=rf"layers\.1\.mlp\.up_proj\.weight: values that {dtype} can not hold"):
        tepatch.load("llama", folder, dtype=dtype, backend="reference")
    with pytest.raises(LoadError, match=f"values that {dtype} can not hold"):
        tepatch.convert("llama", folder, tmp_path / "te", dtype=dtype)
    assert not (tmp_path / "te").exists()


def test_a_copy_of_a_tied_tensor_is_compared_by_its_bits(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        stock.model.embed_tokens.weight[5, :2] = torch.tensor([0.0, float("nan")])
    copy = stock.model.embed_tokens.weight.detach().clone()
    folder = save_checkpoint(stock, extra={"lm_head.weight": copy})
    tepatch.convert("llama", folder, tmp_path / "te")  # equal NaN are equal
    copy[5, 0] = -0.0
    folder = save_checkpoint(stock, extra={"lm_head.weight": copy}, name="negative")
    for act in (
        lambda: tepatch.load("llama", folder, backend="reference"),
        lambda: tepatch.convert("llama", folder, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
            act()


def test_bits_tell_what_equality_does_not() -> None:
    zero, nan = torch.zeros(1), torch.full((1,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.half())
    assert not same_bits(zero, torch.zeros(1, 1))
    assert same_bits(torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(1.5, dtype=torch.bfloat16))


def test_what_is_left_beside_the_original_is_told(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    (folder / "additional_chat_templates").mkdir()
    (folder / "big.json").write_bytes(b"")
    with (folder / "big.json").open("r+b") as stream:
        stream.truncate((1 << 28) + 1)
    converted = tepatch.convert("llama", folder, tmp_path / "te")
    note = next(note for note in converted.notes if note.startswith("left in"))
    assert "additional_chat_templates/" in note
    assert "big.json" in note
    saved = tepatch.save(tepatch.load("llama", folder, backend="reference"), tmp_path / "saved")
    assert "additional_chat_templates/" in str(saved)


def test_a_folder_with_two_checkpoints_is_refused(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    te = tmp_path / "te"
    tepatch.convert("llama", folder, te)
    model: Any = tepatch.load("llama", te, backend="reference")
    with pytest.raises(SaveError, match=r"tepatch\.json"):
        model.save_pretrained(te)
    assert not (te / "model.safetensors").exists()
    (te / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="move one of the two"):
        tepatch.load("llama", te, backend="reference")
    assert tepatch.load("llama", te / "tepatch.safetensors", backend="reference").tepatch.layout == "te"
    (te / "tepatch.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"remove tepatch\.json"):
        tepatch.load("llama", te, backend="reference")


def test_a_config_that_was_changed_after_the_conversion_is_to_blame(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    te = tmp_path / "te"
    tepatch.convert("llama", save_checkpoint(tiny_llama()), te)
    config = json.loads((te / "config.json").read_text())
    (te / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(PlanError, match=r"the config is not the one(.*\n)*.*restore config\.json"):
        tepatch.load("llama", te, backend="reference")


def test_where_a_model_came_from_does_not_depend_on_the_working_directory(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_llama())
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tepatch.load("llama", folder.name, backend="reference")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="checkpoint that is read"):
        tepatch.save(model, folder, overwrite=True)
    tepatch.save(model, "saved")
    assert (tmp_path / "elsewhere" / "saved" / "tokenizer.json").read_text() == "{}"


def test_a_model_without_values_is_not_saved(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference").to("meta")
    with pytest.raises(SaveError, match=r"model\.norm\.weight"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_patch_that_was_passed_by_hand_names_no_package(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    offered = default_host().patch("llama")
    assert default_host().package_of(offered).startswith("tepatch-llama ")
    own = tepatch.Patch(
        name="llama",
        model_types=("llama",),
        replace=dict(offered.replace),
        mapping=str(offered.mapping_path()),
    )
    assert default_host().package_of(own) == ""
    assert PluginHost([]).package_of(offered) == ""
    tepatch.convert(own, save_checkpoint(tiny_llama()), tmp_path / "te")
    manifest = read_manifest(tmp_path / "te")
    assert manifest is not None
    assert manifest.plugin == ""
