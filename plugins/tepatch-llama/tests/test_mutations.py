"""A test that can not fail proves nothing: what breaks a Llama in the field must turn the parity tests red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gamma
from transformers import LlamaModel

import tepatch
from tepatch.errors import PlanError
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

Make = Callable[..., Any]
Save = Callable[..., Path]

MHA = {"num_key_value_heads": 4}  # q, k and v have equal shapes: nothing but the numbers can tell them apart
SIZES = "sizes: [q, kv, kv]"
SWAPS = {
    "gate and up": ["mlp.fc1_weight: {concat: [mlp.up_proj.weight, mlp.gate_proj.weight]}"],
    **{
        name: [f"self_attn.qkv.weight: {{concat: [{', '.join(f'self_attn.{x}_proj.weight' for x in order)}], {SIZES}}}"]
        for name, order in (("q and k", "kqv"), ("k and v", "qvk"))
    },
    "the two norms": [
        "self_attn.qkv.layernorm_weight: post_attention_layernorm.weight",
        "mlp.layernorm_weight: input_layernorm.weight",
    ],
}
"""Rules with two sources of equal shape exchanged."""


def swapped(name: str, folder: Path) -> Path:
    """The plugin's mapping with these rules in the place of its own."""
    head = "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n  model.layers.{layer}:\n"
    path = folder / "mutant.yaml"
    path.write_text(head + "".join(f"    {rule}\n" for rule in SWAPS[name]))
    return path


def logits(*models: Any) -> list[torch.Tensor]:
    tokens = torch.randint(1, 128, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return [model(tokens).logits for model in models]


def relative_error(model: Any, stock: Any) -> float:
    ours, theirs = logits(model, stock)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_unmutated_model_agrees(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(**MHA)
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    assert_close(*logits(model, stock), terms=forward_terms(stock.config, 64))


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_of_equal_shapes_shows_in_the_logits(
    name: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(**MHA)
    folder = save_checkpoint(stock)
    model = tepatch.load("llama", folder, backend="reference", mapping=swapped(name, tmp_path))
    assert relative_error(model, stock) > 1e-2


def test_a_swap_of_unequal_shapes_does_not_even_load(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    with pytest.raises(PlanError, match="wrong shape"):
        tepatch.load("llama", folder, backend="reference", mapping=swapped("q and k", tmp_path))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 499000.0},
    ],
)
def test_another_rope_shows_in_the_logits(rope: dict[str, Any], tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    folder = save_checkpoint(stock)
    config = tepatch.hf.config.read_config(folder)
    config.rope_parameters = rope
    model = tepatch.load("llama", folder, backend="reference", config=config)
    assert relative_error(model, stock) > gamma(forward_terms(stock.config, 64)), "more than rounding may do"


def test_an_ignored_cache_shows_in_the_generated_tokens(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    tokens = torch.randint(1, 128, (1, 8), generator=torch.Generator().manual_seed(2))
    expected = stock.generate(tokens, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=16, do_sample=False), expected)
    layer = model.model.layers[1]
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, CACHE: None})
    assert not torch.equal(model.generate(tokens, max_new_tokens=16, do_sample=False), expected)
