"""What a plan is made of, as plain data: pairs of views, constants, and what becomes of each tensor and rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, Protocol

from tepatch.planning.bind import IDENTITY, Affine
from tepatch.views import Pair


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


class Step(NamedTuple):
    """A part of a tensor that is written, and where it is read: a ``Copy`` in one of its two directions."""

    read: str
    sizes: tuple[int, ...]
    read_strides: tuple[int, ...]
    read_offset: int
    write_strides: tuple[int, ...]
    write_offset: int
    affine: Affine
    is_undone: bool
    """Whether ``affine`` is undone (written = (read - offset) / scale) and not applied."""

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def is_run(self) -> bool:
        """Whether it is a run of bytes: the same values, one after the other, on both sides."""
        return self.affine == IDENTITY and self.read_strides == self.write_strides == (1,)  # pairs are merged


@dataclass(frozen=True, slots=True)
class Copy:
    """One pair of views: ``source`` and ``target`` hold the same elements there, up to ``affine``."""

    source: str
    target: str
    pair: Pair
    affine: Affine
    rule: int

    def step(self, *, is_reversed: bool = False) -> Step:
        """What it means to load, or (reversed) to save."""
        sizes, source, target, source_offset, target_offset = self.pair
        if is_reversed:
            return Step(self.target, sizes, target, target_offset, source, source_offset, self.affine, True)
        return Step(self.source, sizes, source, source_offset, target, target_offset, self.affine, False)


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
    """Why it is ignored, the parameter it must be equal to, or the tied tensor that it is read in the place of."""


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
