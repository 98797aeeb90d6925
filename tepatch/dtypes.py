"""The element types of a checkpoint, by the code that safetensors gives them.

The codes and their sizes are those of the safetensors format; a ``.bin`` file's dtypes are named by the same
codes, so that the rest of tepatch sees one kind of checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TABLE = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
# Bits of significand and of exponent: a conversion that loses neither comes back bit for bit.
_PRECISION = {"F64": (53, 11), "F32": (24, 8), "BF16": (8, 8), "F16": (11, 5)}
_CODES = {torch_name: code for code, (torch_name, _) in _TABLE.items()}

ITEM_SIZES = {code: size for code, (_, size) in _TABLE.items()}
"""Bytes of one element, by code: the codes that tepatch can place."""

FLOATS = tuple(sorted(_PRECISION, key=_PRECISION.__getitem__))
"""Codes of the dtypes that convert to each other, by their precision: BF16, F16, F32, F64."""

PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Codes that the format knows, but whose elements are smaller than a byte: tepatch cannot place those."""


def torch_dtype(code: str) -> torch.dtype | None:
    """The torch dtype of a safetensors code; None when this torch, or tepatch, does not have it."""
    import torch

    if code not in _TABLE:
        return None
    # float8_e8m0fnu is younger than the oldest torch that is supported.
    dtype: torch.dtype | None = getattr(torch, _TABLE[code][0], None)
    return dtype


def dtype_code(dtype: torch.dtype) -> str | None:
    """The safetensors code of a torch dtype; None when the format has none."""
    return _CODES.get(str(dtype).removeprefix("torch."))


def item_size(code: str) -> int:
    """Bytes of one element; of a code that is not in ``ITEM_SIZES``, one."""
    return ITEM_SIZES.get(code, 1)


def significand_bits(code: str) -> int:
    """Bits of the significand of one of ``FLOATS``, with the one that is not stored: rounding errs by 2**-bits."""
    return _PRECISION[code][0]


def is_convertible(source: str, target: str) -> bool:
    """Whether a cast keeps the meaning: between floats it does, from packed or whole numbers to floats not."""
    return source == target or {source, target} <= _PRECISION.keys()


def is_exact(source: str, target: str) -> bool:
    """Whether every value of dtype ``source`` comes back bit for bit through dtype ``target``."""
    if source == target:
        return True
    if not is_convertible(source, target):
        return False
    return all(has <= keeps for has, keeps in zip(_PRECISION[source], _PRECISION[target], strict=True))
