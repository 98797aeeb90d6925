"""Transformer Engine against the reference, live on a GPU: outputs and gradients of every module.

Both get the same values. The reference computes in float32 whatever the dtype under test, so an error is
Transformer Engine's rounding and nothing else. Errors are relative, in the Euclidean norm, and are printed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tepatch.te import Modules, probe, resolve
from tepatch.te.reference import ACTIVATIONS
from tepatch.te.reference.masks import Window

pytestmark = [
    pytest.mark.gpu,
    # Transformer Engine compiles its bias-GELU with torch.compile, whose own import of torch.jit warns.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # Said once by torch when the first matrix product of a process is one of a backward pass.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
]

HIDDEN, FFN, TOKENS = 256, 384, (4, 128)
# Transformer Engine may multiply float32 matrices in TF32, which keeps 10 bits of mantissa.
FORWARD = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 4e-3, torch.bfloat16: 2e-2}
# The gradient of a relu jumps at 0, so an input that rounding carries across counts in full: of inputs with
# a relative error of 1e-3 about one in three thousand crosses, and the error of the whole is its root.
KINKED = {"relu": 5e-2, "reglu": 5e-2}


@pytest.fixture
def te() -> Modules:
    torch.manual_seed(0)
    return resolve("te")


def randomize(module: nn.Module) -> None:
    """Give weights that keep activations near unit size, and norms and biases that are not trivial."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn_like(parameter, dtype=torch.float32)
            is_matrix = parameter.dim() == 2
            values *= parameter.shape[-1] ** -0.5 if is_matrix else 0.2
            if name in ("layernorm_weight", "weight") and not is_matrix:
                values += 1
            parameter.copy_(values)


def float32_twin(kind: str, args: dict[str, Any], module: nn.Module) -> nn.Module:
    """Build the reference module in float32 with the values of a Transformer Engine module."""
    args = {name: value for name, value in args.items() if not name.endswith("dtype")}
    twin: nn.Module = getattr(resolve("reference"), kind)(**args, device="cuda")
    values = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    twin.load_state_dict(values)
    return twin


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def check(errors: dict[str, float], bounds: dict[str, float], label: str) -> None:
    print(f"\n{label}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    wrong = {name: error for name, error in errors.items() if not error <= bounds[name]}
    assert not wrong, f"{label}: {wrong} over {bounds}"


def compare_layers(
    te: Modules,
    kind: str,
    args: dict[str, Any],
    dtype: torch.dtype,
    *,
    forward: float | None = None,
    backward: float | None = None,
) -> None:
    forward, backward = forward or FORWARD[dtype], backward or BACKWARD[dtype]
    dtype_argument = "dtype" if kind in ("RMSNorm", "LayerNorm") else "params_dtype"
    args = {**args, dtype_argument: dtype}
    module = getattr(te, kind)(**args)
    randomize(module)
    twin = float32_twin(kind, args, module)
    x = torch.randn(*TOKENS, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    twin_x = x.detach().float().requires_grad_()

    # LayerNormLinear may return the normed input as well.
    outputs, expected = (out if isinstance(out, tuple) else (out,) for out in (module(x), twin(twin_x)))
    errors = {f"out{i}": relative_error(*pair) for i, pair in enumerate(zip(outputs, expected, strict=True))}
    bounds = dict.fromkeys(errors, forward)

    upstream = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, [gradient.float() for gradient in upstream])
    named = {"inp": (x, twin_x)}
    twins = dict(twin.named_parameters())
    named |= {name: (parameter, twins[name]) for name, parameter in module.named_parameters()}
    for name, (ours, theirs) in named.items():
        assert ours.grad is not None
        assert theirs.grad is not None
        errors[f"d_{name}"] = relative_error(ours.grad, theirs.grad)
        bounds[f"d_{name}"] = backward
    details = ", ".join(str(value) for value in args.values())
    check(errors, bounds, f"{kind}({details})")


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
normalizations = pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
zero_centering = pytest.mark.parametrize("zero_centered", [False, True], ids=["gamma", "1+gamma"])


@both_dtypes
@zero_centering
@normalizations
def test_a_norm_is_the_reference(te: Modules, normalization: str, zero_centered: bool, dtype: torch.dtype) -> None:
    args = {"normalized_shape": HIDDEN, "eps": 1e-5, "zero_centered_gamma": zero_centered}
    bound = 1e-5 if dtype == torch.float32 else None  # it multiplies no matrices
    compare_layers(te, normalization, args, dtype, forward=bound, backward=bound)


@both_dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_linear_is_the_reference(te: Modules, bias: bool, dtype: torch.dtype) -> None:
    compare_layers(te, "Linear", {"in_features": HIDDEN, "out_features": FFN, "bias": bias}, dtype)


@both_dtypes
@zero_centering
@normalizations
@pytest.mark.parametrize("returns_norm", [False, True], ids=["", "and norm"])
def test_a_norm_and_linear_is_the_reference(
    te: Modules, returns_norm: bool, normalization: str, zero_centered: bool, dtype: torch.dtype
) -> None:
    args = {
        "in_features": HIDDEN,
        "out_features": FFN,
        "normalization": normalization,
        "zero_centered_gamma": zero_centered,
        "return_layernorm_output": returns_norm,
    }
    compare_layers(te, "LayerNormLinear", args, dtype)


@both_dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_mlp_is_the_reference(te: Modules, activation: str, bias: bool, dtype: torch.dtype) -> None:
    args = {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "normalization": "RMSNorm",
        "activation": activation,
        "bias": bias,
    }
    compare_layers(te, "LayerNormMLP", args, dtype, backward=KINKED.get(activation))


@both_dtypes
@zero_centering
@normalizations
def test_the_norm_of_an_mlp_is_the_reference(
    te: Modules, normalization: str, zero_centered: bool, dtype: torch.dtype
) -> None:
    args = {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "normalization": normalization,
        "activation": "swiglu",
        "zero_centered_gamma": zero_centered,
    }
    compare_layers(te, "LayerNormMLP", args, dtype)


def right_padding(lengths: list[int], size: int) -> Tensor:
    ends = torch.tensor(lengths, device="cuda").unsqueeze(1)
    return (torch.arange(size, device="cuda") >= ends).view(-1, 1, 1, size)


def compare_attention(
    te: Modules,
    args: dict[str, Any],
    dtype: torch.dtype,
    *,
    lengths: tuple[int, int],
    mask: Tensor | tuple[Tensor, Tensor] | None = None,
    real_queries: Tensor | None = None,
    lay: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors,
) -> None:
    """Compare outputs and gradients; ``real_queries`` [b, s_q] marks the rows that are not padding."""
    heads, groups = args["num_attention_heads"], args["num_gqa_groups"]
    args = {"kv_channels": 64, "qkv_format": "bshd", **args}
    num_queries, num_keys = lengths
    sizes = ((num_queries, heads), (num_keys, groups), (num_keys, groups))
    ours = [
        torch.randn(4, length, count, 64, device="cuda", dtype=dtype, requires_grad=True) for length, count in sizes
    ]
    theirs = [tensor.detach().float().requires_grad_() for tensor in ours]
    out = te.DotProductAttention(**args)(*lay(ours), attention_mask=mask)
    expected = resolve("reference").DotProductAttention(**args)(*theirs, mask)

    # What comes out at a padded query is nobody's: neither compared, nor given a gradient.
    everything = torch.ones(out.shape[:2], dtype=torch.bool, device="cuda")
    keep = everything if real_queries is None else real_queries
    upstream = torch.randn_like(out) * keep.unsqueeze(-1)
    gradients = torch.autograd.grad(out, ours, upstream)
    expected_gradients = torch.autograd.grad(expected, theirs, upstream.float())

    errors = {"out": relative_error(out[keep], expected[keep])}
    bounds = {"out": FORWARD[dtype]}
    for name, gradient, wanted in zip(("d_q", "d_k", "d_v"), gradients, expected_gradients, strict=True):
        errors[name] = relative_error(gradient, wanted)
        bounds[name] = BACKWARD[dtype]
    details = ", ".join(f"{name}={value}" for name, value in args.items())
    check(errors, bounds, f"DotProductAttention({details}), {lengths}, {dtype}")


group_counts = pytest.mark.parametrize("groups", [8, 2, 1], ids=["mha", "gqa", "mqa"])


@both_dtypes
@group_counts
@pytest.mark.parametrize(
    ("mask_type", "lengths", "window"),
    [
        ("no_mask", (128, 128), None),
        ("no_mask", (1, 128), (-1, -1)),
        ("no_mask", (1, 128), (31, 0)),
        ("causal", (128, 128), None),
        ("causal", (128, 128), (31, 0)),
        ("causal_bottom_right", (1, 128), None),
        ("causal_bottom_right", (64, 128), None),
        ("causal_bottom_right", (64, 128), (31, 0)),
    ],
)
def test_attention_without_padding_is_the_reference(
    te: Modules,
    mask_type: str,
    lengths: tuple[int, int],
    window: Window | None,
    groups: int,
    dtype: torch.dtype,
) -> None:
    args = {
        "num_attention_heads": 8,
        "num_gqa_groups": groups,
        "attn_mask_type": mask_type,
        "window_size": window,
    }
    compare_attention(te, args, dtype, lengths=lengths)


@both_dtypes
@pytest.mark.parametrize("mask_type", ["padding", "padding_causal"])
def test_attention_with_padding_is_the_reference(te: Modules, mask_type: str, dtype: torch.dtype) -> None:
    args = {"num_attention_heads": 8, "num_gqa_groups": 2, "attn_mask_type": mask_type}
    mask = right_padding([128, 100, 64, 7], 128)
    compare_attention(te, args, dtype, lengths=(128, 128), mask=mask, real_queries=~mask[:, 0, 0])


@both_dtypes
@pytest.mark.parametrize("mask_type", ["padding", "padding_causal_bottom_right"])
def test_cross_attention_with_padding_is_the_reference(te: Modules, mask_type: str, dtype: torch.dtype) -> None:
    args = {
        "num_attention_heads": 8,
        "num_gqa_groups": 2,
        "attn_mask_type": mask_type,
        "attention_type": "cross",
    }
    queries, keys = right_padding([64, 50, 1, 7], 64), right_padding([128, 100, 64, 7], 128)
    compare_attention(te, args, dtype, lengths=(64, 128), mask=(queries, keys), real_queries=~queries[:, 0, 0])


@both_dtypes
@group_counts
def test_attention_under_an_arbitrary_mask_is_the_reference(te: Modules, groups: int, dtype: torch.dtype) -> None:
    args = {"num_attention_heads": 8, "num_gqa_groups": groups, "attn_mask_type": "arbitrary"}
    mask = torch.rand(4, 1, 128, 128, device="cuda") < 0.5
    mask[..., 0] = False  # every row keeps a key
    compare_attention(te, args, dtype, lengths=(128, 128), mask=mask)


def as_a_cache_gives_them(tensors: list[Tensor]) -> list[Tensor]:
    """Keys and values as Hugging Face's caches hold them: [b, h, s, d] in memory, seen as [b, s, h, d]."""
    query, *cached = tensors
    return [query, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in cached)]


def as_one_projection_gives_them(tensors: list[Tensor]) -> list[Tensor]:
    """Query, key and value as views of one tensor, the output of a fused projection."""
    return list(torch.cat(tensors, dim=2).split([t.shape[2] for t in tensors], dim=2))


@both_dtypes
@pytest.mark.parametrize(
    ("mask_type", "lengths", "lay"),
    [
        ("no_mask", (1, 128), as_a_cache_gives_them),
        ("causal_bottom_right", (64, 128), as_a_cache_gives_them),
        ("causal", (128, 128), as_a_cache_gives_them),
        ("causal", (128, 128), as_one_projection_gives_them),
    ],
)
def test_attention_does_not_depend_on_how_its_tensors_lie_in_memory(
    te: Modules,
    mask_type: str,
    lengths: tuple[int, int],
    lay: Callable[[list[Tensor]], list[Tensor]],
    dtype: torch.dtype,
) -> None:
    args = {"num_attention_heads": 8, "num_gqa_groups": 2, "attn_mask_type": mask_type}
    compare_attention(te, args, dtype, lengths=lengths, lay=lay)


@both_dtypes
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_attention_with_its_own_softmax_scale_is_the_reference(te: Modules, scale: float, dtype: torch.dtype) -> None:
    args = {"num_attention_heads": 8, "num_gqa_groups": 2, "softmax_scale": scale}
    compare_attention(te, args, dtype, lengths=(128, 128))


@both_dtypes
def test_attention_with_capped_scores_is_the_reference(te: Modules, dtype: torch.dtype) -> None:
    if tuple(map(int, (probe().version or "0.0").split(".")[:2])) < (2, 20):
        pytest.skip("Transformer Engine has softcap from 2.20 on")
    args = {"num_attention_heads": 8, "num_gqa_groups": 2, "softcap": 5.0}
    compare_attention(te, args, dtype, lengths=(128, 128))


def test_te_modules_are_built_on_meta_in_a_meta_context_and_else_on_the_gpu(te: Modules) -> None:
    def build() -> list[nn.Module]:
        return [
            te.Linear(16, 16),
            te.LayerNormLinear(16, 16),
            te.LayerNormMLP(16, 16),
            te.RMSNorm(16),
            te.LayerNorm(16),
        ]

    with torch.device("meta"):
        deferred = build()
    assert {p.device.type for module in deferred for p in module.parameters()} == {"meta"}
    assert {p.device.type for module in build() for p in module.parameters()} == {"cuda"}


def test_te_modules_take_the_default_dtype_where_none_is_given(te: Modules) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = [te.LayerNormLinear(16, 16), te.RMSNorm(16)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for module in made for p in module.parameters()} == {torch.bfloat16}
    assert te.Linear(16, 16, params_dtype=torch.float16).weight.dtype == torch.float16
