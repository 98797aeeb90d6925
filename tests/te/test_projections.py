"""Projections: linear layers of the stock model as views of fused parameters, and what stands in their places."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.transformer_engine import convert_model
from rounding import ELEMENTWISE, assert_close
from torch import Tensor, nn

from tepatch.errors import UnsupportedError
from tepatch.te.nvidia.alignment import Alignment, alignment_of, check_features, missing_rows, with_padded_rows
from tepatch.te.projections import Fused, Place, Projection, Rows
from tepatch.te.reference import ACTIVATIONS, LayerNormLinear, LayerNormMLP, Linear

ROWS = {"q": (0, 6), "k": (6, 8), "v": (8, 10)}


class Doubled(nn.Module):
    """What an adapter is to a fused module: it asks the layer in whose place it stands, and changes the answer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        out: Tensor = self.base_layer(x)
        return 2 * out


class Holder(nn.Module):
    """A fused module and the places of its projections beside it."""

    def __init__(self, fused: Fused, rows: dict[str, tuple[str, int, int]]) -> None:
        super().__init__()
        self.fused = fused
        for name, (weight, start, stop) in rows.items():
            bias = fused.BIASES[weight]
            projection = Projection(
                Rows(
                    owner=fused,
                    around=self,
                    path=f"holder.{name}",
                    owner_path="holder.fused",
                    weight=weight,
                    bias=bias if getattr(fused, bias) is not None else None,
                    start=start,
                    stop=stop,
                )
            )
            fused.add_place(Place(stand_in=projection, parent=self, attribute=name))


def randomized(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def norm_linear(**options: Any) -> Any:
    rows = {name: ("weight", *rows) for name, rows in ROWS.items()}
    return randomized(Holder(LayerNormLinear(4, 10, normalization="RMSNorm", **options), rows))


def linear() -> Any:
    return randomized(Holder(Linear(4, 10), {name: ("weight", *rows) for name, rows in ROWS.items()}))


def mlp(activation: str = "swiglu") -> Any:
    fused = LayerNormMLP(4, 6, normalization="RMSNorm", activation=activation)
    first = {"gate": ("fc1_weight", 0, 6), "up": ("fc1_weight", 6, 12)}
    if not ACTIVATIONS[activation][1]:
        first = {"up": ("fc1_weight", 0, 6)}
    return randomized(Holder(fused, {**first, "down": ("fc2_weight", 0, 4)}))


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 4)), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("make", [linear, norm_linear])
def test_what_stands_in_a_place_gets_the_input_of_the_product_and_gives_its_rows(make: Callable[[], Any]) -> None:
    holder = make()
    plain = holder.fused(x())
    normed = holder.fused.normed(x()) if isinstance(holder.fused, LayerNormLinear) else x()
    holder.k = Doubled(holder.k)
    out = holder.fused(x())
    assert torch.equal(out[..., :6], plain[..., :6])
    assert torch.equal(out[..., 6:8], 2 * plain[..., 6:8])
    assert torch.equal(out[..., 8:], plain[..., 8:])
    assert torch.equal(holder.k.seen[0], normed)
    holder.q, holder.v = Doubled(holder.q), Doubled(holder.v)
    assert torch.equal(holder.fused(x()), 2 * plain)


def test_rows_that_nobody_names_stay_what_they_are() -> None:
    holder = randomized(Holder(Linear(4, 10), {"middle": ("weight", 3, 5)}))
    plain = holder.fused(x())
    holder.middle = Doubled(holder.middle)
    expected = torch.cat([plain[..., :3], 2 * plain[..., 3:5], plain[..., 5:]], dim=-1)
    assert torch.equal(holder.fused(x()), expected)


def test_the_normed_input_is_still_returned_to_who_asks_for_it() -> None:
    holder = norm_linear(return_layernorm_output=True)
    plain, normed = holder.fused(x())
    holder.q = Doubled(holder.q)
    out, again = holder.fused(x())
    assert torch.equal(again, normed)
    assert torch.equal(out[..., 6:], plain[..., 6:])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_adapters_of_an_mlp_are_before_and_after_its_activation(activation: str) -> None:
    holder = mlp(activation)
    fused = holder.fused
    function, gates = ACTIVATIONS[activation]
    first = F.linear(fused.normed(x()).double(), fused.fc1_weight.double(), fused.fc1_bias.double())
    halves = first.chunk(2, dim=-1) if gates else (first,)
    holder.up, holder.down = Doubled(holder.up), Doubled(holder.down)
    middle = function(halves[0]) * 2 * halves[1] if gates else function(2 * first)
    expected = 2 * F.linear(middle, fused.fc2_weight.double(), fused.fc2_bias.double())
    terms = 2 * (4 + 1 + ELEMENTWISE)  # one product and its bias, and an activation that squares it at the most
    assert_close(fused(x()), expected, terms=terms + 6 + 1)
    assert torch.equal(holder.up.seen[0], fused.normed(x()))
    assert_close(holder.down.seen[0], middle, terms=terms)


def test_gradients_reach_the_fused_parameter_through_a_projection() -> None:
    holder = norm_linear()
    holder.v(x()).square().sum().backward()
    gradient = holder.fused.weight.grad
    assert not gradient[:8].any()
    assert gradient[8:].abs().min() > 0
    assert torch.equal(holder.v.weight.grad, gradient[8:])
    assert torch.equal(holder.fused.bias.grad[8:], holder.v.bias.grad)


def test_a_projection_alone_is_the_linear_layer_that_it_stands_for() -> None:
    for holder, parameter in ((norm_linear(), "weight"), (mlp(), "fc2_weight"), (mlp(), "fc1_weight")):
        for name, projection in holder.named_modules():
            if isinstance(projection, Projection) and projection.rows.weight == parameter:
                value = x(2, projection.in_features)
                exact = [tensor.detach().double() for tensor in (value, projection.weight, projection.bias)]
                expected = F.linear(*exact)
                condition = float(F.linear(*(tensor.abs() for tensor in exact)).max() / expected.abs().max())
                terms = projection.in_features + 1
                assert_close(projection(value), expected, terms=terms, condition=condition, name=name)


def test_hooks_of_a_projection_are_called() -> None:
    holder = norm_linear()
    plain = holder.fused(x())
    seen: list[Tensor] = []
    handle = holder.k.register_forward_hook(lambda module, args, output: seen.append(output) or 3 * output)
    out = holder.fused(x())
    assert torch.equal(seen[0], plain[..., 6:8])
    assert torch.equal(out[..., 6:8], 3 * plain[..., 6:8])
    handle.remove()
    assert torch.equal(holder.fused(x()), plain)


def test_a_tensor_computed_before_is_used_for_that_very_input_only() -> None:
    class Changing(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base_layer(x.clone() * 0)
            return out

    holder = norm_linear()
    holder.k = Changing(holder.k)
    assert torch.equal(holder.fused(x())[0, 0, 6:8], holder.fused.bias[6:8])


def test_a_weight_that_is_written_during_the_call_counts() -> None:
    class Writing(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            self.base_layer.weight.data += 1
            out: Tensor = self.base_layer(x)
            return out

    holder = norm_linear()
    plain = holder.fused(x())
    holder.k = Writing(holder.k)
    expected = plain[..., 6:8] + holder.fused.normed(x()).sum(-1, keepdim=True)
    assert_close(holder.fused(x())[..., 6:8], expected, terms=4 + 1 + 4, condition=4)  # what is added may cancel


@pytest.mark.parametrize("how", ["in place", "assigned", "of itself", "transposed itself"])
def test_data_that_is_set_arrives_in_the_fused_parameter(how: str) -> None:
    holder = randomized(Holder(Linear(4, 10), {"k": ("weight", 6, 10)}))
    weight, before = holder.k.weight, holder.fused.weight.detach().clone()
    expected = before[6:] + 1
    if how == "in place":
        weight.data += 1
    elif how == "assigned":
        weight.data = before[6:] + 1
    elif how == "of itself":
        weight.data = weight.data
        expected = before[6:]
    else:
        weight.data = weight.data.t()
        expected = before[6:].t()
    assert torch.equal(holder.fused.weight[6:], expected)
    assert torch.equal(holder.fused.weight[:6], before[:6])
    assert torch.equal(weight, expected)


def test_data_that_does_not_fit_is_refused() -> None:
    holder = norm_linear()
    with pytest.raises(UnsupportedError, match=r"(?s)holder\.k: data of another shape .*\[2, 4\].*\[3, 4\]"):
        holder.k.weight.data = torch.zeros(3, 4)
    with pytest.raises(UnsupportedError, match=r"float64"):
        holder.k.bias.data = torch.zeros(2, dtype=torch.float64)


def test_assigning_another_tensor_is_refused() -> None:
    holder = norm_linear()
    with pytest.raises(
        UnsupportedError, match=r"(?s)holder\.q: another weight .*rows 0 to 6 of a LayerNormLinear.s weight.*copy_"
    ):
        holder.q.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(UnsupportedError, match="another bias"):
        holder.q.bias = None
    with pytest.raises(UnsupportedError, match="takes no parameter"):
        holder.q.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    with pytest.raises(UnsupportedError, match="by itself"):
        holder.q.weight.requires_grad = False
    holder.q.weight, holder.q.bias = holder.q.weight, holder.q.bias  # what peft does when it unloads
    holder.q.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="trained or frozen by itself"):
        holder.q.requires_grad_(False)
    assert holder.q.requires_grad_(True) is holder.q
    assert not list(holder.q.parameters(recurse=False))


def test_a_sharded_or_quantized_parameter_can_not_be_written() -> None:
    class Quantized(Tensor):
        """Numbers that come out by ``dequantize`` only, as Transformer Engine's."""

        def dequantize(self) -> Tensor:
            return self.as_subclass(Tensor) + 0

    class Sharded(Tensor):
        """Numbers that are not all here."""

    holder = norm_linear()
    values = holder.fused.weight.detach().clone()
    holder.fused._parameters["weight"] = values.as_subclass(Quantized)
    assert torch.equal(holder.k.weight, values[6:8])
    with pytest.raises(UnsupportedError, match=r"(?s)can not be written.*Quantized"):
        holder.k.weight.data += 1
    holder.fused._parameters["weight"] = values.as_subclass(Sharded)
    with pytest.raises(UnsupportedError, match=r"(?s)Sharded.*gather"):
        _ = holder.k.weight


def test_a_projection_shows_the_parameter_that_is_there_now() -> None:
    holder = norm_linear()
    holder.fused.weight = nn.Parameter(torch.zeros(10, 4))
    assert not holder.k.weight.any()
    holder.double()
    assert holder.k.weight.dtype == torch.float64
    holder.to("meta")
    assert holder.k.weight.is_meta


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_the_modules_around_has_projections_of_its_own(how: Callable[[Any], Any]) -> None:
    holder = norm_linear()
    holder.k = Doubled(holder.k)
    copied = how(holder)
    assert torch.equal(copied.fused(x()), holder.fused(x()))
    copied.v.weight.data = torch.zeros(2, 4)
    assert not copied.fused.weight[8:].any()
    assert holder.fused.weight[8:].all()
    assert copied.fused is copied.v.rows.owner
    assert copied.k.seen
    assert copied.get_submodule("v") is copied.v


def test_a_projection_copied_by_itself_is_a_linear_layer_of_its_own() -> None:
    holder = norm_linear()
    copied = copy.deepcopy(holder.k)
    assert type(copied) is nn.Linear
    assert torch.equal(copied.weight, holder.k.weight)
    assert torch.equal(copied.bias, holder.k.bias)
    assert [name for name, _ in copied.named_parameters()] == ["weight", "bias"]
    with torch.no_grad():
        copied.weight.zero_()
    assert holder.k.weight.all()


def test_a_fused_module_copied_by_itself_has_no_places() -> None:
    holder = norm_linear()
    plain = holder.fused(x())
    holder.k = Doubled(holder.k)
    copied = copy.deepcopy(holder.fused)
    assert list(copied.places) == []
    assert torch.equal(copied(x()), plain)


def test_a_walk_by_children_meets_what_a_walk_by_names_does() -> None:
    holder = norm_linear()
    assert [name for name, _ in holder.named_children()] == ["fused", "q", "k", "v"]
    assert holder.get_submodule("k") is holder.k
    assert {"q", "k", "v"} <= {name for name, _ in holder.named_modules()}


def test_accelerates_conversion_for_fp8_finds_the_fused_module_only() -> None:
    """It walks down by children, and would exchange each linear layer for a copy that no optimizer knows."""
    walks = FunctionType(
        (lambda module: [name for name, _ in module.named_children()]).__code__,
        {"__name__": convert_model.__module__, "__builtins__": __builtins__},
    )
    for holder in (norm_linear(), copy.deepcopy(norm_linear()), pickle.loads(pickle.dumps(norm_linear()))):
        assert walks(holder) == ["fused"]
        holder.k = Doubled(holder.k)
        assert walks(holder) == ["fused", "k"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("delayed", Alignment(rows=16, features=16)),
        ("float8_block_scaling", Alignment(rows=16, features=16)),
        ("mxfp8", Alignment(rows=32, features=32)),
        ("nvfp4", Alignment(rows=128, features=32)),
    ],
)
def test_each_recipe_has_its_alignment(kind: str, expected: Alignment) -> None:
    kinds = ("delayed", "float8_block_scaling", "mxfp8", "nvfp4", "custom")
    recipe = SimpleNamespace(**{name: lambda name=name: name == kind for name in kinds})
    assert alignment_of(recipe) == expected


def test_an_older_recipe_that_does_not_know_the_newer_kinds_is_fp8() -> None:
    assert alignment_of(SimpleNamespace()) == Alignment(rows=16, features=16)
    custom = SimpleNamespace(custom=lambda: True, quantization_alignment=64)
    assert alignment_of(custom) == Alignment(rows=64, features=16)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 4), (5, 1, 3, 4), (16, 4), (0, 4)])
def test_padded_rows_change_neither_output_nor_gradient(shape: tuple[int, ...]) -> None:
    module = randomized(LayerNormLinear(4, 10, return_layernorm_output=True))
    seen: list[int] = []

    def function(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(rows.shape[:-1].numel())
        out: tuple[Tensor, Tensor] = module(rows)
        return out

    value = x(*shape).requires_grad_()
    expected = module(value)
    expected_gradients = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), [value, module.weight])
    found = with_padded_rows(function, value, 16)
    gradients = torch.autograd.grad(found[0].square().sum() + found[1].sum(), [value, module.weight])
    assert seen[0] % 16 == 0
    for one, other in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        # A norm with two sums, the product and its bias, which is squared; the gradient is a sum over the rows.
        terms = 2 * (2 * 4 + ELEMENTWISE + 4 + 1) + 10 + math.prod(shape[:-1])
        assert_close(one, other, terms=terms)


def test_rows_that_fit_are_not_copied() -> None:
    value = x(2, 8, 4)
    assert missing_rows((2, 8, 4), 16) == 0
    assert with_padded_rows(lambda rows: rows, value, 16) is value
    assert missing_rows((2, 9, 4), 16) == 14


def test_features_that_do_not_fit_are_named() -> None:
    check_features("Linear.weight", {"out_features": 64, "in_features": 32}, 16)
    with pytest.raises(
        UnsupportedError, match=r"(?s)Linear\.weight: .*multiples of 16.*out_features 60, in_features 32"
    ):
        check_features("Linear.weight", {"out_features": 60, "in_features": 32}, 16)
