"""The part of a step that falls into one process's shard of a parameter, as steps into that shard.

A parameter that is cut along a dimension is a range of positions once that dimension is the outermost. So a step is
rewritten for a parameter whose cut dimension comes first, clipped to the range, and written back for the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from tepatch.planning.plan import Step


@dataclass(frozen=True, slots=True)
class Cut:
    """Positions ``start .. start + size`` of a parameter along its dimension ``dim``."""

    dim: int
    start: int
    size: int


def shard_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    """What is left of ``shape`` after ``cuts``, one after the other."""
    out = list(shape)
    for cut in cuts:
        out[cut.dim] = cut.size
    return tuple(out)


def clip(step: Step, shape: Sequence[int], cuts: Sequence[Cut]) -> list[Step]:
    """The parts of a step into a (row-major) parameter of ``shape`` that fall into ``cuts`` of it.

    Each cut is of what the one before has left. The steps write to a row-major tensor of ``shard_shape``.
    """
    if 0 in step.sizes:
        return []
    steps, left = [step], list(shape)
    for cut in cuts:
        steps = [part for each in steps for part in _clip(each, left, cut)]
        left[cut.dim] = cut.size
    return steps


Atom = tuple[int, int, int]
"""Size, stride in what is read, stride in what is written."""


def _clip(step: Step, shape: Sequence[int], cut: Cut) -> Iterator[Step]:
    inner = prod(shape[cut.dim + 1 :])
    block = shape[cut.dim] * inner
    outer = prod(shape[: cut.dim])
    rest = outer * inner  # elements at one position of the dimension
    atoms = zip(step.sizes, step.read_strides, step.write_strides, strict=True)
    for read_at, write_at, parts in _aligned(step.read_offset, step.write_offset, list(atoms), inner, block):
        moved = [(n, read, _moved(stride, inner, block, rest)) for n, read, stride in parts]
        offset = _moved(write_at, inner, block, rest)
        begin, end = cut.start * rest, (cut.start + cut.size) * rest
        for at, clipped_at, clipped in _clipped(read_at, offset, moved, begin, end):
            back = [(n, read, _back(stride, inner, cut.size, rest)) for n, read, stride in clipped]
            sizes, reads, writes = zip(*_merged(back), strict=True)
            yield step._replace(
                sizes=sizes,
                read_strides=reads,
                write_strides=writes,
                read_offset=at,
                write_offset=_back(clipped_at - begin, inner, cut.size, rest),
            )


def _merged(atoms: list[Atom]) -> list[Atom]:
    """The same view in as few dimensions as it has: the outermost first, what is contiguous on both sides as one."""
    out: list[Atom] = []
    for n, read, write in sorted(atoms, key=lambda atom: (-atom[1], -atom[0])):
        if out and (out[-1][1], out[-1][2]) == (n * read, n * write):
            out[-1] = (out[-1][0] * n, read, write)
        else:
            out.append((n, read, write))
    return out or [(1, 1, 1)]


def _moved(position: int, inner: int, block: int, rest: int) -> int:
    """A position in the parameter -> that in the one whose cut dimension comes first."""
    before, within = divmod(position, block)
    along, after = divmod(within, inner)
    return along * rest + before * inner + after


def _back(position: int, inner: int, size: int, rest: int) -> int:
    """The other way, for a shard with ``size`` positions along the dimension."""
    along, left = divmod(position, rest)
    before, after = divmod(left, inner)
    return before * size * inner + along * inner + after


def _aligned(
    read_at: int, write_at: int, atoms: list[Atom], inner: int, block: int
) -> Iterator[tuple[int, int, list[Atom]]]:
    """The step in parts of which no dimension crosses from one position of the cut dimension to the next unevenly.

    Every atom then either stays within one position of the dimension, or goes from one to the next, or from one run
    through all of them to the next: so that its stride has a meaning after the dimensions change places.
    """
    done: list[Atom] = []
    left = sorted(((n, read, stride) for n, read, stride in atoms if n > 1), key=lambda atom: -atom[2])
    while left:
        n, read, stride = left.pop(0)
        reach = sum((m - 1) * s for m, _, s in left)
        if stride < inner:
            unit, multiple = inner, 1  # it stays at one position of the dimension
        elif stride < block:
            unit, multiple = block, inner  # it goes along the dimension
        else:
            unit, multiple = 0, block  # it goes over all of it
        room = unit - write_at % unit - reach if unit else 1
        fit = 0 if stride % multiple or room < 1 else n if not unit else (room - 1) // stride + 1
        if fit >= n:
            done.append((n, read, stride))
            continue
        period = unit // stride if unit and unit % stride == 0 else 0
        if fit == period and n % period == 0:
            left[:0] = [(n // period, read * period, stride * period), (period, read, stride)]
            continue
        for start, size in _runs(n, fit, period):
            here = [*done, (size, read, stride), *left]
            yield from _aligned(read_at + start * read, write_at + start * stride, here, inner, block)
        return
    yield read_at, write_at, done


def _runs(n: int, fit: int, period: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``n``: the ``fit`` before the next boundary, all whole periods after it, the rest; else one by one."""
    if not fit or not period:
        yield from ((i, 1) for i in range(n))
        return
    whole = (n - fit) // period * period
    starts = (0, fit, fit + whole)
    yield from ((start, end - start) for start, end in zip(starts, (*starts[1:], n), strict=True) if end > start)


def _clipped(
    read_at: int, write_at: int, atoms: list[Atom], begin: int, end: int
) -> Iterator[tuple[int, int, list[Atom]]]:
    """The part of a strided view that is written to positions ``begin .. end``, as strided views."""
    reach = sum((n - 1) * stride for n, _, stride in atoms)
    if write_at >= end or write_at + reach < begin:
        return
    if begin <= write_at and write_at + reach < end:
        yield read_at, write_at, atoms
        return
    at = max(range(len(atoms)), key=lambda i: atoms[i][2])
    (n, read, stride), others = atoms[at], [*atoms[:at], *atoms[at + 1 :]]
    within = reach - (n - 1) * stride
    # Whole ones: begin <= write_at + i * stride and write_at + i * stride + within < end.
    low = max(0, -((write_at - begin) // stride))
    high = min(n, (end - 1 - within - write_at) // stride + 1)
    touched = range(
        max(0, (begin - within - write_at + stride - 1) // stride), min(n, (end - 1 - write_at) // stride + 1)
    )
    if low < high:
        whole = [(high - low, read, stride)] if high - low > 1 else []
        yield read_at + low * read, write_at + low * stride, [*whole, *others]
    for i in touched:
        if not low <= i < high:
            yield from _clipped(read_at + i * read, write_at + i * stride, others, begin, end)
