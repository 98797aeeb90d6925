"""The plan: what becomes of every tensor, settled and proven before a byte of a weight is read.

``make_plan`` meets a mapping, a config, the names and shapes of a checkpoint (its headers) and the names and
shapes of a model (built on the meta device), and returns plain data, or one ``PlanError`` with every problem.

The accounting is total. Every source tensor ends as *used*, *ignored* or *redundant* (a copy of a tied tensor,
compared when loading); every target as *filled*, *created* or *tied*; every rule as *used* or *off* (its
condition does not hold). Anything else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

from tepatch.mapping.bind import IDENTITY, Affine
from tepatch.mapping.views import Pair

_WIDE = {8: ("C64", "F64", "I64", "U64"), 4: ("F32", "I32", "U32"), 2: ("BF16", "F16", "I16", "U16")}
ITEM_SIZE = {code: size for size, codes in _WIDE.items() for code in codes}
"""Bytes of one element, by code; those of all others are one byte."""
# Bits of significand and of exponent: a conversion that loses neither comes back bit for bit.
_PRECISION = {"F64": (53, 11), "F32": (24, 8), "BF16": (8, 8), "F16": (11, 5)}


class TensorSpec(Protocol):
    """A name's shape and dtype (safetensors code, ``BF16``): all that a plan needs to know of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Spec:
    """A plain ``TensorSpec``."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Copy:
    """One pair of views: ``source`` and ``target`` hold the same elements there, up to ``affine``."""

    source: str
    target: str
    pair: Pair
    affine: Affine
    rule: int


@dataclass(frozen=True, slots=True)
class Fill:
    """A part of ``target`` (the target side of ``pair``) that holds a constant and has no source."""

    target: str
    pair: Pair
    value: float
    rule: int


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """What becomes of one tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    state: Literal["used", "ignored", "redundant"]
    note: str = ""
    """Why it is ignored, or the parameter it must be equal to."""


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """Where one parameter of the model comes from."""

    shape: tuple[int, ...]
    dtype: str
    state: Literal["filled", "created", "tied"]
    rule: int
    tied_to: str = ""


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """What became of one rule of the mapping."""

    where: str
    target: str
    state: Literal["used", "off"]
    count: int
    """Parameters it fills or ties."""
    sources: tuple[str, ...] = ()
    """Names of the tensors that these are made of, with ``{captures}``, in the order of the rule."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a load will do, as plain data. Printable (``str``), JSON (``to_json``), deterministic."""

    patch: str
    mapping: str
    digest: str
    location: str
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    sources: MappingABC[str, SourceEntry]
    targets: MappingABC[str, TargetEntry]
    rules: tuple[RuleEntry, ...]
    notes: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        """Bytes of the source tensors that will be read."""
        return sum(_nbytes(e.shape, e.dtype) for e in self.sources.values() if e.state == "used")

    @property
    def target_bytes(self) -> int:
        """Bytes of the parameters that will be allocated (tied ones once)."""
        return sum(_nbytes(e.shape, e.dtype) for e in self.targets.values() if e.state != "tied")

    def inexact(self) -> dict[str, str]:
        """Source tensors that would not come back bit for bit, each with the reason."""
        out: dict[str, str] = {}
        for copy in self.copies:
            source, target = self.sources[copy.source], self.targets[copy.target]
            if copy.affine != IDENTITY:
                out[copy.source] = f"scaled or offset ({copy.affine.scale} x + {copy.affine.offset})"
            elif not is_exact(source.dtype, target.dtype):
                out[copy.source] = f"{source.dtype} is rounded to {target.dtype}"
        for name, source in self.sources.items():
            if source.state == "redundant" and not is_exact(source.dtype, self.targets[source.note].dtype):
                out[name] = f"{source.dtype} is rounded to {self.targets[source.note].dtype}"
        return out

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data. Layouts that layers share are listed once."""
        layouts: dict[Pair, int] = {}
        copies = [
            {
                "source": copy.source,
                "target": copy.target,
                "layout": layouts.setdefault(copy.pair, len(layouts)),
                **({} if copy.affine == IDENTITY else {"affine": list(copy.affine)}),
                "rule": copy.rule,
            }
            for copy in self.copies
        ]
        fills = [
            {
                "target": fill.target,
                "layout": layouts.setdefault(fill.pair, len(layouts)),
                "value": fill.value,
                "rule": fill.rule,
            }
            for fill in self.fills
        ]
        return {
            "format": "tepatch-plan-1",
            "patch": self.patch,
            "mapping": self.mapping,
            "digest": self.digest,
            "location": self.location,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "notes": list(self.notes),
            "rules": [
                {"where": r.where, "target": r.target, "state": r.state, "count": r.count, "sources": list(r.sources)}
                for r in self.rules
            ],
            "layouts": [_layout_json(layout) for layout in layouts],
            "copies": copies,
            "fills": fills,
            "sources": {
                name: {
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "state": e.state,
                    **({"note": e.note} if e.note else {}),
                }
                for name, e in self.sources.items()
            },
            "targets": {
                name: {
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "state": e.state,
                    "rule": e.rule,
                    **({"tied_to": e.tied_to} if e.tied_to else {}),
                }
                for name, e in self.targets.items()
            },
            "inexact": self.inexact(),
        }

    def __str__(self) -> str:
        from tepatch.mapping.show import show_plan

        return show_plan(self)


def is_convertible(source_dtype: str, target_dtype: str) -> bool:
    """Whether a cast keeps the meaning: between floats it does, from packed or whole numbers to floats not."""
    return source_dtype == target_dtype or {source_dtype, target_dtype} <= _PRECISION.keys()


def is_exact(source_dtype: str, target_dtype: str) -> bool:
    """Whether every value of ``source_dtype`` comes back bit for bit through ``target_dtype``."""
    if source_dtype == target_dtype:
        return True
    if source_dtype not in _PRECISION or target_dtype not in _PRECISION:
        return False
    source, target = _PRECISION[source_dtype], _PRECISION[target_dtype]
    return source[0] <= target[0] and source[1] <= target[1]


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * ITEM_SIZE.get(dtype, 1)


def _layout_json(layout: Pair) -> dict[str, Any]:
    return {
        "sizes": list(layout.sizes),
        "source": {"offset": layout.source_offset, "strides": list(layout.source_strides)},
        "target": {"offset": layout.target_offset, "strides": list(layout.target_strides)},
    }
