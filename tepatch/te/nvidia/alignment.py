"""How many rows, and which features, the kernels of a quantized format take; and rows that make up the number.

A row is a token. The formats scale blocks of numbers and are read 16 bytes at a time, in the product with the weight
and, for the weight's gradient, along the tokens. So a batch whose tokens are no multiple is padded with rows of zeros,
and these are cut off again: they touch no other row and get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tepatch.errors import Problem, UnsupportedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """What sizes must be multiples of."""

    rows: int
    features: int


def alignment_of(recipe: Any) -> Alignment:
    """For a recipe of Transformer Engine.

    Transformer Engine asks for multiples of 8 rows in FP8; but its product for the weight's gradient runs along the
    rows, and one byte each of them have to be 16. MXFP8 has blocks of 32, NVFP4 tiles of 128 rows.
    """
    if _is(recipe, "mxfp8"):
        return Alignment(rows=32, features=32)
    if _is(recipe, "nvfp4"):
        return Alignment(rows=128, features=32)
    rows = int(getattr(recipe, "quantization_alignment", 16)) if _is(recipe, "custom") else 16
    return Alignment(rows=max(rows, 16), features=16)


def missing_rows(shape: tuple[int, ...], multiple: int) -> int:
    """Rows that a tensor [..., features] of ``shape`` needs to have a multiple.

    >>> missing_rows((3, 7, 64), 16)
    11
    """
    return -prod(shape[:-1]) % multiple


def with_padded_rows(function: Callable[[Tensor], Any], inp: Tensor, multiple: int) -> Any:
    """``function(inp)``, a tensor [..., n] or a tuple of some, computed with a multiple of rows.

    Where rows are a multiple, ``inp`` itself is handed over, and nothing is copied.
    """
    missing = missing_rows(tuple(inp.shape), multiple)
    if missing == 0:
        return function(inp)
    rows = prod(inp.shape[:-1])
    out = function(F.pad(inp.reshape(rows, inp.shape[-1]), (0, 0, 0, missing)))
    if isinstance(out, tuple):
        return tuple(_cut(each, inp, rows) for each in out)
    return _cut(out, inp, rows)


def check_features(where: str, sizes: Mapping[str, int], multiple: int) -> None:
    """Raise ``UnsupportedError`` if a module's sizes (by name) do not fit: they can not be padded."""
    if all(size % multiple == 0 for size in sizes.values()):
        return
    raise UnsupportedError(
        Problem(
            where=where,
            what="the sizes of this module do not fit the quantized format",
            expected=f"multiples of {multiple}",
            found=", ".join(f"{name} {size}" for name, size in sizes.items()),
            fix="leave this layer in bfloat16, or take a recipe whose blocks divide these sizes",
        )
    )


def _cut(out: Tensor, inp: Tensor, rows: int) -> Tensor:
    return out[:rows].reshape(*inp.shape[:-1], out.shape[-1])


def _is(recipe: Any, kind: str) -> bool:
    """Whether a recipe says that it is of a kind; older versions of Transformer Engine do not know all kinds."""
    ask = getattr(recipe, kind, None)
    return bool(ask()) if callable(ask) else False
