"""Comparing two tensors to the bit, and measuring what a declared rounding has changed.

What was only moved is compared by its bytes, so that the payload of a NaN counts and equal NaNs pass. A conversion
keeps no payload (torch's own casts differ in it, by how the elements lie), and a NaN that stays a NaN passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tepatch.dtypes import is_exact, significand_bits, torch_dtype
from tepatch.planning.bind import IDENTITY, Affine

CHUNK = 1 << 22
"""Elements compared at a time: bounds the temporaries."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOAT64_SLACK = 2.0**-50
"""For the float64 arithmetic of a scale and an offset: three operations and their inverses, each within 2**-53."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two tensors of one shape and dtype are not the same."""

    count: int
    first: tuple[int, ...]
    expected: float | None
    """The first element that differs; None if it is not a real number."""
    found: float | None
    largest: float | None
    """Largest ``|a - b|`` in float64; infinite if one of the two is not a number; None for complex numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """The conversions that a tensor's values have gone through, one after the other."""

    roundings: tuple[tuple[str, str], ...] = ()
    """Codes of dtypes: from, to."""
    affines: tuple[Affine, ...] = ()
    """Scales and offsets in the mapping, of any part of the tensor."""

    @property
    def is_exact(self) -> bool:
        """Whether every value is kept."""
        return not self.affines and all(is_exact(a, b) for a, b in self.roundings)

    @property
    def bound(self) -> float:
        """How far a value may move, relative to ``magnitude``: the unit roundoffs of what rounds, put together."""
        factor = 1.0
        for source, target in self.roundings:
            if is_exact(source, target) and not self.affines:
                continue
            factor *= 1 + 2.0 ** -significand_bits(target)
            if (source == "F64" or self.affines) and target in ("BF16", "F16"):
                factor *= 1 + 2.0 ** -significand_bits("F32")  # torch goes there by way of float32
        return factor - 1 + (_FLOAT64_SLACK if self.affines else 0.0)

    @property
    def floor(self) -> float:
        """The magnitude below which the error of a rounding is absolute: the smallest normal number."""
        scale = min([1.0, *(abs(affine.scale) for affine in self.affines)])
        inexact = [b for a, b in self.roundings if self.affines or not is_exact(a, b)]
        return max((torch.finfo(_torch(code)).tiny for code in inexact), default=0.0) / scale

    @property
    def offset(self) -> float:
        """What an offset adds to the magnitude."""
        return max((abs(affine.offset / affine.scale) for affine in self.affines), default=0.0)

    def __str__(self) -> str:
        parts = [f"scaled or offset ({affine.scale:g} x + {affine.offset:g})" for affine in dict.fromkeys(self.affines)]
        parts += [f"{'widened' if is_exact(a, b) else 'rounded'} {a} -> {b}" for a, b in self.roundings if a != b]
        return ", ".join(parts)


def affines_of(affines: Sequence[Affine]) -> tuple[Affine, ...]:
    """Those that change values."""
    return tuple(dict.fromkeys(affine for affine in affines if affine != IDENTITY))


def difference(expected: torch.Tensor, found: torch.Tensor, *, is_converted: bool) -> Difference | None:
    """None if the tensors (of one shape and dtype, on the CPU) are the same; ``is_converted``: a NaN is a NaN."""
    count, first, largest = 0, -1, 0.0
    for start, a, b in _chunks(expected, found):
        integer = _INTEGERS[a.element_size()]
        unequal = a.view(integer) != b.view(integer)
        if is_converted and a.is_floating_point():
            unequal &= ~(a.isnan() & b.isnan())
        here = int(unequal.sum())
        if not here:
            continue
        count += here
        if first < 0:
            first = start + int(unequal.to(torch.uint8).argmax())
        if not a.is_complex():
            apart = (a.double() - b.double()).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
            largest = max(largest, float(apart[unequal].max()))
    if not count:
        return None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), expected.shape)) if expected.dim() else ()
    values = [None if t.is_complex() else float(t.reshape(-1)[first]) for t in (expected, found)]
    return Difference(count, index, values[0], values[1], None if expected.is_complex() else largest)


def deviation(source: torch.Tensor, found: torch.Tensor, operation: Operation) -> float:
    """The largest ``|source - found|`` over the magnitude, in float64; infinite when a number was lost."""
    largest = 0.0
    for _, a, b in _chunks(source, found):
        x, y = a.double(), b.double()
        magnitude = (x.abs() + operation.offset).clamp_(min=max(operation.floor, 1e-300))
        apart = (x - y).abs_().div_(magnitude)
        apart[(x == y) | (x.isnan() & y.isnan())] = 0.0
        largest = max(largest, float(apart.nan_to_num_(nan=math.inf, posinf=math.inf).max()))
    return largest


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    x, y = a.reshape(-1), b.reshape(-1)
    for start in range(0, x.numel(), CHUNK):
        yield start, x[start : start + CHUNK], y[start : start + CHUNK]


def _torch(code: str) -> torch.dtype:
    dtype = torch_dtype(code)
    assert dtype is not None  # float codes only
    return dtype
