"""Weights that are held in FP8 only: what they take, what they compute, and that nothing else of them is left.

A model whose weights are quantized once has to compute what one does that quantizes its bfloat16 weights at each call
by the same recipe: the same kernels, over the same numbers.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tepatch
from tepatch.errors import PlanError

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
RECIPES = ["fp8", "fp8-current", "fp8-block"]
EXACT = ["fp8-current", "fp8-block"]
"""Their scales are those of the tensor at hand; the first of delayed scaling is 1, whatever the weights."""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(path, max_shard_size="5MB")
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 1000, (2, 64), generator=torch.Generator().manual_seed(1)).cuda()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def held(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if type(p).dequantize is not torch.Tensor.dequantize}


@pytest.mark.parametrize("precision", RECIPES)
def test_the_weights_of_the_layers_are_quantized_and_the_rest_is_not(precision: str, folder: Path) -> None:
    model = tepatch.load("llama", folder, precision=precision, weights="quantized")
    assert len(held(model)) == 4 * SHAPE["num_hidden_layers"]
    assert not any(name in held(model) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert "weights are held quantized only" in str(model.tepatch)
    assert all(not p._data.dtype.is_floating_point for p in held(model).values() if hasattr(p, "_data"))


@pytest.mark.parametrize("precision", EXACT)
def test_logits_are_those_of_bf16_weights_under_the_same_recipe(
    precision: str, folder: Path, ids: torch.Tensor
) -> None:
    plain = tepatch.load("llama", folder, precision=precision)
    model = tepatch.load("llama", folder, precision=precision, weights="quantized")
    assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("precision", RECIPES)
def test_the_error_is_that_of_the_recipe(precision: str, folder: Path, ids: torch.Tensor) -> None:
    """Against float32, beside bfloat16 weights that are quantized at each call with a scale for each tensor."""
    exact = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    truth = logits(exact, ids)
    plain = tepatch.load("llama", folder, precision="fp8-current")
    model = tepatch.load("llama", folder, precision=precision, weights="quantized")
    logits(model, ids)  # delayed scaling has seen the activations from now on
    error = {name: (logits(m, ids) - truth).norm() / truth.norm() for name, m in (("ours", model), ("plain", plain))}
    print(f"{precision}: relative error {error['ours']:.4f}, of bf16 weights under fp8-current {error['plain']:.4f}")
    assert error["ours"] < 1.25 * error["plain"]


def test_delayed_scaling_has_a_scale_of_the_weight(folder: Path) -> None:
    """Transformer Engine itself starts with a scale of 1: weights of 0.02 would keep two bits."""
    model = tepatch.load("llama", folder, precision="fp8", weights="quantized")
    plain = dict(tepatch.load("llama", folder).named_parameters())
    for name, parameter in held(model).items():
        exact = plain[name].float()
        error = (parameter.dequantize().float() - exact).norm() / exact.norm()
        assert error < 0.03, name  # e4m3 has three bits behind the first: at most 1/16 for each number


@pytest.mark.parametrize("precision", RECIPES)
def test_memory_is_a_byte_for_each_number_while_loading_too(precision: str, tmp_path: Path) -> None:
    config = LlamaConfig(**{**SHAPE, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32})
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    tepatch.load("llama", tmp_path, precision=precision, weights="quantized")  # workspaces of libraries
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = tepatch.load("llama", tmp_path, precision=precision, weights="quantized")
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    numbers = sum(p.numel() for p in held(model).values())
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in held(model))
    largest = 2 * 2 * 11008 * 4096  # fc1, gate and up, in bfloat16
    print(
        f"{precision}: final {final / MIB:.0f} MiB for {numbers / MIB:.0f} Mi numbers, peak +{(peak - final) / MIB:.0f}"
    )
    assert final < 1.05 * numbers + others + 64 * MIB
    assert peak <= final + 2 * largest + 256 * MIB


def test_a_save_has_what_the_weights_dequantize_to(folder: Path, tmp_path: Path) -> None:
    model = tepatch.load("llama", folder, precision="fp8-current", weights="quantized")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    rows = held(model)["model.layers.1.self_attn.qkv.weight"].dequantize()
    assert torch.equal(again.model.layers[1].self_attn.q_proj.weight, rows[:512].cpu().to(again.dtype))


def test_initial_values_are_kept_for_master_weights(folder: Path, ids: torch.Tensor) -> None:
    plain = dict(tepatch.load("llama", folder).named_parameters())
    model = tepatch.load("llama", folder, precision="fp8-current", weights="quantized", keep_initial=True).train()
    for name, parameter in held(model).items():
        assert torch.equal(parameter.get_high_precision_init_val(), plain[name].cpu()), name
        parameter.clear_high_precision_init_val()
        assert parameter.get_high_precision_init_val() is None
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_gradients_are_those_of_bf16_weights_under_the_same_recipe(folder: Path, ids: torch.Tensor) -> None:
    found = []
    for more in ({}, {"weights": "quantized", "keep_initial": True}):
        model = tepatch.load("llama", folder, precision="fp8-current", **more).train()
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name].float(), expected.float(), rtol=1e-2, atol=1e-6), name


def test_some_layers_may_stay_in_bf16(folder: Path, ids: torch.Tensor) -> None:
    precision = {"default": "fp8-current", 0: "bf16"}
    model = tepatch.load("llama", folder, precision=precision, weights="quantized")
    assert len(held(model)) == 8
    assert not any(name.startswith("model.layers.0.") for name in held(model))
    assert torch.equal(logits(model, ids), logits(tepatch.load("llama", folder, precision=precision), ids))


def test_another_precision_is_refused_afterwards(folder: Path, ids: torch.Tensor) -> None:
    model = tepatch.load("llama", folder, precision="fp8-current", weights="quantized")
    expected = logits(model, ids)
    for other in ("bf16", "fp8-block", None):
        with pytest.raises(PlanError, match="hold their weights quantized"):
            tepatch.set_precision(model, other)
    tepatch.set_precision(model, "fp8-current")
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy])
def test_a_copy_computes_the_same(duplicate: Callable[[Any], Any], folder: Path, ids: torch.Tensor) -> None:
    model = tepatch.load("llama", folder, precision="fp8-current", weights="quantized")
    expected = logits(model, ids)
    assert torch.equal(logits(duplicate(model), ids), expected)


def test_it_generates(folder: Path, ids: torch.Tensor) -> None:
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = tepatch.load("llama", folder, precision="fp8-current").generate(ids, **given)
    model = tepatch.load("llama", folder, precision="fp8-current", weights="quantized")
    assert torch.equal(model.generate(ids, **given), plain)


def test_weights_can_not_be_quantized_without_a_precision(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"no weight can be held quantized[\s\S]*precision='fp8-current'"):
        tepatch.load("llama", folder, weights="quantized")
    with pytest.raises(PlanError, match=r"keep_initial"):
        tepatch.load("llama", folder, precision="fp8-current", keep_initial=True)
    with pytest.raises(PlanError, match=r"plain or quantized"):
        tepatch.load("llama", folder, weights="fp8")  # type: ignore[arg-type]


def test_quantized_weights_are_on_gpus(folder: Path) -> None:
    places: dict[str, int | str] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    with pytest.raises(PlanError, match=r"weights to be held quantized are not placed on a GPU"):
        tepatch.load(
            "llama",
            folder,
            precision="fp8-current",
            weights="quantized",
            device_map={**places, "model.layers": "cpu"},
        )


def test_quantized_weights_are_whole(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"can not be had together with parallelize"):
        tepatch.load("llama", folder, precision="fp8-current", weights="quantized", parallelize=lambda model: None)
