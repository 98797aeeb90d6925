"""What is read in one go, and where it goes: a plan's copies, cut into pieces of files. Plain data, no tensors.

A piece is a run of bytes of one file. It has placements: each takes a strided view of the piece's bytes and writes it
to a strided view of a parameter, like the plan's own pairs. A large tensor is cut along its outermost dimension, so
that any view of it can be cut (transposed ones too); small neighbours are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from tepatch.dtypes import item_size
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Plan, Step

WIDENED = 8
"""Values that are scaled are so in float64, in memory of its own: such pieces are smaller by this."""


class Tensor(NamedTuple):
    """Where a tensor of the checkpoint is."""

    name: str
    file: str
    position: int
    """Of its first byte in the file."""
    dtype: str


class Placement(NamedTuple):
    """A part of one piece, and where it goes. Strides and the target's offset count elements."""

    source: str
    target: str
    dtype: str
    """Of the source: a safetensors code."""
    start: int
    """Of the part's first element, in bytes from the beginning of the piece."""
    step: Step
    """``read_offset`` is 0: the part begins at ``start``."""
    is_compared: bool = False
    """Whether the target has these values already, and must be equal to them."""

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        return _span(self.step) * item_size(self.dtype)


class Piece(NamedTuple):
    """A run of bytes of a file."""

    file: str
    position: int
    nbytes: int
    placements: tuple[Placement, ...]


Clip = Callable[[str, Step], Iterable[Step]]
"""From a parameter's name and a step into it to the steps into the part of it that is wanted."""


def cut(plan: Plan, tensors: Iterable[Tensor], *, piece_bytes: int, clip: Clip | None = None) -> Iterator[Piece]:
    """What is read of ``tensors`` to fill parameters, each part of a file once.

    Pieces come in the order of ``tensors``, which is that of the files and of the bytes in them; what comes later is
    cut when it is asked for. What lies between the parts of a tensor is read again where parts that lie within each
    other have no cut in common.
    """
    by_source = _by_source(plan)
    for _, in_file in groupby(tensors, key=lambda tensor: tensor.file):
        pieces = (
            piece
            for tensor in in_file
            for piece in sorted(_cut_tensor(tensor, by_source.get(tensor.name, ()), piece_bytes, clip), key=_place)
        )
        yield from _gathered(pieces, piece_bytes)


def cut_apart(
    plan: Plan, tensors: Iterable[Tensor], *, piece_bytes: int, clip: Clip | None = None, apart: frozenset[str]
) -> dict[str, Iterable[Piece]]:
    """The same, but by the parameter that is assembled, for those in ``apart``; under "" are all others.

    Such a parameter is whole only with all of its parts, so each comes by itself, one after the other.
    """
    by_source = _by_source(plan)
    filling: dict[str, list[Piece]] = {}
    for tensor in tensors:
        for piece in _cut_tensor(tensor, by_source.get(tensor.name, ()), piece_bytes, clip):
            for target, kept in _by_group(piece.placements, apart).items():
                filling.setdefault(target, []).append(piece._replace(placements=tuple(kept)))
    return {name: _in_order(pieces, piece_bytes) for name, pieces in filling.items()}


def cut_compared(
    plan: Plan, tensors: Iterable[Tensor], *, piece_bytes: int, clip: Clip | None = None
) -> Iterable[Piece]:
    """What is read of the redundant ones of ``tensors``, to be compared with parameters that are filled by then."""
    pieces: list[Piece] = []
    for tensor in tensors:
        entry = plan.sources[tensor.name]
        if entry.state == "redundant":
            whole = Step(tensor.name, (prod(entry.shape),), (1,), 0, (1,), 0, IDENTITY, False)
            pieces += _cut_tensor(tensor, [(entry.note, whole)], piece_bytes, clip, is_compared=True)
    return _in_order(pieces, piece_bytes)


Parts = list[tuple[str, Step]]


def _by_source(plan: Plan) -> dict[str, Parts]:
    out: dict[str, Parts] = {}
    for copy in plan.copies:
        out.setdefault(copy.source, []).append((copy.target, copy.step()))
    return out


def _by_group(placements: Iterable[Placement], apart: frozenset[str]) -> dict[str, list[Placement]]:
    out: dict[str, list[Placement]] = {}
    for each in placements:
        out.setdefault(each.target if each.target in apart else "", []).append(each)
    return out


def _cut_tensor(
    tensor: Tensor,
    copies: Sequence[tuple[str, Step]],
    piece_bytes: int,
    clip: Clip | None,
    *,
    is_compared: bool = False,
) -> Iterator[Piece]:
    if clip is not None:
        copies = [(target, part) for target, step in copies for part in clip(target, step)]
    size = item_size(tensor.dtype)
    for together in _overlapping(copies):
        limit = max(1, piece_bytes // size)
        if any(step.affine != IDENTITY for _, step in together):
            limit = max(1, limit // WIDENED)
        for parts in _split(together, limit):
            first = min(step.read_offset for _, step in parts)
            end = max(step.read_offset + _span(step) for _, step in parts)
            placements = tuple(
                Placement(
                    source=tensor.name,
                    target=target,
                    dtype=tensor.dtype,
                    start=(step.read_offset - first) * size,
                    step=step._replace(read_offset=0),
                    is_compared=is_compared,
                )
                for target, step in parts
            )
            yield Piece(tensor.file, tensor.position + first * size, (end - first) * size, placements)


def _overlapping(copies: Sequence[tuple[str, Step]]) -> Iterator[Parts]:
    """The steps of one source in order, those whose bytes lie within each other together."""
    together: Parts = []
    end = 0
    for target, step in sorted(copies, key=lambda each: each[1].read_offset):
        if 0 in step.sizes:
            continue
        if together and step.read_offset >= end:
            yield together
            together = []
        together.append((target, step))
        end = max(end, step.read_offset + _span(step))
    if together:
        yield together


def _split(parts: Parts, limit: int) -> Iterator[Parts]:
    """``parts``, which are read together, in several that each reach over ``limit`` elements at most."""
    first = min(step.read_offset for _, step in parts)
    end = max(step.read_offset + _span(step) for _, step in parts)
    if end - first <= limit:
        yield parts
        return
    outer = [_outermost(step) for _, step in parts]
    stride = outer[0][1]
    inside = all(
        (size, apart) == (outer[0][0], stride) and step.read_offset - first + _span(_inner(step)) <= stride
        for (size, apart), (_, step) in zip(outer, parts, strict=True)
    )
    if not inside:
        if len(parts) == 1:
            yield from _cut_outermost(parts, limit)
            return
        for part in parts:  # what lies between is read again
            yield from _split([part], limit)
        return
    yield from _cut_outermost(parts, limit)


def _cut_outermost(parts: Parts, limit: int) -> Iterator[Parts]:
    """All parts cut along the dimension that reaches furthest in what is read; of the same size in all."""
    if len(parts) == 1 and parts[0][1].read_strides == (1,):  # most of them, and quicker
        ((target, step),) = parts
        (write_stride,) = step.write_strides
        for start in range(0, step.sizes[0], limit):
            at = step.read_offset + start, step.write_offset + start * write_stride
            size = min(limit, step.sizes[0] - start)
            yield [(target, Step(step.read, (size,), (1,), at[0], (write_stride,), at[1], step.affine, step.is_undone))]
        return
    count, stride = _outermost(parts[0][1])
    first = min(step.read_offset for _, step in parts)
    within = max(step.read_offset - first + _span(_inner(step)) for _, step in parts)
    at_once = max(1, (limit - within) // stride + 1 if limit >= within else 1)
    for start in range(0, count, at_once):
        taken = [(target, _taken(step, start, min(at_once, count - start))) for target, step in parts]
        if within > limit:
            yield from _split(taken, limit)
        else:
            yield taken


def _outermost(step: Step) -> tuple[int, int]:
    """Size and stride of the dimension with the largest stride in what is read."""
    at = _dimension(step)
    return step.sizes[at], step.read_strides[at]


def _dimension(step: Step) -> int:
    """Where in ``sizes`` that dimension is; the first if there is but one element."""
    strides = zip(step.read_strides, step.sizes, strict=True)
    return -max(((s, n, -d) for d, (s, n) in enumerate(strides) if n > 1), default=(0, 0, 0))[2]


def _inner(step: Step) -> Step:
    """The first of what lies along that dimension."""
    return _taken(step, 0, 1)


def _taken(step: Step, start: int, count: int) -> Step:
    at = _dimension(step)
    sizes = (*step.sizes[:at], count, *step.sizes[at + 1 :])
    return step._replace(
        sizes=sizes,
        read_offset=step.read_offset + start * step.read_strides[at],
        write_offset=step.write_offset + start * step.write_strides[at],
    )


def _span(step: Step) -> int:
    """Elements from the first that is read to the last, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(step.sizes, step.read_strides, strict=True))


def _place(piece: Piece) -> tuple[str, int, int]:
    return piece.file, piece.position, piece.nbytes


def _in_order(pieces: Iterable[Piece], piece_bytes: int) -> tuple[Piece, ...]:
    """Pieces in the order of the files, those that are small together as one."""
    of_files = groupby(sorted(pieces, key=_place), key=lambda piece: piece.file)
    return tuple(each for _, in_file in of_files for each in _gathered(in_file, piece_bytes))


def _gathered(pieces: Iterable[Piece], piece_bytes: int) -> Iterator[Piece]:
    """Pieces of one file; those that follow each other and are small together are read as one."""
    last: Piece | None = None
    for piece in pieces:
        joined = None if last is None else _joined(last, piece, piece_bytes)
        if last is not None and joined is None:
            yield last
        last = joined or piece
    if last is not None:
        yield last


def _joined(one: Piece, other: Piece, piece_bytes: int) -> Piece | None:
    """The two as one piece, if they follow each other, are not too long and every element stays aligned."""
    ahead = other.position - one.position
    if ahead != one.nbytes or ahead + other.nbytes > piece_bytes:
        return None
    moved = tuple(p._replace(start=p.start + ahead) for p in other.placements)
    if any(p.start % item_size(p.dtype) for p in moved):
        return None
    return one._replace(nbytes=ahead + other.nbytes, placements=one.placements + moved)
