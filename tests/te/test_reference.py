"""The reference modules against plain formulas and Hugging Face's own modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rounding import ELEMENTWISE, assert_close
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tepatch.errors import UnsupportedError
from tepatch.te.reference import ACTIVATIONS, LayerNorm, LayerNormLinear, LayerNormMLP, Linear, RMSNorm


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": tanh_gelu,
    "qgelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "srelu": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
GATED_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": FORMULAS["gelu"],
    "qgeglu": FORMULAS["qgelu"],
    "reglu": FORMULAS["relu"],
    "sreglu": FORMULAS["srelu"],
    "swiglu": FORMULAS["silu"],
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
}


def test_every_activation_has_a_formula_here() -> None:
    assert set(ACTIVATIONS) == {*FORMULAS, *GATED_FORMULAS}


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_mlp_computes_its_activation_with_the_gate_in_the_first_half(activation: str) -> None:
    mlp = LayerNormMLP(6, 5, normalization="RMSNorm", activation=activation, eps=1e-6)
    randomize(mlp)
    single = torch.randn(2, 3, 6)
    x, at = single.double(), SimpleNamespace(**{name: tensor.double() for name, tensor in mlp.named_parameters()})
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * at.layernorm_weight
    fc1 = normed @ at.fc1_weight.T + at.fc1_bias
    if activation in GATED_FORMULAS:
        assert mlp.fc1_weight.shape == (10, 6)
        middle = GATED_FORMULAS[activation](fc1[..., :5]) * fc1[..., 5:]
    else:
        assert mlp.fc1_weight.shape == (5, 6)
        middle = FORMULAS[activation](fc1)
    # The norm, two products with their biases; what comes before is squared by an activation, at the most.
    terms = 2 * (6 + 7 + ELEMENTWISE) + 6
    assert_close(mlp(single), middle @ at.fc2_weight.T + at.fc2_bias, terms=terms, name=activation)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_norm_is_its_formula_alone_and_before_a_linear(normalization: str, zero_centered: bool) -> None:
    options = {"eps": 0.1, "zero_centered_gamma": zero_centered}
    norm = RMSNorm(6, **options) if normalization == "RMSNorm" else LayerNorm(6, **options)
    linear = LayerNormLinear(6, 4, bias=False, normalization=normalization, return_layernorm_output=True, **options)
    randomize(norm)
    randomize(linear)
    with torch.no_grad():
        linear.layernorm_weight.copy_(norm.weight)
        if isinstance(norm, LayerNorm):
            assert linear.layernorm_bias is not None
            linear.layernorm_bias.copy_(norm.bias)
    single = torch.randn(2, 3, 6)
    x, gamma = single.double(), norm.weight.double() + zero_centered
    if normalization == "RMSNorm":
        expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.1) * gamma
    else:
        centered = x - x.mean(-1, keepdim=True)
        expected = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 0.1) * gamma + norm.bias.double()
    out, normed = linear(single)
    terms = 2 * 6 + ELEMENTWISE  # a LayerNorm has two sums
    assert_close(norm(single), expected, terms=terms, name="norm")
    assert_close(normed, expected, terms=terms, name="returned norm")
    assert_close(out, expected @ linear.weight.double().T, terms=terms + 6, name="linear")


def test_rms_norm_in_float32_is_llamas() -> None:
    ours, llama = RMSNorm(64, eps=1e-6), LlamaRMSNorm(64, eps=1e-6)
    randomize(ours)
    llama.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 64)
    assert torch.equal(ours(x), llama(x))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_in_bfloat16_is_computed_in_float32_and_rounded_once(kind: type[RMSNorm | LayerNorm]) -> None:
    low, full = kind(64, dtype=torch.bfloat16), kind(64)
    randomize(low)
    full.load_state_dict(low.state_dict())
    x = torch.randn(8, 64).bfloat16()
    assert torch.equal(low(x), full(x.float()).bfloat16())


def test_a_norm_gives_the_dtype_of_its_weight() -> None:
    assert RMSNorm(4, dtype=torch.bfloat16)(torch.randn(4)).dtype == torch.bfloat16
    assert LayerNorm(4, dtype=torch.bfloat16)(torch.randn(4)).dtype == torch.bfloat16


def test_a_norm_spans_all_the_dimensions_of_its_shape() -> None:
    x = torch.randn(3, 2, 4)
    ours = RMSNorm((2, 4), eps=0.0)
    assert ours.weight.shape == (2, 4)
    exact = x.double()
    exact = exact / (exact * exact).mean((1, 2), keepdim=True).sqrt()
    assert_close(ours(x), exact, terms=2 * 4 + ELEMENTWISE, name="two dimensions")


def test_an_activation_in_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    options = {"normalization": "RMSNorm", "activation": "swiglu", "params_dtype": torch.bfloat16}
    mlp = LayerNormMLP(8, 8, bias=False, **options)
    randomize(mlp)
    with torch.no_grad():
        mlp.fc2_weight.copy_(torch.eye(8))
    x = torch.randn(16, 8).bfloat16()
    fc1 = F.linear(mlp.normed(x), mlp.fc1_weight).float()
    assert torch.equal(mlp(x), (F.silu(fc1[..., :8]) * fc1[..., 8:]).bfloat16())


def test_a_swiglu_mlp_is_llamas_norm_and_mlp_with_gate_and_up_stacked() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48)
    llama, norm = LlamaMLP(config), LlamaRMSNorm(32, eps=1e-6)
    randomize(norm, seed=1)
    ours = LayerNormMLP(32, 48, eps=1e-6, bias=False, normalization="RMSNorm", activation="swiglu")
    ours.load_state_dict(
        {
            "layernorm_weight": norm.weight,
            "fc1_weight": torch.cat((llama.gate_proj.weight, llama.up_proj.weight)),
            "fc2_weight": llama.down_proj.weight,
        }
    )
    x = torch.randn(2, 7, 32)
    expected = llama.double()(norm.double()(x.double()))
    assert_close(ours(x), expected, terms=32 + 32 + 48 + ELEMENTWISE, name="LlamaMLP")


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "glu", "qgelu", "srelu"])
def test_the_gradients_of_an_mlp_are_those_of_finite_differences(activation: str, normalization: str) -> None:
    mlp = LayerNormMLP(3, 4, normalization=normalization, activation=activation, params_dtype=torch.float64)
    randomize(mlp)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(inp: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in mlp.named_parameters()]
        out = torch.func.functional_call(mlp, dict(zip(names, parameters, strict=True)), inp)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(run, (x, *mlp.parameters()))


def test_a_linear_is_a_matrix_product() -> None:
    linear = Linear(3, 4)
    randomize(linear)
    x = torch.randn(2, 3)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert Linear(3, 4, bias=False).bias is None


def test_new_parameters_are_those_of_te() -> None:
    torch.manual_seed(0)
    mlp = LayerNormMLP(256, 256)
    for weight in (mlp.fc1_weight, mlp.fc2_weight, Linear(256, 256).weight):
        assert abs(weight.std().item() - 0.023) < 1e-3
    for shift in (mlp.layernorm_bias, mlp.fc1_bias, mlp.fc2_bias):
        assert shift is not None
        assert not shift.any()
    assert (mlp.layernorm_weight == 1).all()
    assert not LayerNormLinear(4, 4, zero_centered_gamma=True).layernorm_weight.any()
    assert not RMSNorm(4, zero_centered_gamma=True).weight.any()


def test_init_methods_fill_the_weights_they_are_given_for() -> None:
    def ones(weight: Tensor) -> None:
        weight.fill_(1)

    def twos(weight: Tensor) -> None:
        weight.fill_(2)

    mlp = LayerNormMLP(2, 3, init_method=ones, output_layer_init_method=twos)
    assert (mlp.fc1_weight == 1).all()
    assert (mlp.fc2_weight == 2).all()
    assert (LayerNormLinear(2, 3, init_method=twos).weight == 2).all()
    assert (Linear(2, 3, init_method=twos).weight == 2).all()


def test_parameters_take_the_default_dtype_where_none_is_given() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        made = [Linear(2, 2), LayerNormLinear(2, 2), LayerNormMLP(2, 2), RMSNorm(2), LayerNorm(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for module in made for p in module.parameters()} == {torch.float64}
    assert LayerNormMLP(2, 2, params_dtype=torch.bfloat16).fc1_weight.dtype == torch.bfloat16


def test_a_module_built_on_meta_is_not_initialised_and_takes_a_state_dict() -> None:
    def refuse(weight: Tensor) -> None:
        raise AssertionError("a meta tensor was initialised")

    mlp = LayerNormMLP(4, 6, init_method=refuse, output_layer_init_method=refuse, device="meta")
    assert mlp.fc1_weight.is_meta
    real = LayerNormMLP(4, 6)
    mlp.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 4)
    assert torch.equal(mlp(x), real(x))


def test_an_unknown_activation_or_normalization_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)activation.*swiglu.*'clamped_swiglu'"):
        LayerNormMLP(4, 4, activation="clamped_swiglu")
    with pytest.raises(UnsupportedError, match="BatchNorm"):
        LayerNormLinear(4, 4, normalization="BatchNorm")


def test_an_argument_that_the_reference_does_not_have_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="parallel_mode"):
        Linear(4, 4, parallel_mode="column")  # type: ignore[call-arg]


def test_modules_say_what_they_are() -> None:
    assert repr(LayerNormMLP(4, 6, activation="swiglu")) == "LayerNormMLP(4, 6, LayerNorm, swiglu, bias=True)"
    assert repr(LayerNormLinear(4, 6, bias=False)) == "LayerNormLinear(4, 6, LayerNorm, bias=False)"
    assert repr(Linear(4, 6)) == "Linear(4, 6, bias=True)"
    assert repr(RMSNorm(4)) == "RMSNorm((4,), eps=1e-05, zero_centered_gamma=False)"
