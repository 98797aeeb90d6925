"""Experts compute what Hugging Face's compute, with the parameters that Hugging Face has, on either backend."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import ELEMENTWISE, assert_close
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as hf

from tepatch.errors import UnsupportedError
from tepatch.te import resolve, use_backend
from tepatch.te.experts import Experts, MixtureOfExperts, mixture_of_experts
from tepatch.te.nvidia import engine
from tepatch.te.reference.grouped import permute, unpermute

EXPERTS, HIDDEN, FFN = 5, 16, 24
TERMS = HIDDEN + FFN + EXPERTS + ELEMENTWISE
"""That are added in two products, and over a token's experts."""
BACK = HIDDEN + 2 * 32 + 37
"""And on the way back: through both products, of 32 rows at the most, and over 37 tokens at the most."""


@pytest.fixture
def config() -> MixtralConfig:
    return MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2, rms_norm_eps=0.1
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator(parameter.numel()), dtype=torch.float64)
            parameter.copy_(noise * 0.3 + (parameter.dim() == 1))


def tokens(count: int = 11, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, HIDDEN, generator=generator(), dtype=torch.float64).to(dtype).requires_grad_()


def routing(count: int = 11, k: int = 2, *, of: int = EXPERTS - 1) -> tuple[Tensor, Tensor]:
    """Experts (never the last ones) and weights of tokens, ``[count, k]``."""
    scores = torch.rand(count, of, generator=generator(1), dtype=torch.float64)
    weights, index = scores.topk(k, dim=-1)
    return index, weights.requires_grad_()


def both(config: MixtralConfig) -> tuple[Experts, Any]:
    """Ours, of the reference backend, and Hugging Face's, with the same values in float64."""
    with use_backend("reference"):
        ours = Experts(EXPERTS, HIDDEN, FFN).double()
    config._experts_implementation = "eager"
    theirs = hf.MixtralExperts(config).double()  # type: ignore[no-untyped-call]
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    return ours, theirs


@pytest.mark.parametrize("k", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_stock_experts(k: int, config: MixtralConfig) -> None:
    found = []
    for experts in both(config):
        x, (index, weights) = tokens(), routing(k=k)
        out = experts(x, index, weights)
        out.backward(torch.randn(out.shape, generator=generator(2), dtype=out.dtype))
        found.append([out, x.grad, weights.grad, *(p.grad for p in experts.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, terms=TERMS + BACK)


def test_an_expert_without_tokens_has_a_gradient_of_zeros(config: MixtralConfig) -> None:
    experts, _ = both(config)
    index, weights = routing()
    experts(tokens(), index, weights).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[-1].any()
        assert parameter.grad[0].any()


def test_no_tokens_at_all_give_no_rows(config: MixtralConfig) -> None:
    experts, _ = both(config)
    index, weights = routing(0)
    assert experts(tokens(0), index, weights).shape == (0, HIDDEN)


def test_rows_lie_by_expert_and_come_back_to_their_tokens() -> None:
    x, (index, weights) = tokens(), routing()
    rows, order = permute(x, index)
    assert torch.equal(index.flatten()[order], index.flatten().sort().values)
    assert_close(unpermute(rows, order, weights), x * weights.sum(-1, keepdim=True), terms=4)


def test_a_sum_over_experts_is_rounded_once() -> None:
    """Weights are float32: in bfloat16 these would be 1, and the sum 192."""
    rows = torch.full((3, 1), 64, dtype=torch.bfloat16)
    out = unpermute(rows, torch.arange(3), torch.full((1, 3), 1 + 2**-8))
    assert out.item() == 193
    assert out.dtype == torch.bfloat16


def test_the_mixture_is_the_stock_block(config: MixtralConfig) -> None:
    ours, norm, block = mixture_and_stock(config)
    x = torch.randn(2, 7, HIDDEN, generator=generator())
    normed = norm(x)
    expected = block.double()(normed.double())
    assert_close(
        ours(normed), expected, terms=HIDDEN + ELEMENTWISE + HIDDEN + TERMS
    )  # the norm, and the router's scores


def test_jitter_is_that_of_the_stock_block_and_in_training_only(config: MixtralConfig) -> None:
    config.router_jitter_noise = 0.5
    ours, norm, block = mixture_and_stock(config)
    x = torch.randn(2, 7, HIDDEN, generator=generator())
    for training in (True, False):
        out = []
        for module in (ours.train(training), block.train(training)):
            torch.manual_seed(5)
            out.append(module(norm(x)))
        assert_close(*out, terms=HIDDEN + ELEMENTWISE + HIDDEN + TERMS)
        assert (torch.rand(1) == torch.rand(1, generator=generator(5))).item() is not training


def mixture_and_stock(config: MixtralConfig) -> tuple[MixtureOfExperts, nn.Module, nn.Module]:
    config._experts_implementation = "eager"
    with use_backend("reference"):
        ours = mixture_of_experts(
            config,
            hf.MixtralTopKRouter(config),  # type: ignore[no-untyped-call]
            num_experts=EXPERTS,
            intermediate_size=FFN,
            jitter_noise=config.router_jitter_noise,
        )
    randomize(ours)
    norm = hf.MixtralRMSNorm(HIDDEN, eps=config.rms_norm_eps)  # type: ignore[no-untyped-call]
    randomize(norm)
    block = hf.MixtralSparseMoeBlock(config)  # type: ignore[no-untyped-call]
    block.load_state_dict(ours.state_dict())
    return ours, norm, block


def test_a_mixture_has_values_before_anything_is_loaded(config: MixtralConfig) -> None:
    gate = hf.MixtralTopKRouter(config)  # type: ignore[no-untyped-call]
    nn.init.constant_(gate.weight, float("nan"))  # its constructor leaves memory as it was
    config.initializer_range = 0.5
    with use_backend("reference"):
        mixture = mixture_of_experts(config, gate, num_experts=EXPERTS, intermediate_size=FFN)
    for parameter in (gate.weight, mixture.experts.gate_up_proj, mixture.experts.down_proj):
        assert 0.4 < parameter.std() < 0.6


def test_an_activation_that_the_kernels_lack_is_refused(config: MixtralConfig) -> None:
    config.hidden_act = "gelu"
    gate = hf.MixtralTopKRouter(config)  # type: ignore[no-untyped-call]
    with use_backend("reference"), pytest.raises(UnsupportedError, match="no gated activation"):
        mixture_of_experts(config, gate, num_experts=EXPERTS, intermediate_size=FFN)


def test_on_the_meta_device_experts_have_shapes_only() -> None:
    with use_backend("reference"), torch.device("meta"):
        experts = Experts(EXPERTS, HIDDEN, FFN)
    shapes = {name: (parameter.is_meta, list(parameter.shape)) for name, parameter in experts.named_parameters()}
    expected = {"gate_up_proj": [EXPERTS, 2 * FFN, HIDDEN], "down_proj": [EXPERTS, HIDDEN, FFN]}
    assert shapes == {name: (True, shape) for name, shape in expected.items()}


def test_experts_can_be_copied_and_pickled(config: MixtralConfig) -> None:
    experts, _ = both(config)
    x, (index, weights) = tokens(), routing()
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other(x, index, weights), experts(x, index, weights))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at tensors
def test_a_compiled_mixture_is_compiled_once_however_tokens_are_routed(config: MixtralConfig) -> None:
    ours, _, _ = mixture_and_stock(config)
    compiled = torch.compile(ours, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = torch.randn(2, 7, HIDDEN, generator=generator(seed))
            assert torch.equal(compiled(x), ours(x))


# Transformer Engine's way, on a stand-in for its modules.


class GroupedLinear(nn.Module):
    """As Transformer Engine's: a parameter for each expert, found by its name in the forward pass."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        assert (bias, device) == (False, "meta")  # no memory is taken for parameters that are another's
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            self.register_parameter(f"weight{index}", weight)
        self.splits: list[list[int]] = []

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        self.splits.append(m_splits)
        parts = inp.split(m_splits)  # type: ignore[no-untyped-call]
        return torch.cat([F.linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(parts)])


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int) -> None:
        super().__init__()
        self.align_size = align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        missing = [-count % self.align_size for count in m_splits]
        parts = zip(inp.split(m_splits), missing, strict=True)  # type: ignore[no-untyped-call]
        padded = [count + more for count, more in zip(m_splits, missing, strict=True)]
        return torch.cat([F.pad(part, (0, 0, 0, more)) for part, more in parts]), padded


class Fp8Unpadding(Fp8Padding):
    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:  # type: ignore[override]
        padded = [count + -count % self.align_size for count in m_splits]
        parts = zip(inp.split(padded), m_splits, strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([part[:count] for part, count in parts])


class Recipe:
    def mxfp8(self) -> bool:
        return False


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The experts of ``both`` with the engine's functions over the stand-in; ``te.recipe`` is what is in force."""
    state = SimpleNamespace(recipe=None)
    package: Any = ModuleType("transformer_engine.pytorch")
    package.GroupedLinear, package.Fp8Padding, package.Fp8Unpadding = GroupedLinear, Fp8Padding, Fp8Unpadding
    quantization: Any = ModuleType("transformer_engine.pytorch.quantization")
    quantization.FP8GlobalStateManager = SimpleNamespace(
        is_fp8_enabled=lambda: state.recipe is not None, get_fp8_recipe=lambda: state.recipe
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, quantization.__name__, quantization)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", ModuleType("transformer_engine_torch"))
    return state


def grouped(experts: Experts, rows: Tensor, counts: Sequence[int]) -> list[Tensor | None]:
    """The output of a pass through the engine and back, and the gradients of rows and parameters."""
    rows = rows.detach().requires_grad_()
    for parameter in experts.parameters():
        parameter.grad = None
    out = engine.grouped_mlp(experts, rows, counts)
    out.backward(torch.randn(out.shape, generator=generator(2), dtype=out.dtype))
    return [out, rows.grad, *(parameter.grad for parameter in experts.parameters())]


def test_grouped_products_of_slices_have_their_gradients_in_the_whole(
    te: SimpleNamespace, config: MixtralConfig
) -> None:
    experts, _ = both(config)
    counts = [4, 0, 5, 2, 0]
    ours = grouped(experts, tokens(), counts)
    rows = tokens()
    for parameter in experts.parameters():
        parameter.grad = None
    expected = resolve("reference").grouped_mlp(experts, rows, counts)
    expected.backward(torch.randn(expected.shape, generator=generator(2), dtype=expected.dtype))
    theirs = [expected, rows.grad, *(parameter.grad for parameter in experts.parameters())]
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, terms=TERMS + BACK)


def test_a_step_follows_the_parameters_and_keeps_nothing_of_them(te: SimpleNamespace, config: MixtralConfig) -> None:
    experts, _ = both(config)
    counts = [4, 0, 5, 2, 0]
    first = engine.grouped_mlp(experts, tokens(), counts)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach() * 2)  # as when a model moves
    assert not torch.equal(engine.grouped_mlp(experts, tokens(), counts), first)
    for step in experts.__dict__["_steps"].values():
        assert not list(step.parameters())
    assert list(experts.state_dict()) == ["gate_up_proj", "down_proj"]
    assert not copy.deepcopy(experts).__dict__["_steps"]


def test_rows_are_padded_for_each_expert_where_products_are_quantized(
    te: SimpleNamespace, config: MixtralConfig
) -> None:
    with use_backend("reference"):
        experts = Experts(EXPERTS, HIDDEN, 32).double()
    randomize(experts)
    counts = [4, 0, 16, 17, 0]
    plain = grouped(experts, tokens(37), counts)
    te.recipe = Recipe()
    padded = grouped(experts, tokens(37), counts)
    for step in experts.__dict__["_steps"].values():
        assert step.splits == [counts, [16, 0, 16, 32, 0]]
    for one, other in zip(plain, padded, strict=True):
        assert_close(one, other, terms=TERMS + BACK)


def test_sizes_that_a_quantized_format_can_not_take_are_refused(te: SimpleNamespace, config: MixtralConfig) -> None:
    experts, _ = both(config)
    te.recipe = Recipe()
    with pytest.raises(UnsupportedError, match="ffn_hidden_size 24"):
        engine.grouped_mlp(experts, tokens(), [11, 0, 0, 0, 0])


# Transformer Engine itself.


def errors(found: Sequence[Any], expected: Sequence[Any]) -> list[float]:
    """Relative errors, in the Euclidean norm."""
    pairs = zip(found, expected, strict=True)
    out = [float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()) for a, b in pairs]
    print(f"\nout, weights, x, gate_up, down: {', '.join(f'{error:.1e}' for error in out)}")
    return out


def passed_through(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> list[Tensor | None]:
    """The output and the gradients of weights, input and parameters."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts(x, index, weights)
    out.backward(torch.randn(out.shape, generator=generator(2)).to(out))
    return [out, weights.grad, x.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast", "Float8CurrentScaling", "DelayedScaling"])
@pytest.mark.parametrize("count", [1, 333])
def test_transformer_engine_computes_the_reference(precision: str, count: int) -> None:
    """With experts that have no tokens, and numbers of rows that no kernel for 8 bits would take."""
    dtype = torch.float32 if precision in ("float32", "autocast") else torch.bfloat16
    torch.manual_seed(0)
    with use_backend("te"):
        ours = Experts(8, 256, 384)
    with use_backend("reference"), torch.device("cuda"):
        theirs = Experts(8, 256, 384)
    with torch.no_grad():
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.copy_(torch.randn_like(one) * one.shape[-1] ** -0.5)
            one.data = one.data.to(dtype)
            other.copy_(one)
    index, weights = (each.cuda() for each in routing(count, 2, of=6))
    weights = weights.float()
    x = torch.randn(count, 256, device="cuda").to(dtype)
    expected = passed_through(theirs, x.float(), index, weights)
    if precision.endswith("Scaling"):
        import transformer_engine.pytorch as te_package
        from transformer_engine.common import recipe

        for _ in range(2):  # delayed scaling has its scales after the first step
            ours.zero_grad()
            with te_package.autocast(enabled=True, recipe=getattr(recipe, precision)()):
                found = passed_through(ours, x, index, weights)
        # Rounding to 3 bits of mantissa is off by at most 2^-4, to 2 bits (gradients) by 2^-3: over the square root of
        # 3 on average, in quadrature for the two operands of each of the products that a result goes through.
        forward, backward = 0.1, 0.2
    else:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            found = passed_through(ours, x, index, weights)
        forward, backward = (2e-3, 4e-3) if precision == "float32" else (1e-2, 2e-2)  # as in test_parity_gpu
    for error, limit in zip(errors(found, expected), [forward, *[backward] * 4], strict=True):
        assert error <= limit
    assert not any(parameter.grad[6:].any() for parameter in ours.parameters() if parameter.grad is not None)
