"""State dicts of a patched model have Hugging Face's names, both ways, and share the parameters' memory."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tepatch
from tepatch.errors import PlanError
from tepatch.hf.state import patched_names
from tepatch.planning.groups import names_in

Make = Callable[..., Any]
Save = Callable[..., Path]

HEAD = "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n"
LAYOUTS = {
    "fused": "",
    "interleaved": """
  model.layers.{layer}:
    self_attn.qkv.weight:
      interleave: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      over: num_key_value_heads
      sizes: [num_attention_heads // num_key_value_heads * d, d, d]
    mlp.fc1_weight: {interleave: [mlp.gate_proj.weight, mlp.up_proj.weight], block: 1}
""",
    "transposed": """
  model.layers.{layer}:
    self_attn.proj.weight: {of: self_attn.o_proj.weight, transpose: true}
""",
    "scaled": """
  model.norm.weight: {of: model.norm.weight, offset: 1}
  model.layers.{layer}:
    self_attn.qkv.layernorm_weight: {of: input_layernorm.weight, scale: 2, offset: 1}
""",
    "crossed": """
  model.embed_tokens.weight: lm_head.weight
  lm_head.weight: model.embed_tokens.weight
""",
}
"""Mappings under which a model computes nonsense, and in which every kind of view is met. All are exact."""


@pytest.fixture
def load(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Makes a stock model and the patched model that holds the same weights: ``load(layout="fused", **config)``."""

    def make(layout: str = "fused", dtype: torch.dtype | None = None, **config: Any) -> tuple[Any, Any]:
        stock = tiny_llama(**config)
        mapping = tmp_path / f"{layout}.yaml"
        mapping.write_text(HEAD + LAYOUTS[layout] if LAYOUTS[layout] else HEAD.strip() + " {}\n")
        folder = save_checkpoint(stock)
        return stock, tepatch.load("llama", folder, backend="reference", mapping=mapping, dtype=dtype or "auto")

    return make


Load = Callable[..., tuple[Any, Any]]


def other(state_dict: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """The same names and shapes with other values, which are no multiples of the old ones."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in state_dict.items()}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def own_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def misplaced(model: nn.Module, found: dict[str, Any]) -> list[str]:
    """Names in ``found`` whose tensor is not in the memory of a parameter."""
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters()]
    return [name for name, t in found.items() if not any(start <= t.data_ptr() < end for start, end in spans)]


# -- giving --


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_is_that_of_the_stock_model(layout: str, dtype: torch.dtype, load: Load) -> None:
    stock, model = load(layout, dtype=dtype)
    assert_equal(model.state_dict(), {name: tensor.to(dtype) for name, tensor in stock.state_dict().items()})


def test_values_are_restored(load: Load) -> None:
    stock, model = load("scaled", dtype=torch.float64)  # holds 2 x + 1 of a float32 x without rounding
    assert_equal(model.state_dict(), {name: tensor.double() for name, tensor in stock.state_dict().items()})


def test_tensors_share_memory_with_the_parameters_and_storages_with_nobody(load: Load) -> None:
    _, model = load(attention_bias=True, mlp_bias=True)
    found = model.state_dict()
    assert not misplaced(model, found)
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(storages) == len(found)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    assert not any(tensor.requires_grad for tensor in found.values())
    before = model.model.layers[1].mlp.fc1_weight.detach().clone()
    found["model.layers.1.mlp.up_proj.weight"].add_(1)
    after = model.model.layers[1].mlp.fc1_weight.detach()
    assert torch.equal(after[:96], before[:96])
    assert torch.equal(after[96:], before[96:] + 1)


def test_strided_views_share_memory_too_and_what_is_no_view_is_a_copy(load: Load) -> None:
    _, model = load("interleaved")
    found = model.state_dict()
    assert {name.split(".")[-2] for name in misplaced(model, found)} == {"q_proj", "k_proj", "v_proj"}
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert up.stride() == (128, 1)
    up.zero_()
    assert not model.model.layers[0].mlp.fc1_weight[1::2].any()
    assert model.model.layers[0].mlp.fc1_weight[0::2].all()
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(found)
    _, model = load("transposed")
    assert model.state_dict()["model.layers.0.self_attn.o_proj.weight"].stride() == (1, 64)
    assert not misplaced(model, model.state_dict())


def test_a_tensor_outlives_its_model(load: Load) -> None:
    stock, model = load()
    found = model.state_dict()
    del model
    gc.collect()
    junk = [torch.full((192, 64), 7.0) for _ in range(64)]  # what would be written over memory that was given back
    assert_equal(found, stock.state_dict())
    assert junk


def test_the_order_is_that_of_the_parameters(load: Load) -> None:
    _, model = load()
    names = list(model.state_dict())
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [name.split(".")[-2] for name in names if ".layers.1." in name] == [
        *("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("post_attention_layernorm", "gate_proj", "up_proj", "down_proj"),
    ]


def test_a_prefix_and_a_destination_are_kept(load: Load) -> None:
    stock, model = load()
    destination: dict[str, Any] = {"model.norm.weight": torch.zeros(1)}
    assert model.state_dict(destination=destination, prefix="module.") is destination
    assert destination.pop("model.norm.weight").shape == (1,)
    assert_equal(destination, {f"module.{name}": tensor for name, tensor in stock.state_dict().items()})
    wrapper = nn.ModuleDict({"a": model, "b": nn.Linear(2, 2)})
    assert wrapper.state_dict().keys() == {*(f"a.{name}" for name in stock.state_dict()), "b.weight", "b.bias"}
    assert wrapper.state_dict()._metadata.keys() >= {"", "a", "a.model", "b"}


def test_tied_names_are_given_as_torch_gives_them(load: Load) -> None:
    stock, model = load(tie_word_embeddings=True)
    found = model.state_dict()
    assert_equal(found, stock.state_dict())
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_with_keep_vars_gradients_flow_through_the_views(load: Load) -> None:
    for layout in ("fused", "interleaved", "scaled"):
        stock, model = load(layout)
        kept = model.state_dict(keep_vars=True)
        assert kept.keys() == stock.state_dict().keys()
        assert kept["lm_head.weight"] is model.lm_head.weight
        assert not misplaced(model, {"up": kept["model.layers.0.mlp.up_proj.weight"]})
        norm, up, q = (
            kept[f"model.layers.0.{n}.weight"] for n in ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")
        )
        (norm.sum() * 3 + up.sum() * 5 + q.sum() * 7).backward()
        layer = model.model.layers[0]
        gradient = layer.mlp.fc1_weight.grad
        assert gradient.sum() == 5 * up.numel()
        assert set(gradient.unique().tolist()) == {0.0, 5.0}
        assert layer.self_attn.qkv.weight.grad.sum() == 7 * q.numel()
        assert set(layer.self_attn.qkv.layernorm_weight.grad.tolist()) == {1.5 if layout == "scaled" else 3.0}


def test_parameters_have_their_own_names_on_demand_in_this_context_only(load: Load) -> None:
    import threading

    stock, model = load()
    elsewhere: list[set[str]] = []
    with patched_names():
        assert list(model.state_dict()) == own_names(model)
        thread = threading.Thread(target=lambda: elsewhere.append(set(model.state_dict())))
        thread.start()
        thread.join()
    assert elsewhere == [set(stock.state_dict())]
    assert set(model.state_dict()) == set(stock.state_dict())


def test_what_the_plan_can_not_translate_keeps_its_own_name(load: Load) -> None:
    stock, model = load()
    model.add_module("value_head", nn.Linear(64, 1))
    model.model.layers[1].mlp.fc1_weight = nn.Parameter(torch.zeros(10, 64))
    model.model.layers[2].mlp = nn.Identity()
    found = set(model.state_dict())
    gone = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (1, 2) for part in ("gate", "up")}
    gone |= {"model.layers.2.mlp.down_proj.weight", "model.layers.2.post_attention_layernorm.weight"}
    added = {"value_head.weight", "value_head.bias", "model.layers.1.mlp.fc1_weight"}
    assert found == set(stock.state_dict()) - gone | added


def test_two_tensors_of_one_name_are_an_error(load: Load) -> None:
    _, model = load()
    model.model.layers[0].mlp.up_proj = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        model.state_dict()


def test_a_resized_vocabulary_keeps_its_names(load: Load) -> None:
    stock, model = load(tie_word_embeddings=True)
    model.resize_token_embeddings(150)
    found = model.state_dict()
    assert found.keys() == stock.state_dict().keys()
    assert found["lm_head.weight"].shape == found["model.embed_tokens.weight"].shape == (150, 64)


def test_a_meta_model_gives_meta_tensors_of_the_checkpoints_shapes(load: Load) -> None:
    for layout in ("fused", "interleaved", "scaled"):
        stock, model = load(layout, dtype=torch.float16)
        found = model.to("meta").state_dict()
        assert {n: (t.shape, t.is_meta) for n, t in found.items()} == {
            n: (t.shape, True) for n, t in stock.state_dict().items()
        }


def test_a_parameter_that_is_not_contiguous_is_given_in_order(load: Load) -> None:
    stock, model = load()
    fc1 = model.model.layers[0].mlp.fc1_weight
    fc1.data = fc1.data.t().contiguous().t()
    assert not fc1.is_contiguous()
    assert_equal(model.state_dict(), stock.state_dict())
    new = other(stock.state_dict())
    model.load_state_dict(new)
    assert_equal(model.state_dict(), new)


class Halved(torch.Tensor):
    """A stand-in for Transformer Engine's quantized weights: holds a half, and says what it stands for."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Halved:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=False)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def dequantize(self) -> torch.Tensor:
        return self.held * 2

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].held.copy_(args[1].dequantize() / 2 if isinstance(args[1], cls) else args[1] / 2)
            return args[0]
        raise NotImplementedError(func)


def test_a_quantized_parameter_is_dequantized_and_filled_whole(load: Load) -> None:
    stock, model = load()
    mlp = model.model.layers[0].mlp
    mlp.fc1_weight = nn.Parameter(Halved(mlp.fc1_weight.detach() / 2), requires_grad=False)
    assert_equal(model.state_dict(), stock.state_dict())
    up = {"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), 6.0)}
    model.load_state_dict(up, strict=False)
    assert isinstance(mlp.fc1_weight, Halved)
    assert torch.equal(mlp.fc1_weight.held[96:], torch.full((96, 64), 3.0))
    expected = stock.state_dict() | up
    assert_equal(model.state_dict(), expected)


def test_a_sharded_parameter_keeps_its_own_name(load: Load) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        stock, model = load()
        mlp = model.model.layers[0].mlp
        mesh = DeviceMesh("cpu", [0])
        mlp.fc1_weight = nn.Parameter(DTensor.from_local(mlp.fc1_weight.detach(), mesh, [Replicate()]))
        parts = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")}
        assert set(model.state_dict()) == set(stock.state_dict()) - parts | {"model.layers.0.mlp.fc1_weight"}
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.fc1_weight is a DTensor.*own name"):
            model.load_state_dict(stock.state_dict())
        model.load_state_dict(model.state_dict())
        with pytest.raises(PlanError, match=r"found:    DTensor \[192, 64\]"):
            model.save_pretrained("never-written")
        assert not Path("never-written").exists()
    finally:
        torch.distributed.destroy_process_group()


# -- taking --


@pytest.mark.parametrize("layout", ["fused", "interleaved", "transposed", "crossed"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_dict_in_either_language_is_taken(layout: str, assign: bool, load: Load) -> None:
    stock, model = load(layout, attention_bias=True)
    new = other(stock.state_dict())
    parameters = list(model.parameters())
    assert model.load_state_dict(new, assign=assign) == ([], [])
    assert_equal(model.state_dict(), new)
    assert all((a is b) != assign for a, b in zip(parameters, model.parameters(), strict=True))
    with patched_names():
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = {name: tensor.clone() for name, tensor in new.items()}  # what is assigned belongs to the model
    model.load_state_dict(other(stock.state_dict(), seed=2))
    assert model.load_state_dict(own, assign=assign) == ([], [])
    assert_equal(model.state_dict(), new)


def test_the_dict_that_is_given_is_not_changed(load: Load) -> None:
    for layout, dtype in (("fused", None), ("scaled", torch.float64)):
        stock, model = load(layout, dtype=dtype)
        given = {name: tensor.to(model.dtype) for name, tensor in other(stock.state_dict()).items()}
        kept = {name: tensor.clone() for name, tensor in given.items()}
        model.load_state_dict(given)
        assert_equal(given, kept)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.state_dict()
        assert_equal(dict(model.named_parameters()), before)


def test_values_are_converted_as_loading_converts_them(load: Load) -> None:
    stock, model = load("scaled")
    layer = model.model.layers[2]
    new = other(stock.state_dict())
    model.load_state_dict(new)
    expected = (new["model.layers.2.input_layernorm.weight"].double() * 2 + 1).float()
    assert torch.equal(layer.self_attn.qkv.layernorm_weight, expected)
    assert torch.equal(model.model.norm.weight, (new["model.norm.weight"].double() + 1).float())


def test_a_name_that_is_in_both_languages_means_what_the_rest_of_the_dict_means(load: Load) -> None:
    _, model = load("scaled")
    ones = {"model.norm.weight": torch.ones(64)}
    model.load_state_dict(ones, strict=False)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 2.0)), "alone it is the checkpoint's"
    gate = {"model.layers.0.mlp.gate_proj.weight": torch.ones(96, 64)}
    model.load_state_dict(ones | gate, strict=False)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 2.0))
    own = {"model.layers.0.mlp.fc1_weight": torch.ones(192, 64)}
    model.load_state_dict(ones | own, strict=False)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    three = {"model.norm.weight": torch.full((64,), 3.0)}
    with pytest.raises(RuntimeError, match=r'"model\.norm\.weight" may be meant either way'):
        model.load_state_dict(three | own | {"model.layers.1.mlp.gate_proj.weight": torch.ones(96, 64)}, strict=False)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    with patched_names():
        model.load_state_dict(three, strict=False)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 3.0))


def test_parts_of_one_parameter_may_come_one_after_the_other(load: Load) -> None:
    stock, model = load()
    new = other(stock.state_dict())
    names = sorted(new, key=lambda name: hash(name.rpartition(".layers.")[2][::-1]))
    for index in range(4):
        part = {name: new[name] for name in names[index::4]}
        result = model.load_state_dict(part, strict=False)
        assert set(result.missing_keys) == set(new) - set(part)
        assert not result.unexpected_keys
    assert_equal(model.state_dict(), new)


def test_what_is_missing_and_unexpected_is_told_in_hugging_faces_names(load: Load) -> None:
    stock, model = load()
    given = stock.state_dict() | {"model.layers.0.self_attn.extra.weight": torch.zeros(1), "extra": torch.zeros(1)}
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        del given[name]
    result = model.load_state_dict(given, strict=False)
    assert sorted(result.missing_keys) == ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
    assert sorted(result.unexpected_keys) == ["extra", "model.layers.0.self_attn.extra.weight"]
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(given)
    text = str(caught.value)
    assert 'Missing key(s) in state_dict: "model.layers.1.self_attn.k_proj.weight", "model.norm.weight". ' in text
    assert '"model.layers.0.self_attn.extra.weight"' in text
    assert "qkv" not in text
    assert set(model.load_state_dict({}, strict=False).missing_keys) == set(stock.state_dict())


def test_what_is_missing_of_a_dict_in_own_names_is_told_in_those(load: Load) -> None:
    _, model = load()
    with patched_names():
        own = model.state_dict()
    dropped = [name for name in own if name.startswith("model.layers.1.")]
    given = {name: tensor for name, tensor in own.items() if name not in dropped}
    assert model.load_state_dict(given, strict=False) == (dropped, [])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"model\.layers\.1\.self_attn\.proj\.weight"'):
        model.load_state_dict(given)


def test_a_wrong_shape_is_told_in_torchs_words_and_nothing_of_it_copied(load: Load) -> None:
    stock, model = load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    for shape in ((95, 64), (97, 64), (96,)):
        messages = []
        for each in (stock, model):
            with pytest.raises(RuntimeError) as caught:
                each.load_state_dict({name: torch.zeros(shape)}, strict=False)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert_equal(model.state_dict(), before)
    gate = {name.replace("up", "gate"): torch.ones(96, 64)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({name: torch.zeros(64, 96)} | gate, strict=False)
    assert_equal(model.state_dict(), before | gate)


def test_a_parameter_and_one_of_its_parts_in_one_dict_are_an_error(load: Load) -> None:
    stock, model = load()
    own = "model.layers.1.mlp.fc1_weight"
    part = "model.layers.1.mlp.up_proj.weight"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r'"model\.layers\.1\.mlp\.up_proj\.weight" and "model\.layers\.1\.mlp\.fc1'):
        model.load_state_dict({own: torch.zeros(192, 64), part: torch.zeros(96, 64)}, strict=False)
    assert_equal(model.state_dict(), before)
    mixed = other(stock.state_dict())
    fc1 = torch.cat([mixed.pop(part.replace("up", "gate")), mixed.pop(part)])
    assert model.load_state_dict(mixed | {own: fc1}) == ([], []), "other parameters may have other names"
    assert torch.equal(model.model.layers[1].mlp.fc1_weight, fc1)
    held = model.model.layers[1].mlp.fc1_weight.detach()
    assert model.load_state_dict(mixed | {own: held}) == ([], []), "also if it is the model's own memory"
    assert torch.equal(model.model.layers[1].mlp.fc1_weight, fc1)
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], mixed[part.replace("1", "0", 1)])


@pytest.mark.parametrize("value", [None, 3, [1.0], "text"])
def test_what_is_no_tensor_is_an_error(value: Any, load: Load) -> None:
    _, model = load()
    with pytest.raises(RuntimeError, match=r'"model\.layers\.0\.mlp\.up_proj\.weight", expected torch.Tensor'):
        model.load_state_dict({"model.layers.0.mlp.up_proj.weight": value}, strict=False)


def test_a_tensor_without_values_is_an_error(load: Load) -> None:
    stock, model = load()
    meta = {name: tensor.to("meta") for name, tensor in stock.state_dict().items()}
    with pytest.raises(RuntimeError, match=r'While copying the parameter named "model\.layers\.0\.mlp\.up_proj'):
        model.load_state_dict(meta)


def test_a_tensor_is_cast_and_one_that_float16_can_not_hold_is_an_error(load: Load) -> None:
    stock, model = load(dtype=torch.float16)
    new = {name: tensor.half().double() for name, tensor in other(stock.state_dict()).items()}
    model.load_state_dict(new)
    assert_equal(model.state_dict(), {name: tensor.half() for name, tensor in new.items()})
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: values that float16 can not"):
        model.load_state_dict({"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), 1e6)}, strict=False)


def test_gradients_and_the_parameters_identity_survive(load: Load) -> None:
    stock, model = load()
    frozen = model.model.layers[0].mlp.fc2_weight.requires_grad_(False)
    before = dict(model.named_parameters())
    given = {name: nn.Parameter(tensor) for name, tensor in other(stock.state_dict()).items()}
    model.load_state_dict(given)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.is_leaf
        assert parameter.requires_grad == (parameter is not frozen)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not frozen)


def test_torchs_switch_for_swapping_tensors_works_too(load: Load) -> None:
    stock, model = load()
    new = other(stock.state_dict())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(new)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_equal(model.state_dict(), new)


def test_a_meta_model_takes_tensors_by_assign(load: Load) -> None:
    stock, model = load()
    model = model.to("meta")
    new = {name: tensor.bfloat16() for name, tensor in other(stock.state_dict()).items()}
    with pytest.warns(UserWarning, match=r"up_proj\.weight: copying from a non-meta parameter.*assign=True"):
        model.load_state_dict({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}, strict=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    gate = {name: tensor for name, tensor in new.items() if "up_proj" not in name}
    with pytest.raises(RuntimeError, match=r"fc1_weight is on the meta device: .*gate_proj\.weight\" are only a part"):
        model.load_state_dict(gate, strict=False, assign=True)
    assert model.load_state_dict(new, assign=True) == ([], [])
    assert_equal(model.state_dict(), new)
    assert model.lm_head.weight.data_ptr() == new["lm_head.weight"].data_ptr()
    norm = model.model.layers[0].self_attn.qkv.layernorm_weight
    assert norm.data_ptr() == new["model.layers.0.input_layernorm.weight"].data_ptr(), "nothing to put together"


def test_a_part_of_a_parameter_is_assigned_by_copying(load: Load) -> None:
    stock, model = load()
    up = {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64)}
    model.load_state_dict(up, strict=False, assign=True)
    assert_equal(model.state_dict(), stock.state_dict() | up)


class WithState(nn.Module):
    """Has extra state, as Transformer Engine's modules have, and must never be given any."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("extra state was read")


def test_extra_state_is_neither_given_nor_read_nor_missed(load: Load) -> None:
    _, model = load()
    model.model.layers[0].add_module("gate", WithState())
    wrapper = nn.ModuleDict({"before": WithState(), "module": model, "after": WithState()})
    others = ["before._extra_state", "after._extra_state"]
    for each, prefix in ((model, ""), (wrapper, "module.")):
        found = each.state_dict()
        assert [name for name in found if "_extra_state" in name] == ([] if each is model else others), (
            "not ours: stays"
        )
        given = {name: value for name, value in found.items() if "_extra_state" not in name}
        given[f"{prefix}model.layers.0.gate._extra_state"] = b"a pickle"
        assert each.load_state_dict(given, strict=False) == ([] if each is model else others, [])
    model.load_state_dict(model.state_dict())
    with patched_names():
        assert not [name for name in model.state_dict() if "_extra_state" in name]
        model.load_state_dict({"model.layers.0.gate._extra_state": b"a pickle"}, strict=False)


def test_a_wrapped_layer_is_taken_as_it_is_given(load: Load) -> None:
    _, model = load()
    layer = model.model.layers[1]
    layer.mlp = nn.Sequential(layer.mlp)
    given = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    assert "model.layers.1.mlp.0.fc1_weight" in given
    assert model.load_state_dict(given) == ([], [])
    assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"model\.layers\.1\.mlp\.up_proj\.weight"'):
        model.load_state_dict(given | {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)})


def test_adapters_of_peft_pass_through(load: Load) -> None:
    peft = pytest.importorskip("peft")
    stock, model = load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    adapters = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert len(adapters) == 2
    changed = {name: torch.full_like(tensor, 0.25) for name, tensor in adapters.items()}
    result = peft.set_peft_model_state_dict(wrapped, changed)
    assert not result.unexpected_keys
    assert all(
        bool((t == 0.25).all()) for t in peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).values()
    )
    found = wrapped.state_dict()
    assert "base_model.model.model.layers.0.mlp.up_proj.weight" in found
    with pytest.raises(PlanError, match=r"are gone \(1\)\n  lm_head\.weight\n"):
        model.save_pretrained("never-written")
    assert_equal(wrapped.unload().state_dict(), before)
    assert stock.state_dict().keys() == before.keys()


# -- constants and copies of tied tensors --


@pytest.fixture
def padded(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> tuple[Any, Any]:
    """A stock model and a patched one with 8 more rows of the vocabulary, and biases that no checkpoint has."""
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = copy.deepcopy(stock.config)
    config.vocab_size, config.mlp_bias = 136, True
    mapping = tmp_path / "padded.yaml"
    mapping.write_text(
        HEAD
        + "  model.embed_tokens.weight: {of: model.embed_tokens.weight, pad: {size: vocab_size - 8}}\n"
        + "  lm_head.weight: {of: lm_head.weight, pad: {size: vocab_size - 8, value: 3}}\n"
        + "  model.layers.{layer}:\n    mlp.fc1_bias: {create: 0}\n    mlp.fc2_bias: {create: 0}\n"
    )
    return stock, tepatch.load("llama", folder, backend="reference", mapping=mapping, config=config)


def test_constants_are_not_given_not_missed_and_not_changed(padded: tuple[Any, Any]) -> None:
    stock, model = padded
    assert_equal(model.state_dict(), stock.state_dict())
    new = other(stock.state_dict())
    assert model.load_state_dict(new) == ([], [])
    assert_equal(model.state_dict(), new)
    assert torch.equal(model.lm_head.weight[128:], torch.full((8, 64), 3.0))
    meta = copy.deepcopy(model).to("meta")
    assert meta.load_state_dict(new, assign=True) == ([], [])
    assert_equal(dict(meta.named_parameters()), dict(model.named_parameters()))


# -- copies of the model --


def copies_of(model: Any) -> Iterator[Any]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_copies_translate_for_themselves(load: Load) -> None:
    stock, model = load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for each in copies_of(model):
        new = other(stock.state_dict())
        assert each.load_state_dict(new) == ([], [])
        assert_equal(each.state_dict(), new)
        assert not misplaced(each, each.state_dict())
        assert_equal(model.state_dict(), before)


def test_a_pickle_translates_in_another_process(load: Load, tmp_path: Path) -> None:
    stock, model = load()
    torch.save(model, tmp_path / "model.pt")
    torch.save(other(stock.state_dict()), tmp_path / "state.pt")
    program = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
state = torch.load({str(tmp_path / "state.pt")!r}, weights_only=True)
model.load_state_dict(state)
found = model.state_dict()
assert found.keys() == state.keys()
assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
model.save_pretrained({str(tmp_path / "saved")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = type(stock).from_pretrained(tmp_path / "saved")
    assert_equal(saved.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_plan_of_many_tensors_is_translated_in_a_moment() -> None:
    """36,000 tensors in 24,000 parameters: what counts is that the work grows with their number, not its square."""
    import time

    from tepatch.mapping import parse_mapping
    from tepatch.planning import Spec, make_plan

    rules = parse_mapping(
        "version: 1\ncaptures: {layer: layers}\nparameters:\n"
        "  l.{layer}.fc1: {concat: ['l.{layer}.gate', 'l.{layer}.up']}\n  l.{layer}.fc2: 'l.{layer}.down'\n",
    )
    layers = 12_000
    sources = {f"l.{n}.{part}": Spec((2, 3), "F32") for n in range(layers) for part in ("gate", "up", "down")}
    targets = {
        f"l.{n}.{name}": Spec(shape, "F32") for n in range(layers) for name, shape in (("fc1", (4, 3)), ("fc2", (2, 3)))
    }
    plan = make_plan(rules, config={"layers": layers}, sources=sources, targets=targets)
    started = time.process_time()  # other tests may keep the machine busy
    names = names_in(plan)
    assert time.process_time() - started < 2
    assert len(names.groups) == 2 * layers
