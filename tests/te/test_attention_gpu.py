"""Attention by every layout on Transformer Engine, against the reference in float32, and on which kernels it ran.

Transformer Engine's unfused attention is switched off wherever a fused kernel has to do it: without one it is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tepatch.te import Modules, resolve
from tepatch.te.attention import attend
from tepatch.te.rope import Float32Rotary, apply_rotary
from tepatch.te.sequences import EMPTY, Dense, Masked, Varlen, layout_of, visible

pytestmark = pytest.mark.gpu

HEADS, GROUPS, CHANNELS, KEYS = 8, 2, 64, 256
# bfloat16 keeps 8 bits; measured 2.0e-3 to 2.3e-3 fused and 3.7e-3 to 4.8e-3 unfused (docs/gpu-runs.md).
FORWARD, BACKWARD = 6e-3, 1e-2


def rows(*make: Callable[[Tensor], None]) -> Tensor:
    mask = torch.ones(len(make), KEYS, dtype=torch.int32)
    for row, change in zip(mask, make, strict=True):
        change(row)
    return mask[:, None, None].cuda()


def plain(row: Tensor) -> None:
    pass


def left(count: int) -> Callable[[Tensor], None]:
    def pad(row: Tensor) -> None:
        row[:count] = 0

    return pad


def right(count: int) -> Callable[[Tensor], None]:
    def pad(row: Tensor) -> None:
        row[KEYS - count :] = 0

    return pad


def hole(row: Tensor) -> None:
    row[50:60] = 0


def packed(row: Tensor) -> None:
    row[100:] = 2
    row[230:] = 3


def with_room(change: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def both(row: Tensor) -> None:
        change(row)
        row[200:] = EMPTY

    return both


MASKS = {
    "none": None,
    "left padding": lambda: rows(plain, left(100), left(255), left(3)),
    "right padding": lambda: rows(plain, right(100), right(255), right(3)),
    "holes": lambda: rows(plain, hole, left(7), hole),
    "packed": lambda: rows(packed, plain, packed, packed),
    "static cache": lambda: rows(*[with_room(plain)] * 4),
    "static cache, left padding": lambda: rows(with_room(plain), with_room(left(9)), with_room(left(150)), plain_room),
}


def plain_room(row: Tensor) -> None:
    row[200:] = EMPTY


@pytest.fixture
def te() -> Modules:
    torch.manual_seed(0)
    return resolve("te")


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("num_queries", [1, 64, KEYS])
@pytest.mark.parametrize("name", MASKS)
def test_every_layout_is_the_reference_on_a_fused_kernel(
    te: Modules, name: str, num_queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = None if MASKS[name] is None else MASKS[name]()
    if "static" in name and num_queries == KEYS:
        num_queries = 200
    layout = layout_of(mask, num_queries, KEYS, window=window)
    is_fused = isinstance(layout, Dense) or (isinstance(layout, Varlen) and layout.holes is None)
    assert is_fused or name == "holes"  # what is read between tokens is computed by a mask
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0" if is_fused else "1")
    query = torch.randn(4, num_queries, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(4, KEYS, GROUPS, CHANNELS, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
    )
    core = te.DotProductAttention(HEADS, CHANNELS, num_gqa_groups=GROUPS, qkv_format="bshd", attn_mask_type="causal")
    exact = resolve("reference").DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    numbers = torch.ones(4, 1, 1, KEYS, dtype=torch.int32, device="cuda") if mask is None else mask
    seen = visible(numbers, num_queries, window)
    slots = torch.nn.functional.pad(numbers[:, 0, 0], (0, 1))
    first = int((slots[0, :-1] != EMPTY).sum()) - num_queries
    token, following = (slots[:, start : start + num_queries] > 0 for start in (first, first + 1))
    following[:, -1] = False
    keep = ((token | following) & seen.any(-1)[:, 0])[:, :, None]

    out = attend(core, query, key, value, layout, window)
    wide = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    expected = attend(exact, *wide, Masked(seen))

    upstream = torch.randn_like(out) * keep
    gradients = torch.autograd.grad(out, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.float())
    errors = [relative(out * keep, expected * keep), *(relative(*pair) for pair in zip(gradients, wanted, strict=True))]
    print(f"{name}, {num_queries} queries, window {window}: {type(layout).__name__} {[f'{e:.1e}' for e in errors]}")
    assert errors[0] < FORWARD
    assert max(errors[1:]) < BACKWARD


class Angles(torch.nn.Module):
    """A rotary module as Hugging Face's, for any positions."""

    attention_scaling = 1.0

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = 5e5 ** -(torch.arange(0, CHANNELS, 2, device=x.device) / CHANNELS)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class Exact(Float32Rotary, Angles):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("batch", [1, 4])
def test_fused_rotation_is_the_exact_one(te: Modules, batch: int, scaling: float, dtype: torch.dtype) -> None:
    module = Exact()
    module.attention_scaling = scaling
    positions = torch.randint(0, 100_000, (batch, 128), device="cuda")
    # As attention has it: a slice of one projection's output.
    whole = torch.randn(4, 128, HEADS + 2, CHANNELS, device="cuda", dtype=dtype, requires_grad=True)
    x = whole[:, :, :HEADS]
    cos, sin = module(x, positions)
    out = te.apply_rotary(x, cos, sin)
    wide = whole.detach().double().requires_grad_()
    expected = apply_rotary(wide[:, :, :HEADS], cos, sin)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, whole, upstream)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
    # One rounding to the dtype: half an eighth bit of bfloat16 is 2e-3; float32 angles below pi err by 4e-7.
    bound = 4e-3 if dtype == torch.bfloat16 else 2e-6
    errors = (relative(out, expected), relative(gradient, wanted))
    print(batch, scaling, dtype, errors)
    assert max(errors) < bound
    assert out.is_contiguous()
