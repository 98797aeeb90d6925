"""Checkpoints and state dicts that NVIDIA's te_llama example has saved, in its own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file, save_file

import tepatch
from tepatch.errors import PlanError

Make = Callable[..., Any]
Save = Callable[..., Path]


def in_te_llama_names(stock: Any, *, extra_state: bool = True) -> dict[str, torch.Tensor]:
    """A stock model's tensors as ``te.TransformerLayer`` with separate q, k and v names them."""
    attention, out = "self_attention.", {}
    renames = {
        "input_layernorm.weight": f"{attention}layernorm_qkv.layer_norm_weight",
        "self_attn.q_proj.weight": f"{attention}layernorm_qkv.query_weight",
        "self_attn.k_proj.weight": f"{attention}layernorm_qkv.key_weight",
        "self_attn.v_proj.weight": f"{attention}layernorm_qkv.value_weight",
        "self_attn.o_proj.weight": f"{attention}proj.weight",
        "post_attention_layernorm.weight": "layernorm_mlp.layer_norm_weight",
        "mlp.down_proj.weight": "layernorm_mlp.fc2_weight",
    }
    for name, tensor in stock.state_dict().items():
        head, dot, tail = name.partition(".layers.")
        layer, _, leaf = tail.partition(".")
        if not dot:
            out[name] = tensor
        elif leaf in renames:
            out[f"{head}.layers.{layer}.{renames[leaf]}"] = tensor
    for layer in range(stock.config.num_hidden_layers):
        prefix, mlp = f"model.layers.{layer}.", stock.model.layers[layer].mlp
        fused = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        out[f"{prefix}layernorm_mlp.fc1_weight"] = fused
        for module in ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp") if extra_state else ():
            out[f"{prefix}{module}._extra_state"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    if stock.config.tie_word_embeddings:
        del out["lm_head.weight"]
    return out


def save_te_llama(stock: Any, folder: Path, *, kind: str = "safetensors", shards: int = 1, **options: Any) -> Path:
    folder.mkdir()
    stock.config.save_pretrained(folder)
    tensors = in_te_llama_names(stock, **options)
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for index, (name, tensor) in enumerate(tensors.items()):
        groups[index % shards][name] = tensor.contiguous()
    stem, weight_map = ("model" if kind == "safetensors" else "pytorch_model"), {}
    for index, group in enumerate(groups):
        file = f"{stem}-{index + 1:05}-of-{shards:05}.{kind}" if shards > 1 else f"{stem}.{kind}"
        weight_map |= dict.fromkeys(group, file)
        if kind == "safetensors":
            save_file(group, folder / file)
        else:
            torch.save(group, folder / file)
    if shards > 1:
        index_json = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index_json))
    return folder


def assert_same_tensors(folder: Path, stock: Any) -> None:
    tied = {"lm_head.weight"} if stock.config.tie_word_embeddings else set()
    expected = {name: tensor for name, tensor in stock.state_dict().items() if name not in tied}
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_the_example_loads_and_saves_as_an_ordinary_one(
    kind: str, shards: int, tied: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    stock = tiny_llama(tie_word_embeddings=tied)
    folder = save_te_llama(stock, tmp_path / "theirs", kind=kind, shards=shards)
    model = tepatch.load("llama", folder, backend="reference")
    assert model.tepatch.layout == "te_llama"
    assert "te_llama" in str(model.tepatch)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert_close(model(ids).logits, stock(ids).logits, terms=forward_terms(stock.config, 32))
    tepatch.save(model, tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", stock)


def test_it_converts_to_either_layout(tiny_llama: Make, tmp_path: Path) -> None:
    stock = tiny_llama()
    folder = save_te_llama(stock, tmp_path / "theirs", shards=2)
    converted = tepatch.convert("llama", folder, tmp_path / "hf", to="hf")
    assert converted.found == "te_llama"
    assert_same_tensors(tmp_path / "hf", stock)
    tepatch.convert("llama", folder, tmp_path / "te", to="te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back", to="hf")
    assert_same_tensors(tmp_path / "back", stock)


def test_what_is_missing_is_named_as_the_example_names_it(tiny_llama: Make, tmp_path: Path) -> None:
    stock = tiny_llama()
    folder = save_te_llama(stock, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attention.layernorm_qkv.key_weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attention\.layernorm_qkv\.key_weight"):
        tepatch.load("llama", folder, backend="reference")


def test_an_ordinary_checkpoint_that_lacks_a_tensor_is_not_taken_for_the_example(
    tiny_llama: Make, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(tiny_llama(), drop=("model.layers.1.self_attn.k_proj.weight",))
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight") as caught:
        tepatch.load("llama", folder, backend="reference")
    assert len(caught.value.problems) == 1


def test_biases_that_the_example_would_have_dropped_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    folder = save_te_llama(tiny_llama(attention_bias=True), tmp_path / "theirs")
    with pytest.raises(PlanError, match="the example has no biases"):
        tepatch.load("llama", folder, backend="reference")


@pytest.mark.parametrize("extra_state", [False, True])
def test_a_state_dict_of_the_example_loads(extra_state: bool, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock, other = tiny_llama(), tiny_llama(seed=1)
    model = tepatch.load("llama", save_checkpoint(other), backend="reference")
    result = model.load_state_dict(in_te_llama_names(stock, extra_state=extra_state))
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert_close(model(ids).logits, stock(ids).logits, terms=forward_terms(stock.config, 32))


def test_a_state_dict_of_the_example_that_lacks_a_tensor_is_an_error(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    tensors = in_te_llama_names(tiny_llama(seed=1))
    del tensors["model.layers.2.self_attention.layernorm_qkv.value_weight"]
    with pytest.raises(RuntimeError, match=r"layers\.2\.self_attention\.layernorm_qkv\.value_weight"):
        model.load_state_dict(tensors)
