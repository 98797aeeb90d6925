"""Checkpoints of models that were saved with wrappers around their modules: read, and saved as the stock model's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import tepatch
from tepatch.certification.certificate import write_certificate
from tepatch.errors import CheckpointError, PlanError

Make = Callable[..., Any]
Save = Callable[..., Path]

PREFIXES = [
    *("_orig_mod.", "module.", "base_model.model.", "_forward_module.", "_module.", "student.", "a.b."),
    *("module._orig_mod.", "_orig_mod.module.base_model.model.", "base_model.model.base_model.model."),
]
INFIXES = {
    "each layer": (r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module."),
    "each layer twice": (r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "some layers": (r"(layers\.1\.)", r"\1_orig_mod."),
    "each mlp": (r"(mlp\.)", r"\1_fpw_module."),
    "the base": (r"^model\.", "model.module."),
    "all at once": (r"^model\.(layers\.\d+\.)?", r"module._orig_mod.model._fsdp_wrapped_module.\1module."),
    "leaves": (r"(\w+)\.weight", r"\1._orig_mod.weight"),
}


def renamed(tensors: dict[str, torch.Tensor], change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {change(name): tensor.clone() for name, tensor in tensors.items()}


def assert_stock_everywhere(folder: Path, tensors: dict[str, torch.Tensor], out: Path, said: str) -> None:
    """That ``folder`` is read as ``tensors``, and saved and converted back as a checkpoint that transformers loads."""
    model: Any = tepatch.load("auto", folder, backend="reference")
    assert tepatch.plan("auto", folder).copies == model.tepatch.plan.copies
    assert [note for note in model.tepatch.plan.notes if said in note and "not saved again" in note]
    converted = tepatch.convert("auto", folder, out / "te")
    assert [note for note in converted.notes if said in note]
    tepatch.convert("auto", out / "te", out / "back")
    tepatch.save(model, out / "saved")
    model.save_pretrained(out / "pretrained")
    for name in ("back", "saved", "pretrained"):
        found = load_file(out / name / "model.safetensors")
        assert found.keys() == tensors.keys(), name
        assert all(torch.equal(found[each], tensor) for each, tensor in tensors.items())
        stock = type(model).from_pretrained(out / name).state_dict()
        assert all(torch.equal(stock[each], tensor) for each, tensor in tensors.items())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_left_out_and_not_saved_again(
    prefix: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    tensors = dict(stock.state_dict())
    folder = save_checkpoint(stock, drop=tuple(tensors), extra=renamed(tensors, lambda name: prefix + name))
    assert_stock_everywhere(folder, tensors, tmp_path, prefix.split(".")[0])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("where", INFIXES)
def test_wrappers_inside_names_are_left_out(
    where: str, kind: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    pattern, replacement = INFIXES[where]
    stock = tiny_llama()
    tensors = dict(stock.state_dict())
    wrapped = renamed(tensors, lambda name: re.sub(pattern, replacement, name))
    assert wrapped.keys() != tensors.keys()
    folder = save_checkpoint(stock, drop=tuple(tensors), extra=wrapped, shards=2, kind=kind)
    assert_stock_everywhere(folder, tensors, tmp_path, "wrappers")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "student."])
def test_the_names_of_an_encoder_are_no_other_case(prefix: str, save_checkpoint: Save, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    stock = BertForMaskedLM(BertConfig(**sizes, vocab_size=64, tie_word_embeddings=False))
    stock.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    wrapped = renamed(tensors, lambda name: prefix + name)
    folder = save_checkpoint(stock, drop=tuple(stock.state_dict()), extra=wrapped)
    assert_stock_everywhere(folder, tensors, tmp_path, prefix[:-1])


def test_a_prefix_that_transformers_understands_is_kept(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    tensors = dict(stock.state_dict())
    wrapped = renamed(tensors, lambda name: "model." + name)
    folder = save_checkpoint(stock, drop=tuple(tensors), extra=wrapped)
    tepatch.save(tepatch.load("llama", folder), tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == wrapped.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("prefix", ["module.", "student."])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_certificate_of_wrapped_names_can_be_checked(
    prefix: str, kind: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    tensors = dict(stock.state_dict())
    wrapped = renamed(tensors, lambda name: prefix + name)
    folder = save_checkpoint(stock, drop=tuple(tensors), extra=wrapped, kind=kind)
    tepatch.convert("llama", folder, tmp_path / "te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    for source, destination in ((folder, "te"), (folder, "back"), (tmp_path / "back", "checkpoint")):
        made = tepatch.certify("llama", source, tmp_path / destination)
        assert made.passed
        write_certificate(made, tmp_path / destination)
        assert tepatch.check_certificate(tmp_path / destination, source=source).problems == ()
    file = next(folder.glob("*.safetensors" if kind == "safetensors" else "*.bin"))
    wrapped[f"{prefix}lm_head.weight"][0, 0] += 1
    if kind == "bin":
        torch.save(wrapped, file)
    else:
        save_file(dict(wrapped), file)
    problems = tepatch.check_certificate(folder).problems
    told = "\n".join(map(str, problems))
    assert f"{prefix}lm_head.weight: is not what was certified: its values have changed" in told
    assert "is no longer in this file" not in told


def test_names_that_tepatch_has_written_are_taken_as_they_are(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    tepatch.convert("llama", save_checkpoint(tiny_llama()), tmp_path / "te")
    file = tmp_path / "te" / "tepatch.safetensors"
    save_file(renamed(load_file(file), lambda name: f"module.{name}"), file)
    with pytest.raises(PlanError, match=r"module\.lm_head\.weight"):
        tepatch.load("llama", tmp_path / "te")


def test_two_tensors_of_one_name_are_named(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama(), extra={"_orig_mod.lm_head.weight": torch.zeros(128, 64)})
    with pytest.raises(CheckpointError, match=r"1 tensor twice, .*\n  _orig_mod\.lm_head\.weight and lm_head\.weight"):
        tepatch.load("llama", folder)


def test_layers_with_adapters_around_them_are_told_as_that_and_the_advice_works(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    save_file({name: each.contiguous() for name, each in adapted.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"3 tensors of layers that adapters of PEFT are around"):
        tepatch.load("llama", folder)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    loaded = tepatch.load("llama", tmp_path / "merged").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())
