"""When a quantized copy of a weight is used again, on a stand-in for Transformer Engine that keeps its rules.

The stand-in rounds where the real one quantizes, and counts. Each change of a weight, or of what it is quantized by,
has to be seen in the next output, which a module that makes no copies gives.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import assert_close
from torch import Tensor, nn
from transformers import LlamaConfig

import tepatch
from tepatch.te.backend import probe, use_backend
from tepatch.te.experts import Experts
from tepatch.te.layer import AcceleratedLayer, WeightCopies, apply_precision, weight_copies
from tepatch.te.nvidia import engine
from tepatch.te.nvidia import weight_cache as frozen
from tepatch.te.nvidia.precision import Precision, read_precision
from tepatch.te.nvidia.weight_cache import held_bytes
from tepatch.te.projections import Place, Projection, Rows

X = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class DelayedScaling:
    margin: int = 0


@dataclass
class Float8CurrentScaling:
    power_2_scale: bool = False


@dataclass
class Custom:
    pass


KINDS = [DelayedScaling, Float8CurrentScaling]


class Copy:
    """A quantized tensor."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        self.numbers = (weight.detach() * scale).round() / scale

    def get_metadata(self) -> dict[str, Any]:
        return {"data": self.numbers.to(torch.uint8), "scale_inv": torch.ones(1), "transpose": None, "dtype": "e4m3"}


class Theirs(nn.Module):
    """What Transformer Engine's modules have in common. ``made`` counts quantized weights."""

    def __init__(self) -> None:
        super().__init__()
        self._fp8_workspaces: dict[str, Any] = {}
        self.quantizers: dict[str, Any] = {"scaling_fwd": []}
        self.fp8_meta: dict[str, Any] = {}
        self.recipe: Any = None
        self.made = 0

    def quantized(self, name: str, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        recipe = manager.get_fp8_recipe()
        if recipe is None:
            return weight
        if recipe != self.recipe:
            self.recipe, self.quantizers["scaling_fwd"] = recipe, [object()]
            if isinstance(recipe, DelayedScaling):
                self.fp8_meta.setdefault("scaling_fwd", SimpleNamespace(scale=torch.ones(1)))
        made = self._fp8_workspaces.get(name) if is_first_microbatch is not None else None
        if made is None or is_first_microbatch:
            self.made += 1
            made = Copy(weight, self.scale)
            if is_first_microbatch is not None:
                self._fp8_workspaces[name] = made
        numbers: Tensor = made.numbers
        return numbers

    @property
    def scale(self) -> float:
        if isinstance(self.recipe, DelayedScaling):
            return float(self.fp8_meta["scaling_fwd"].scale)
        return 8.0 if getattr(self.recipe, "power_2_scale", False) else 10.0


class TheirLinear(Theirs):
    def __init__(self, columns: int = 16, rows: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))
        self.bias = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return inp @ self.quantized("weight", self.weight, is_first_microbatch).T


class GroupedLinear(Theirs):
    def __init__(self, num_gemms: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        names = [f"weight{index}" for index in range(self.num_gemms)]
        weights = [self.quantized(name, getattr(self, name), is_first_microbatch) for name in names]
        parts = inp.split(m_splits)  # type: ignore[no-untyped-call]
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])


class Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        return inp, m_splits


class Unpadding(Padding):
    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:  # type: ignore[override]
        return inp


class Manager:
    """The state of the process. ``recipe`` is what is in force."""

    recipe: Any = None

    def is_fp8_enabled(self) -> bool:
        return self.recipe is not None

    def get_fp8_recipe(self) -> Any:
        return self.recipe

    def get_buffer_info(self) -> str:
        return "registered"


manager = Manager()


@contextmanager
def autocast(*, enabled: bool = True, recipe: Any) -> Iterator[None]:
    before, manager.recipe = manager.recipe, recipe if enabled else None
    try:
        yield
    finally:
        manager.recipe = before


@pytest.fixture(autouse=True)
def te(monkeypatch: pytest.MonkeyPatch) -> None:
    probe()  # it remembers what is installed, which is not the stand-in
    manager.recipe = None
    package, quantization = ModuleType("pytorch"), ModuleType("quantization")
    package.autocast, package.GroupedLinear = autocast, GroupedLinear  # type: ignore[attr-defined]
    package.Fp8Padding, package.Fp8Unpadding = Padding, Unpadding  # type: ignore[attr-defined]
    quantization.FP8GlobalStateManager = manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.quantization", quantization)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", ModuleType("transformer_engine_torch"))


class Linear(engine._linear(TheirLinear)):  # type: ignore[misc]
    """The engine's linear layer, over the stand-in; of a class that pickle can name."""


class Layer(AcceleratedLayer):
    """A layer with one linear, at whose name of Hugging Face's a projection stands."""

    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.linear = Linear()
        self.precision = None if recipe is None else Precision("fp8", recipe)
        rows = Rows(
            owner=self.linear,
            around=self,
            path="proj",
            owner_path="linear",
            weight="weight",
            bias=None,
            start=0,
            stop=16,
        )
        self.linear.add_place(Place(stand_in=Projection(rows), parent=self, attribute="proj"))

    def forward(self, inp: Tensor) -> Tensor:
        out: Tensor = self.linear(inp)
        return out


def layer(recipe: Any = None) -> Any:
    return Layer(Float8CurrentScaling() if recipe is None else recipe).eval()


def call(layer: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = layer(x)
    return out


def fresh(layer: Any) -> Tensor:
    """What a module that makes no copies gives: none are made in training."""
    other = copy.deepcopy(layer).train()
    other.linear.fp8_meta = layer.linear.fp8_meta
    return call(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients_off", [torch.no_grad, torch.inference_mode])
def test_a_frozen_weight_is_quantized_once(
    kind: Any, gradients_off: Callable[[], AbstractContextManager[None]]
) -> None:
    ours = layer(kind())
    expected = fresh(ours)
    with gradients_off():
        outs = [ours(X) for _ in range(4)]
    assert all(torch.equal(out, expected) for out in outs)
    assert ours.linear.made == 1


def test_a_batch_of_another_size_uses_the_same_copy() -> None:
    ours = layer()
    whole = call(ours)
    assert_close(call(ours, X[:3]), whole[:3], terms=16)  # fewer rows may be added in another order
    assert ours.linear.made == 1


def in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.linear.weight.mul_(2)


def in_place_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.linear.weight.mul_(2)


def load(layer: Any) -> None:
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})


def fused_step(layer: Any) -> None:
    """Of an optimizer whose kernel gives no new version."""
    layer.linear.weight.grad = torch.ones(16, 16)
    version = layer.linear.weight._version
    torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True).step()
    assert layer.linear.weight._version == version
    layer.linear.weight.grad = None


def exchanged(layer: Any) -> None:
    layer.linear.weight = nn.Parameter(2 * layer.linear.weight.detach())


def exchanged_over_the_same_numbers(layer: Any) -> None:
    layer.before = [layer.linear.weight]
    layer.linear.weight = nn.Parameter(layer.linear.weight.data)
    with torch.no_grad():
        layer.before[0].mul_(2)


def other_storage(layer: Any) -> None:
    layer.linear.weight.data = 2 * layer.linear.weight.data


def other_place_in_the_storage(layer: Any) -> None:
    layer.linear.weight.data = layer.linear.weight.data.T.contiguous().view(-1).repeat(2)[1:257].view(16, 16)


def merged(layer: Any) -> None:
    layer.proj.weight.data += 1


def written_through_a_projection(layer: Any) -> None:
    layer.proj.weight.data.mul_(2)


def set_through_a_projection(layer: Any) -> None:
    layer.proj.write("weight", 2 * layer.linear.weight.detach())


def recipe_changed(layer: Any) -> None:
    layer.precision = Precision("fp8", Float8CurrentScaling(power_2_scale=True))


CHANGES = [
    in_place,
    in_place_in_inference_mode,
    load,
    fused_step,
    exchanged,
    exchanged_over_the_same_numbers,
    other_storage,
    other_place_in_the_storage,
    merged,
    written_through_a_projection,
    set_through_a_projection,
    recipe_changed,
]


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_weight_is_quantized_again(change: Callable[[Any], None]) -> None:
    ours = layer()
    before = call(ours)
    change(ours)
    expected = fresh(ours)
    assert not torch.equal(expected, before)
    assert torch.equal(call(ours), expected)
    assert torch.equal(call(ours), expected)
    assert ours.linear.made == 2


def test_a_view_of_another_part_of_a_storage_is_another_weight() -> None:
    ours, numbers = layer(), torch.randn(272)
    ours.linear.weight.data = numbers[:256].view(16, 16)
    call(ours)
    ours.linear.weight.data = numbers[16:].view(16, 16)
    assert torch.equal(call(ours), fresh(ours))


def test_an_optimizer_does_not_change_what_can_not_be_trained() -> None:
    ours, other = layer(), nn.Linear(2, 2)
    ours.requires_grad_(False)
    call(ours)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    call(ours)
    assert ours.linear.made == 1


def test_new_quantizers_make_a_new_copy() -> None:
    ours = layer()
    call(ours)
    ours.linear.quantizers["scaling_fwd"] = [object()]
    call(ours)
    assert ours.linear.made == 2


def test_scales_that_were_loaded_make_a_new_copy() -> None:
    ours = layer(DelayedScaling())
    call(ours)
    ours.linear.fp8_meta["scaling_fwd"].scale.fill_(7)
    assert torch.equal(call(ours), fresh(ours))
    assert ours.linear.made == 2


def with_gradients(other: Any) -> None:
    other(X)


def in_an_autocast_that_ends_with_gradients(other: Any) -> None:
    with autocast(recipe=DelayedScaling()):
        call(other)


@pytest.mark.parametrize("recipe", [DelayedScaling(), Float8CurrentScaling()])
@pytest.mark.parametrize("called", [with_gradients, in_an_autocast_that_ends_with_gradients])
def test_calls_of_another_model_may_update_the_scales_of_this_one(called: Callable[[Any], None], recipe: Any) -> None:
    ours, other = layer(DelayedScaling()), layer(recipe)
    call(ours)
    called(other)  # the end of the outermost autocast updates all scales
    ours.linear.fp8_meta["scaling_fwd"].scale.data.fill_(7)  # as the fused kernel does, without a new version
    assert torch.equal(call(ours), fresh(ours))


def test_evaluating_another_model_does_not() -> None:
    ours, other = layer(DelayedScaling()), layer(DelayedScaling())
    for _ in range(3):
        call(ours)
        call(other)
        call(copy.deepcopy(other).train())
    assert (ours.linear.made, other.linear.made) == (1, 1)


@pytest.mark.parametrize(("kind", "copies"), [(DelayedScaling, False), (Float8CurrentScaling, True)])
def test_inside_an_autocast_of_the_users_only_delayed_scaling_keeps_no_copies(kind: Any, copies: bool) -> None:
    ours, recipe = layer(), kind()
    ours.precision = None
    for _ in range(3):
        with autocast(recipe=recipe):  # gradients are on where it ends
            call(ours)
    assert ours.linear.made == (1 if copies else 3)
    own = layer(DelayedScaling())
    call(own)
    with autocast(recipe=DelayedScaling()):
        call(own)
    call(own)
    assert own.linear.made == 3  # what the user's autocast did to the scales is not known


def training_mode(layer: Any) -> Any:
    return layer.train()


def turned_off(layer: Any) -> Any:
    layer.linear.caches_weights = False
    return layer


def custom_recipe(layer: Any) -> Any:
    layer.precision = Precision("custom", Custom())
    return layer


def without_versions(layer: Any) -> Any:
    with torch.inference_mode():
        layer.linear.weight = nn.Parameter(torch.ones(16, 16))
    return layer


class Quantized(nn.Parameter):
    """A weight of another kind."""


def not_plain(layer: Any) -> Any:
    layer.linear.weight = Quantized(torch.ones(16, 16))
    return layer


def older_module(layer: Any) -> Any:
    layer.linear.__dict__["others"] = layer.linear.__dict__.pop("_fp8_workspaces")
    layer.linear.quantized = lambda name, weight, first: (setattr(layer.linear, "made", layer.linear.made + 1), weight)[
        1
    ]
    return layer


@pytest.mark.parametrize(
    "prepare", [training_mode, turned_off, custom_recipe, without_versions, not_plain, older_module]
)
def test_no_copies_are_kept(prepare: Callable[[Any], Any]) -> None:
    ours = prepare(layer())
    for _ in range(3):
        call(ours)
    assert ours.linear.made == 3
    assert held_bytes(ours.linear) == 0


def test_none_are_kept_with_gradients() -> None:
    ours = layer()
    for _ in range(3):
        ours(X)
    assert ours.linear.made == 3


def test_who_says_himself_when_weights_are_new_is_obeyed() -> None:
    ours = layer()
    with torch.no_grad(), autocast(recipe=Float8CurrentScaling()):
        ours.linear(X, is_first_microbatch=True)
        for _ in range(3):
            ours.linear(X, False)
        assert ours.linear.made == 1
        theirs = ours.linear._fp8_workspaces
        ours.linear(X)
        ours.linear(X)
    assert ours.linear.made == 2
    ours.train()
    assert ours.linear._fp8_workspaces is theirs
    assert list(theirs) == ["weight"]


def test_none_are_kept_where_fully_shard_gathers_the_weights() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ours = layer()
        call(ours)
        call(ours)
        assert ours.linear.made == 1  # a process group alone shards nothing
        sharded = layer()
        fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        call(sharded)
        call(sharded)
        assert sharded.linear.made == 2
    finally:
        torch.distributed.destroy_process_group()


def trained(layer: Any) -> None:
    layer.train()


def moved(layer: Any) -> None:
    layer.to(torch.float64)


def called_with_gradients(layer: Any) -> None:
    layer(X)


def computed_in_full(layer: Any) -> None:
    layer.precision = None
    call(layer)


def in_a_custom_recipe(layer: Any) -> None:
    layer.precision = Precision("custom", Custom())
    call(layer)


def other_precision(layer: Any) -> None:
    apply_precision(layer, read_precision(None))


def offloaded(layer: Any) -> None:
    layer.linear.weight = nn.Parameter(torch.empty(16, 16, device="meta"))
    gc.collect()


@pytest.mark.parametrize(
    "end", [trained, moved, called_with_gradients, computed_in_full, in_a_custom_recipe, other_precision, offloaded]
)
def test_the_memory_is_freed(end: Callable[[Any], None]) -> None:
    ours = layer()
    call(ours)
    assert held_bytes(ours.linear) == 16 * 16 + 4
    end(ours)
    assert held_bytes(ours.linear) == 0


def test_evaluation_after_evaluation_frees_nothing() -> None:
    ours = layer()
    call(ours)
    call(ours.eval())
    assert ours.linear.made == 1


def test_a_copy_that_fails_half_way_is_not_used() -> None:
    ours = layer()
    call(ours)
    in_place(ours)
    with pytest.raises(RuntimeError):
        call(ours, torch.ones(16, 32))  # after it has quantized
    in_place(ours)
    assert torch.equal(call(ours), fresh(ours))
    assert list(ours.linear._fp8_workspaces) == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_model_make_their_own(how: Callable[[Any], Any]) -> None:
    ours = layer()
    call(ours)
    other = how(ours)
    assert held_bytes(other.linear) == 0
    in_place(other)
    assert torch.equal(call(other), fresh(other))
    call(ours)
    assert (ours.linear.made, other.linear.made) == (1, 2)


def test_experts_keep_a_copy_of_each_matrix() -> None:
    with use_backend("reference"):
        experts = Experts(3, 16, 16, init_std=1.0).eval()
    counts, x = [5, 0, 11], X

    def run() -> Tensor:
        with torch.no_grad(), autocast(recipe=Float8CurrentScaling()):
            return engine.grouped_mlp(experts, x, counts)

    def made() -> int:
        return sum(step.made for step in experts.__dict__["_steps"].values())

    first = run()
    assert torch.equal(run(), first)
    assert made() == 6
    assert held_bytes(experts) == 3 * (32 * 16 + 16 * 16) + 6 * 4
    with torch.no_grad():
        experts.down_proj.mul_(30)
    assert not torch.equal(run(), first)
    assert made() == 9
    with torch.no_grad():
        engine.grouped_mlp(experts, x, counts)  # without an autocast
    assert held_bytes(experts) == 0
    run()
    frozen.forget_all(experts)
    assert held_bytes(experts) == 0


def test_compiled_layers_use_the_copies() -> None:
    ours = layer()
    compiled = torch.compile(ours, backend="eager")
    expected = fresh(ours)
    assert all(torch.equal(call(compiled), expected) for _ in range(3))
    assert ours.linear.made == 1
    torch.compiler.reset()


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=128, pad_token_id=0
    )
    model = tepatch.build("llama", config, backend="reference")
    for name, module in model.named_modules():
        if "layers." in name and type(module).__name__ in ("LayerNormLinear", "Linear", "LayerNormMLP"):
            module.fp8_meta = {}  # as a module of Transformer Engine
    return model


WEIGHTS = 64 * 64 * 4 + 64 * 96 * 3
"""Elements of the matrices of one layer."""


def test_what_copies_cost_is_told(model: Any) -> None:
    assert weight_copies(model) == WeightCopies(held=0, full=3 * WEIGHTS)
    for each, kind in zip(model.model.layers, ("bf16", "fp8", "nvfp4"), strict=True):
        recipe = {"bf16": None, "fp8": DelayedScaling(), "nvfp4": type("NVFP4BlockScaling", (), {})()}[kind]
        each.precision = Precision(kind, recipe)
    assert weight_copies(model).full == WEIGHTS + WEIGHTS // 2
    model.model.layers[1].mlp.fc1_weight = Quantized(torch.empty(192, 64))
    assert weight_copies(model).full == WEIGHTS - 64 * 192 + WEIGHTS // 2
    ours = layer()
    call(ours)
    assert weight_copies(ours).held == 16 * 16 + 4
    assert str(WeightCopies(held=2**20, full=3 * 2**30)) == "1.0 MiB of at most 3,072.0 MiB"


@pytest.mark.parametrize("cache_weights", [True, False])
def test_set_precision_says_whether_copies_are_kept(model: Any, cache_weights: bool) -> None:
    tepatch.set_precision(model, None, cache_weights=not cache_weights)
    tepatch.set_precision(model, None, cache_weights=cache_weights)
    mlps = [each.mlp for each in copy.deepcopy(model).model.layers]
    assert [mlp.caches_weights for mlp in mlps] == [cache_weights] * 3
    assert weight_copies(model).full == (3 * WEIGHTS if cache_weights else 0)


def test_the_end_of_an_autocast_with_gradients_updates_scales() -> None:
    """A layer that is called with gradients does not say that scales rest, nor one inside another's autocast."""
    seen = []
    ours = layer(DelayedScaling())
    ours.register_forward_pre_hook(lambda *_: seen.append(frozen._scales_rest.get()))
    for gradients_off, around in [
        (torch.no_grad(), nullcontext()),
        (torch.enable_grad(), nullcontext()),
        (torch.no_grad(), autocast(recipe=DelayedScaling())),
    ]:
        with gradients_off, around:
            ours(X)
    assert seen == [True, False, False]
    assert not frozen._scales_rest.get()
