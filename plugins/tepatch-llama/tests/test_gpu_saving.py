"""Saving, resuming and state dicts of a model with Transformer Engine's own modules in it, on a GPU."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tepatch

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]
Save = Callable[..., Path]
CUDA = torch.device("cuda")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
"""Large enough for what Transformer Engine's FP8 needs: multiples of 16, heads of 64."""


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def pair(tiny_llama: Make, save_checkpoint: Save) -> tuple[Any, Any]:
    """A stock model in bfloat16 and the patched one with the same weights."""
    stock = tiny_llama(dtype=torch.bfloat16, **SIZES)
    return stock, tepatch.load("llama", save_checkpoint(stock, shards=3), backend="te")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name].cpu(), tensor.cpu())]
    assert different == []


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 512, (2, 64), generator=generator).to(CUDA)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fp8_step(model: Any) -> None:
    """A forward and backward pass with FP8 matrix products, which leaves state in the modules."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    ids = torch.arange(1, 129, device=CUDA)[None]
    with te.autocast(enabled=True, recipe=DelayedScaling()):
        loss = model(ids, labels=ids).loss
    loss.backward()
    model.zero_grad()


@pytest.mark.parametrize("how", ["tepatch.save", "save_pretrained"])
def test_a_model_comes_back_bit_for_bit(how: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    stock, model = pair
    out = tmp_path / "out"
    if how == "tepatch.save":
        tepatch.save(model, out, max_shard_size="300KB")
    else:
        model.save_pretrained(out)
    assert_equal(tensors_in(out), dict(stock.state_dict()))
    again = type(stock).from_pretrained(out, dtype="auto")
    assert_equal(dict(again.state_dict()), dict(stock.state_dict()))


def test_state_of_fp8_recipes_never_leaves(pair: tuple[Any, Any], tmp_path: Path) -> None:
    stock, model = pair
    fp8_step(model)
    own = {key for module in model.modules() for key in module._parameters}
    assert "layernorm_weight" in own, "these are Transformer Engine's modules"
    layer = model.model.layers[0]
    assert any(key.endswith("_extra_state") for key in layer.state_dict()), "there is state to leave out"
    assert not any("_extra_state" in key for key in model.state_dict())
    for how in (tepatch.save, lambda model, folder: model.save_pretrained(folder)):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        how(model, folder)
        assert_equal(tensors_in(folder), dict(stock.state_dict()))
    result = model.load_state_dict(stock.state_dict())
    assert result.missing_keys == []
    assert result.unexpected_keys == []


def test_state_dicts_share_memory_with_the_parameters(pair: tuple[Any, Any]) -> None:
    stock, model = pair
    before = torch.cuda.memory_allocated()
    taken = model.state_dict()
    assert torch.cuda.memory_allocated() == before
    assert_equal(taken, dict(stock.state_dict()))
    other = {name: torch.randn_like(tensor) for name, tensor in stock.state_dict().items()}
    model.load_state_dict(other)
    assert_equal(taken, other)


def test_training_resumed_from_a_saved_state_dict_goes_on_as_it_would_have(pair: tuple[Any, Any]) -> None:
    _, model = pair
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        step(model, optimizer, seed)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, seed)
    uninterrupted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(not torch.equal(uninterrupted[name], weights[name]) for name in weights if name.endswith("proj.weight"))

    resumed = tepatch.build("llama", model.config, backend="te")
    resumed.load_state_dict(weights)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    optimizer.load_state_dict(moments)
    for seed in range(3, 6):
        step(resumed, optimizer, seed)
    assert_equal(resumed.state_dict(), uninterrupted)


def test_quantized_parameters_are_dequantized_on_the_way_and_it_is_said(pair: tuple[Any, Any], tmp_path: Path) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    stock, model = pair
    layer = model.model.layers[1].self_attn
    with torch.no_grad(), te.quantized_model_init(recipe=Float8CurrentScaling()):
        quantized = te.Linear(layer.proj.in_features, layer.proj.out_features, bias=False, params_dtype=torch.bfloat16)
        quantized.weight.copy_(layer.proj.weight)
    layer.proj = quantized
    assert type(quantized.weight) not in (torch.Tensor, torch.nn.Parameter)
    saved = tepatch.save(model, tmp_path / "saved")
    assert "dequantized: 1 x" in str(saved)
    model.save_pretrained(tmp_path / "theirs")
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = dict(stock.state_dict())
    exact = expected.pop(name)
    for folder in (tmp_path / "saved", tmp_path / "theirs"):
        found = tensors_in(folder)
        rounded = found.pop(name)
        assert_equal(found, expected)
        assert torch.equal(rounded, quantized.weight.dequantize().cpu())
        error = float((rounded.float() - exact.float()).norm() / exact.float().norm())
        assert 0 < error < 2**-4  # E4M3 has three bits of mantissa: values are off by at most 1/16


def test_a_converted_checkpoint_loads_at_once(pair: tuple[Any, Any], tmp_path: Path) -> None:
    stock, model = pair
    tepatch.convert("llama", model.tepatch.plan.location, tmp_path / "te", workers=2)
    again = tepatch.load("llama", tmp_path / "te", backend="te")
    assert_equal(dict(again.named_parameters()), dict(model.named_parameters()))
    assert_equal(again.state_dict(), dict(stock.state_dict()))
