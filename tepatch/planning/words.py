"""Where a view lies in its tensor, in words: ``rows 0..2048``, ``rows 64..80 of every 96``, ``[3, 0..8, :]``.

Offsets and strides are exact, and no reader sees a layout in them. Ranges are half-open, as Python's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from tepatch.views import Atom, Pair, View, contiguous

ALL = "all"
"""The words for a whole tensor."""


class Words(NamedTuple):
    """A pair in words: a part of a source, a part of a target, and the order of the elements."""

    source: str
    target: str
    order: str
    """Empty if elements keep their order; else ``transposed``, ``rows in another order``, ``in another order``."""

    def __str__(self) -> str:
        text = self.target if self.source == ALL else f"{self.target} <- {self.source}"
        return f"{text}, {self.order}" if self.order else text


def describe_pair(pair: Pair, source_shape: Sequence[int], target_shape: Sequence[int]) -> Words:
    """A pair of views in words; its views must lie inside the shapes."""
    return Words(
        describe_view(pair.source_view(), source_shape),
        describe_view(pair.target_view(), target_shape),
        _order(pair, source_shape, target_shape),
    )


def describe_view(view: View, shape: Sequence[int]) -> str:
    """The positions that ``view`` touches in a row-major tensor of ``shape``, whatever their order."""
    atoms = merged_atoms(view)
    if prod(size for size, _ in atoms) == prod(shape) and view.offset == 0:
        return ALL
    ranges = _ranges(view.offset, atoms, shape)
    if ranges is None:
        sizes, strides = ([atom[i] for atom in atoms] for i in (0, 1))
        return f"from element {view.offset}, sizes {sizes}, strides {strides}"
    if len(shape) > 2:
        return f"[{', '.join(ranges)}]"
    if len(shape) == 1:
        return f"{_word('element', ranges[0])} {ranges[0]}"
    named = zip(("row", "column"), ranges, strict=True)
    return ", ".join(f"{_word(name, text)} {text}" for name, text in named if text != ":")


def merged_atoms(view: View) -> list[Atom]:
    """The atoms of ``view`` from the largest stride to the smallest, merged where they are contiguous."""
    atoms = sorted((atom for dim in view.dims for atom in dim if atom[0] != 1), key=lambda atom: -atom[1])
    out: list[Atom] = []
    for size, stride in atoms:
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return out


def _word(name: str, text: str) -> str:
    return f"{name}s" if ".." in text else name


def _ranges(offset: int, atoms: Sequence[Atom], shape: Sequence[int]) -> list[str] | None:
    """For each dimension, the indices that are touched; None if they are not the same for all others."""
    strides = [stride for ((_, stride),) in contiguous(shape).dims]
    split: list[list[Atom]] = [[] for _ in shape]
    for size, stride in reversed(atoms):
        for dim in reversed(range(len(shape))):
            if shape[dim] == 1 or stride >= strides[dim] * shape[dim]:
                continue
            if stride % strides[dim]:
                return None
            step = stride // strides[dim]
            if size * step <= shape[dim]:
                split[dim].insert(0, (size, step))
                size = 1
                break
            # A run that goes on in the next row: it has to fill this dimension.
            inside = shape[dim] // step
            if shape[dim] % step or size % inside:
                return None
            split[dim].insert(0, (inside, step))
            size, stride = size // inside, strides[dim] * shape[dim]
        if size != 1:
            return None
    out = []
    for size, stride, inner in zip(shape, strides, split, strict=True):
        start, offset = divmod(offset, stride)
        if start + sum((n - 1) * step for n, step in inner) >= size:
            return None
        text = _range(start, inner, size)
        if text is None:
            return None
        out.append(text)
    return out


def _range(start: int, atoms: Sequence[Atom], size: int) -> str | None:
    atoms = merged_atoms(View(0, (tuple(atoms),)))
    if not atoms:
        return str(start) if size > 1 else ":"
    run = atoms[-1][0] if atoms[-1][1] == 1 else 1
    outer = atoms[:-1] if atoms[-1][1] == 1 else atoms
    if not outer:
        return ":" if run == size else f"{start}..{start + run}"
    if len(outer) > 1:
        return None
    count, period = outer[0]
    first = str(start) if run == 1 else f"{start}..{start + run}"
    is_throughout = count * period == size and start < period
    return f"{first} of every {period}" + ("" if is_throughout else f", {count} times")


def _order(pair: Pair, source_shape: Sequence[int], target_shape: Sequence[int]) -> str:
    atoms = sorted(
        (-s, -t) for n, s, t in zip(*pair[:3], strict=True) if n > 1
    )  # outermost first, as the source has it
    if _is_sorted([target for _, target in atoms]):
        return ""
    if min(len(source_shape), len(target_shape)) < 2:
        return "in another order"
    rows = [(-source >= source_shape[-1], -target >= target_shape[-1]) for source, target in atoms]
    if len(atoms) == 2 and all(of_source != of_target for of_source, of_target in rows):
        return "transposed"
    columns = [target for (_, target), (of_source, _) in zip(atoms, rows, strict=True) if not of_source]
    stays = all(of_source == of_target for of_source, of_target in rows)
    return "rows in another order" if stays and _is_sorted(columns) else "in another order"


def _is_sorted(values: Sequence[int]) -> bool:
    return all(first <= second for first, second in pairwise(values))
