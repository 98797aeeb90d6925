"""Strided views of a tensor, as plain numbers, and the proof that a set of them tiles it.

Every layout change in a mapping (concat, stack, interleave, transpose, ...) is a statement about how to *look
at* a target parameter so that a source tensor appears in it. Such a look is a ``View``: an offset and, for each
dimension the source sees, a list of ``(size, stride)`` atoms. One dimension may need several atoms: the rows of
``q_proj`` in a head-interleaved QKV weight are ``(groups, stride of a group), (rows of a group, stride of a
row)``. Atoms of one dimension are in row-major order, outermost first.

The functions here only narrow, split and reorder views; none ever needs a tensor. All sizes and strides count
elements, not bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd, prod
from typing import NamedTuple, TypeVar, cast

Atom = tuple[int, int]
"""``(size, stride)``."""
Dim = tuple[Atom, ...]
"""One dimension as its source sees it, outermost atom first."""
StridedDim = TypeVar("StridedDim", bound=tuple[int, ...])

MAX_CELLS = 1 << 24
"""The tiling proof gives up (with an error, never silently) beyond this many distinct cells."""


class LayoutError(ValueError):
    """A layout does not fit the sizes it is applied to. Turned into a ``Problem`` by whoever knows the rule."""


class View(NamedTuple):
    """A strided look at a tensor of known size. ``dims`` are in the order of the viewer, not of the tensor."""

    offset: int
    dims: tuple[Dim, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(size for size, _ in dim) for dim in self.dims)


class Pair(NamedTuple):
    """Two strided views with equal ``sizes``: element by element, one of a source and one of a target.

    Loading copies source to target, saving copies target to source: the same numbers. ``sizes`` and both stride
    tuples have one entry per dimension; adjacent dimensions that are contiguous on both sides are merged.
    """

    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    source_offset: int
    target_offset: int

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def source_view(self) -> View:
        atoms = zip(self.sizes, self.source_strides, strict=True)
        return View(self.source_offset, tuple((atom,) for atom in atoms))

    def target_view(self) -> View:
        atoms = zip(self.sizes, self.target_strides, strict=True)
        return View(self.target_offset, tuple((atom,) for atom in atoms))


def contiguous(shape: Sequence[int]) -> View:
    """The view of a whole row-major tensor of ``shape``."""
    stride, dims = 1, []
    for size in reversed(shape):
        dims.append(((size, stride),))
        stride *= size
    return View(0, tuple(reversed(dims)))


def split_dim(dim: Dim, sizes: Sequence[int]) -> tuple[Dim, ...]:
    """``dim`` seen as a row-major grid of ``sizes``: one ``Dim`` for each.

    Raises ``LayoutError`` if the sizes do not multiply to the dimension's, or cut one of its atoms unevenly.
    """
    total = prod(size for size, _ in dim)
    if prod(sizes) != total:
        raise LayoutError(f"{' x '.join(map(str, sizes))} is not {total}")
    atoms = [atom for atom in reversed(dim) if atom[0] != 1]  # innermost first
    out: list[Dim] = []
    for size in reversed(sizes):
        taken: list[Atom] = []
        need = size
        while need > 1:
            have, stride = atoms.pop(0)
            if need % have == 0:
                taken.append((have, stride))
                need //= have
            elif have % need == 0:
                taken.append((need, stride))
                atoms.insert(0, (have // need, stride * need))
                need = 1
            else:
                raise LayoutError(f"a block of {have} can not be cut into blocks of {need}")
        out.append(tuple(reversed(taken)) or ((1, 1),))
    return tuple(reversed(out))


def coalesce(dims: Iterable[StridedDim]) -> list[StridedDim]:
    """Dimensions ``(size, stride)`` in as few as they have, outermost first; those of size 1 are left out.

    Neighbours become one dimension where the outer goes on where the inner ends. With several strides each,
    ``(size, stride, stride, ...)``, it has to be so for all of them. Nothing is sorted.

    >>> coalesce([(4, 6), (1, 9), (2, 3), (3, 1)]), coalesce([(2, 3, 6), (3, 1, 1)])
    ([(24, 1)], [(2, 3, 6), (3, 1, 1)])
    """
    out: list[tuple[int, ...]] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if out and all(outer == size * inner for outer, inner in zip(out[-1][1:], strides, strict=True)):
            size *= out.pop()[0]
        out.append((size, *strides))
    return cast("list[StridedDim]", out)


def join_dims(dims: Iterable[Dim]) -> Dim:
    """One dimension of several, outermost first: what is contiguous becomes one atom, which any later cut may cut."""
    return tuple(coalesce(atom for dim in dims for atom in dim)) or ((1, 1),)


def narrow_dim(dim: Dim, start: int, size: int) -> tuple[int, Dim]:
    """Positions ``start .. start + size`` of ``dim``: an offset to add, and the narrowed dimension.

    Raises ``LayoutError`` if the range is not one strided view (it begins or ends inside a block).
    """
    total = prod(n for n, _ in dim)
    if start < 0 or size < 1 or start + size > total:
        raise LayoutError(f"positions {start} to {start + size} are outside a dimension of {total}")
    if not dim:
        return 0, dim
    (count, stride), inner = dim[0], dim[1:]
    block = prod(n for n, _ in inner)
    if start % block == 0 and size % block == 0:
        return (start // block) * stride, ((size // block, stride), *inner)
    if start // block == (start + size - 1) // block:
        offset, rest = narrow_dim(inner, start % block, size)
        return (start // block) * stride + offset, ((1, stride), *rest)
    raise LayoutError(f"positions {start} to {start + size} begin or end inside a block of {block} (of {count})")


def narrow(view: View, dim: int, start: int, size: int) -> View:
    """Part of ``view`` along its dimension ``dim``."""
    offset, narrowed = narrow_dim(view.dims[dim], start, size)
    return View(view.offset + offset, (*view.dims[:dim], narrowed, *view.dims[dim + 1 :]))


def select(view: View, dim: int, index: int) -> View:
    """``view`` at one ``index`` of its dimension ``dim``, which disappears."""
    offset, _ = narrow_dim(view.dims[dim], index, 1)
    return View(view.offset + offset, view.dims[:dim] + view.dims[dim + 1 :])


def pair(target: View, source_shape: Sequence[int], source_offset: int = 0) -> Pair:
    """Match a target view with a source tensor's block, whose own dims are those of ``target``.

    ``source_shape`` is the shape of the whole (row-major) source: a block narrower than it along some dimension
    begins at ``source_offset``.
    """
    atoms: list[tuple[int, int, int]] = []
    for dim, ((_, stride),) in zip(target.dims, contiguous(source_shape).dims, strict=True):
        inner, refined = stride, []
        for size, target_stride in reversed(dim):
            refined.append((size, inner, target_stride))
            inner *= size
        atoms += reversed(refined)
    sizes, source_strides, target_strides = zip(*(coalesce(atoms) or [(1, 1, 1)]), strict=True)
    return Pair(sizes, source_strides, target_strides, source_offset, target.offset)


def source_strides(pair: Pair, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The strides with which a whole row-major source of ``shape`` lies in the target, beginning at the pair's offset.

    None if no strides say it: the pair covers only a part of the source, or one dimension of the source jumps
    within the target (rows dealt out to groups). Nor does an empty source have any.
    """
    atoms = [atom for atom in zip(pair.source_strides, pair.sizes, pair.target_strides, strict=True) if atom[1] != 1]
    expected = 1
    for stride, size, _ in sorted(atoms):
        if stride != expected:
            return None
        expected *= size
    if pair.source_offset != 0 or expected != prod(shape) or expected == 0:
        return None
    whole = join_dims([((size, stride),) for _, size, stride in sorted(atoms, reverse=True)])
    try:
        dims = split_dim(whole, shape)
    except LayoutError:
        return None
    return tuple(dim[0][1] for dim in dims) if all(len(dim) == 1 for dim in dims) else None


def tiling_error(views: Iterable[View], numel: int) -> str | None:
    """Prove that ``views`` cover each of ``numel`` elements exactly once; else say what is wrong.

    Exact, from sizes and strides alone, and independent of how the views were made. What all views share (whole
    outer repetitions, whole contiguous inner runs) is factored out first; the cells that remain are counted.
    """
    normal = [_normalized(view) for view in views]
    covered = sum(prod(n for n, _ in atoms) for _, atoms in normal)
    if covered > numel:
        return f"the parts have {covered} elements for {numel}: they overlap"
    if covered < numel:
        return f"only {covered} of {numel} elements are covered"
    if numel == 0:
        return None
    for offset, atoms in normal:
        if any(stride < 1 for _, stride in atoms):
            return "some elements are covered twice"
        if offset < 0 or offset + sum((n - 1) * stride for n, stride in atoms) >= numel:
            return f"a part reaches outside the {numel} elements"
    # Counts agree, so an element that is covered twice means another that is not covered at all.
    while normal and all(atoms for _, atoms in normal):
        outer = normal[0][1][0]
        same = all(atoms[0] == outer for _, atoms in normal)
        count, stride = outer
        if not (same and count * stride == numel):  # then what is inside of ``numel`` is inside of each repetition too
            break
        normal = [(offset, atoms[1:]) for offset, atoms in normal]
        numel = stride
    unit = numel
    for offset, atoms in normal:
        runs = [n for n, stride in atoms if stride == 1] or [1]
        unit = gcd(unit, offset, *runs, *(stride for _, stride in atoms if stride != 1))
    cells = numel // unit
    if cells > MAX_CELLS:
        return f"too irregular to prove: {cells} separate cells (at most {MAX_CELLS})"
    seen = bytearray(cells)
    for offset, atoms in normal:
        grid = [(n // unit, 1) if stride == 1 else (n, stride // unit) for n, stride in atoms]
        for start in _starts(offset // unit, grid[:-1]):
            count, step = grid[-1] if grid else (1, 1)
            seen[start : start + (count - 1) * step + 1 : step] = b"\x01" * count
    return "some elements are covered twice" if 0 in seen else None


def _normalized(view: View) -> tuple[int, list[Atom]]:
    """The set of positions a view touches: atoms sorted by stride, merged where they are contiguous."""
    atoms = (atom for dim in view.dims for atom in dim if atom[0] != 1)
    return view.offset, coalesce(sorted(atoms, key=lambda atom: (-atom[1], -atom[0])))


def _starts(offset: int, grid: Sequence[Atom]) -> Iterable[int]:
    if not grid:
        yield offset
        return
    count, stride = grid[0]
    for index in range(count):
        yield from _starts(offset + index * stride, grid[1:])
