"""The arithmetic of views, held against tensors of positions; and the proof that refuses everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tepatch import views
from tepatch.mapping.axes import parse_axes
from tepatch.views import (
    LayoutError,
    Pair,
    View,
    coalesce,
    contiguous,
    join_dims,
    narrow,
    pair,
    select,
    source_strides,
    split_dim,
)


def positions(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that holds its own positions: what a view of it must show is computed by torch."""
    return torch.arange(prod(shape)).view(shape)


def shown(view: View) -> torch.Tensor:
    """The positions that a view shows, in its own shape."""
    atoms = [atom for dim in view.dims for atom in dim]
    everything = torch.arange(view.offset + sum((size - 1) * stride for size, stride in atoms) + 1)
    sizes, strides = [size for size, _ in atoms], [stride for _, stride in atoms]
    return everything.as_strided(sizes, strides, view.offset).reshape(view.shape)


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def cut(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes that multiply to ``total``."""
    out: list[int] = []
    while total > 1 and len(out) < 3 and draw(st.booleans()):
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        out.append(size)
        total //= size
    return [*out, total]


@dataclass
class Seen:
    """A view, and the positions that it must show."""

    view: View
    expected: torch.Tensor


@st.composite
def looks(draw: st.DrawFn) -> Seen:
    """A view after some random steps, each done by torch as well."""
    shape = draw(shapes)
    seen = Seen(contiguous(shape), positions(shape))
    for _ in range(draw(st.integers(0, 5))):
        view, expected = seen.view, seen.expected
        dim = draw(st.integers(0, len(view.dims) - 1))
        size = expected.shape[dim]
        before, after = view.dims[:dim], view.dims[dim + 1 :]
        try:
            match draw(st.sampled_from(["split", "narrow", "select", "swap", "join"])):
                case "split":
                    sizes = draw(cut(size))
                    view = View(view.offset, (*before, *split_dim(view.dims[dim], sizes), *after))
                    expected = expected.unflatten(dim, sizes)
                case "narrow":
                    start = draw(st.integers(0, size - 1))
                    length = draw(st.integers(1, size - start))
                    view, expected = narrow(view, dim, start, length), expected.narrow(dim, start, length)
                case "select" if len(view.dims) > 1:
                    index = draw(st.integers(0, size - 1))
                    view, expected = select(view, dim, index), expected.select(dim, index)
                case "swap":
                    other = draw(st.integers(0, len(view.dims) - 1))
                    order = list(range(len(view.dims)))
                    order[dim], order[other] = order[other], order[dim]
                    view = View(view.offset, tuple(view.dims[i] for i in order))
                    expected = expected.permute(order)
                case "join" if after:
                    view = View(view.offset, (*before, join_dims(view.dims[dim : dim + 2]), *after[1:]))
                    expected = expected.flatten(dim, dim + 1)
        except LayoutError:
            continue  # not one strided view: refused, which the tests below are about
        seen = Seen(view, expected)
    return seen


@given(looks())
def test_a_view_shows_what_torch_shows(seen: Seen) -> None:
    assert seen.view.shape == tuple(seen.expected.shape)
    assert torch.equal(shown(seen.view), seen.expected)


@given(looks(), st.data())
def test_a_pair_relates_each_element_of_a_source_to_its_place(seen: Seen, data: st.DataObject) -> None:
    block = seen.view.shape
    dim = data.draw(st.integers(0, len(block) - 1))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    shape = (*block[:dim], before + block[dim] + after, *block[dim + 1 :])
    source = positions(shape)
    found = pair(seen.view, shape, before * prod(shape[dim + 1 :]))
    assert found.numel == prod(block)
    assert torch.equal(shown(found.source_view()).flatten(), source.narrow(dim, before, block[dim]).flatten())
    assert torch.equal(shown(found.target_view()).flatten(), seen.expected.flatten())


def test_what_is_contiguous_on_both_sides_is_one_run() -> None:
    assert pair(contiguous((4, 8, 16)), (4, 8, 16)) == Pair((512,), (1,), (1,), 0, 0)
    assert pair(contiguous(()), ()) == Pair((1,), (1,), (1,), 0, 0)


def test_a_dimension_is_split_only_into_its_own_size() -> None:
    with pytest.raises(LayoutError, match="3 x 3 is not 8"):
        split_dim(((8, 1),), (3, 3))


def test_a_dimension_is_not_split_across_a_block() -> None:
    blocks = ((2, 100), (6, 1))
    assert split_dim(blocks, (4, 3)) == (((2, 100), (2, 3)), ((3, 1),))
    with pytest.raises(LayoutError, match="a block of 6 can not be cut into blocks of 4"):
        split_dim(blocks, (3, 4))


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, 0), (3, -1), (6, 3), (9, 1)])
def test_a_range_outside_a_dimension_is_refused(start: int, size: int) -> None:
    with pytest.raises(LayoutError, match="are outside a dimension of 8"):
        views.narrow_dim(((8, 1),), start, size)


@pytest.mark.parametrize(("start", "size"), [(1, 4), (0, 5), (3, 2)])
def test_a_range_that_is_not_one_strided_view_is_refused(start: int, size: int) -> None:
    with pytest.raises(LayoutError, match="begin or end inside a block of 4 \\(of 2\\)"):
        views.narrow_dim(((2, 100), (4, 1)), start, size)


def positions_of(dim: views.Dim) -> list[int]:
    places = product(*(range(n) for n, _ in dim))
    return [sum(i * stride for i, (_, stride) in zip(at, dim, strict=True)) for at in places]


@pytest.mark.parametrize("dim", [((8, 1),), ((2, 99), (4, 1)), ((2, 99), (3, 10), (4, 1)), ((3, 1), (2, 50), (2, 7))])
def test_each_range_of_a_dimension_of_blocks_is_where_its_positions_are(dim: views.Dim) -> None:
    positions = positions_of(dim)
    blocks = [prod(n for n, _ in dim[i:]) for i in range(1, len(dim) + 1)]
    for start, end in combinations(range(len(positions) + 1), 2):
        is_whole = any(end - start == block and start % block == 0 for block in blocks)
        try:
            offset, rest = views.narrow_dim(dim, start, end - start)
        except LayoutError:
            assert not is_whole
            continue
        assert [offset + each for each in positions_of(rest)] == positions[start:end]


def test_neighbours_are_one_dimension_if_all_their_strides_go_on() -> None:
    assert coalesce([(4, 6), (1, 9), (2, 3), (3, 1)]) == [(24, 1)]
    assert coalesce([(2, 3, 6), (3, 1, 1)]) == [(2, 3, 6), (3, 1, 1)]
    assert coalesce([(2, 3, 6), (3, 1, 2), (1, 0, 0)]) == [(6, 1, 2)]
    assert coalesce([(1, 7)]) == []


def test_blocks_that_touch_are_joined() -> None:
    assert join_dims([((2, 12),), ((3, 4), (4, 1))]) == ((24, 1),)
    assert join_dims([((2, 100),), ((3, 4), (4, 1))]) == ((2, 100), (12, 1))
    assert join_dims([((1, 7),), ((1, 9),)]) == ((1, 1),)


# -- axes --


@pytest.mark.parametrize(
    ("text", "shape", "sizes", "expression"),
    [
        ("a b -> b a", (2, 3), {}, lambda t: t.t()),
        ("a b c -> c a b", (2, 3, 4), {}, lambda t: t.permute(1, 2, 0)),
        ("(h two k) i -> (h k two) i", (12, 5), {"h": 2, "two": 2}, lambda t: t.view(2, 3, 2, 5).transpose(1, 2)),
        ("(h 2 k) i -> (h k 2) i", (12, 5), {"h": 2}, lambda t: t.view(2, 3, 2, 5).transpose(1, 2)),
        ("a b -> (a b)", (6,), {"a": 2}, lambda t: t.view(2, 3)),
        ("(a b) -> b a", (3, 2), {}, lambda t: t.t().reshape(6)),
        ("(a b) i", (6, 2), {"a": 3}, lambda t: t),
    ],
)
def test_axes_mean_what_einops_means(
    text: str, shape: tuple[int, ...], sizes: dict[str, int], expression: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    seen = parse_axes(text).apply(contiguous(shape), sizes)
    expected = expression(positions(shape))
    assert torch.equal(shown(seen).flatten(), expected.flatten())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are incomplete"),
        ("a -> ", "are incomplete"),
        ("a b -> a", "must have the same axes"),
        ("a a", "an axis appears twice"),
        ("(1 a) (1 b)", "an axis appears twice"),
        ("(a b", "are incomplete"),
        ("a) b", "'\\)' closes nothing"),
        ("a () b", "'\\)' closes nothing"),
        ("((a b) c)", "nested parentheses"),
        ("a, b", "',' is not expected"),
        ("a -> a -> a", "'-' is not expected"),
        ("a *", "'\\*' is not expected"),
    ],
)
def test_what_is_no_pattern_of_axes_is_refused(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        parse_axes(text)


@pytest.mark.parametrize(
    ("text", "shape", "sizes", "message"),
    [
        ("a b", (6,), {}, "name 2 dimensions, the target has 1"),
        ("(a b) c", (6, 2), {}, "the sizes of axes a, b in '\\(a b\\) c' are not defined"),
        ("(a b) c", (6, 2), {"a": 4}, "6 is not a multiple of 4"),
        ("(a b) c", (6, 2), {"a": 2, "b": 2}, "axes \\(a=2 x b=2\\) make 4, the target has 6"),
        ("(a b) c", (6, 2), {"a": 0}, "axis 'a' of '\\(a b\\) c' can not have size 0"),
        ("(0 b) c", (6, 2), {}, "can not have size 0"),
        ("(a b) c", (6, 2), {"a": -2}, "can not have size -2"),
        ("a b", (6, 2), {"a": 5}, "axes \\(a=5\\) make 5, the target has 6"),
    ],
)
def test_axes_that_do_not_fit_are_refused(
    text: str, shape: tuple[int, ...], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        parse_axes(text).apply(contiguous(shape), sizes)


# -- a whole source as one strided tensor --


def strided_as(seen: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """By brute force: whether positions ``seen`` are those of one strided tensor that begins at the first of them."""
    grid = torch.full(seen.shape, int(seen.flatten()[0]))
    for dim, (size, stride) in enumerate(zip(seen.shape, strides, strict=True)):
        grid += (torch.arange(size) * stride).view(-1, *[1] * (seen.dim() - dim - 1))
    return torch.equal(grid, seen)


@given(looks())
def test_strides_of_a_source_are_found_exactly_if_there_are_any(seen: Seen) -> None:
    shape = tuple(seen.expected.shape)
    found = source_strides(pair(seen.view, shape), shape)
    steps = [
        seen.expected.select(dim, 1) - seen.expected.select(dim, 0) if n > 1 else None for dim, n in enumerate(shape)
    ]
    only_ones_possible = tuple(1 if step is None else int(step.flatten()[0]) for step in steps)
    assert (found is not None) == strided_as(seen.expected, only_ones_possible)
    if found is not None:
        assert strided_as(seen.expected, found)


@given(looks(), st.data())
def test_a_part_of_a_source_has_no_strides(seen: Seen, data: st.DataObject) -> None:
    block = tuple(seen.view.shape)
    dim = data.draw(st.integers(0, len(block) - 1))
    before, after = data.draw(st.sampled_from([(0, 1), (1, 0), (2, 3)]))
    shape = (*block[:dim], before + block[dim] + after, *block[dim + 1 :])
    part = pair(seen.view, shape, before * prod(shape[dim + 1 :]))
    assert source_strides(part, shape) is None
    assert source_strides(part, block) is None or part == pair(seen.view, block)


@pytest.mark.parametrize(
    ("axes", "target", "strides"),
    [
        ("a b -> a b", (4, 8), (8, 1)),
        ("b a -> a b", (4, 8), (1, 8)),
        ("(a b) -> a b", (4, 8), (1,)),
        ("b a i -> (a b) i", (12, 5), (5, 15, 1)),
        ("(b a) i -> (a b) i", (12, 5), None),
        ("(b a) -> a b", (4, 8), None),
    ],
)
def test_strides_are_those_of_a_permuted_tensor(
    axes: str, target: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    view = parse_axes(axes).apply(contiguous(target), {"b": 3 if target == (12, 5) else 8})
    assert source_strides(pair(view, view.shape), view.shape) == strides


def test_rows_of_groups_have_strides_only_with_a_dimension_for_the_groups() -> None:
    outer, inner = split_dim(contiguous((12, 5)).dims[0], (3, 4))
    rows = narrow(View(0, (outer, inner, ((5, 1),))), 1, 0, 2)
    assert source_strides(pair(rows, (3, 2, 5)), (3, 2, 5)) == (20, 5, 1)
    assert source_strides(pair(rows, (3, 2, 5)), (6, 5)) is None
    one = narrow(View(0, (outer, inner, ((5, 1),))), 1, 3, 1)
    assert source_strides(pair(one, (3, 1, 5)), (3, 5)) == (20, 1)


def test_an_empty_source_has_no_strides() -> None:
    assert source_strides(pair(contiguous((0, 4)), (0, 4)), (0, 4)) is None


def test_a_source_of_which_elements_are_read_twice_has_no_strides() -> None:
    twice = Pair((2, 4), (2, 1), (4, 1), 0, 0)
    assert source_strides(twice, (8,)) is None


# -- the proof --


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Pair], int]:
    """Views that cover a tensor exactly once, made by cutting it again and again."""
    shape = draw(shapes)
    parts = [contiguous(shape)]
    for _ in range(draw(st.integers(0, 6))):
        view = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(view.dims) - 1))
        size = view.shape[dim]
        if draw(st.booleans()):
            grid = View(
                view.offset, (*view.dims[:dim], *split_dim(view.dims[dim], draw(cut(size))), *view.dims[dim + 1 :])
            )
            parts.append(grid)
            continue
        middle = draw(st.integers(1, size - 1)) if size > 1 else 1
        parts.append(narrow(view, dim, 0, middle))
        if middle < size:
            parts.append(narrow(view, dim, middle, size - middle))
    return [pair(view, view.shape) for view in parts], prod(shape)


def covers(pairs: list[Pair], numel: int) -> bool:
    """By brute force: each of ``numel`` positions once, and nothing else."""
    found = torch.cat([shown(each.target_view()).flatten() for each in pairs]) if pairs else torch.empty(0)
    return torch.equal(found.sort().values, torch.arange(numel))


def error(pairs: list[Pair], numel: int) -> str | None:
    return views.tiling_error([each.target_view() for each in pairs], numel)


@given(tilings())
def test_a_tiling_is_accepted(tiling: tuple[list[Pair], int]) -> None:
    pairs, numel = tiling
    assert covers(pairs, numel)
    assert error(pairs, numel) is None


@given(tilings(), st.data())
def test_a_tiling_with_one_part_changed_is_refused(tiling: tuple[list[Pair], int], data: st.DataObject) -> None:
    pairs, numel = list(tiling[0]), tiling[1]
    index = data.draw(st.integers(0, len(pairs) - 1))
    part = pairs[index]
    match data.draw(st.sampled_from(["shift", "drop", "duplicate", "swap sizes", "stride"])):
        case "shift":
            shift = data.draw(st.integers(-numel, numel).filter(bool))
            pairs[index] = part._replace(target_offset=max(part.target_offset + shift, 0))
        case "drop":
            del pairs[index]
        case "duplicate":
            pairs.append(part)
        case "swap sizes":
            pairs[index] = part._replace(sizes=part.sizes[::-1])
        case "stride":
            where = data.draw(st.integers(0, len(part.sizes) - 1))
            strides = list(part.target_strides)
            strides[where] += data.draw(st.integers(1, numel))
            pairs[index] = part._replace(target_strides=tuple(strides))
    assert (error(pairs, numel) is None) == covers(pairs, numel)


strided = st.builds(
    lambda offset, atoms: View(offset, tuple((atom,) for atom in atoms)),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), max_size=3),
)


@given(st.lists(strided, min_size=1, max_size=3))
def test_the_proof_agrees_with_counting_for_any_views(parts: list[View]) -> None:
    numel = sum(prod(part.shape) for part in parts)
    counted = torch.cat([shown(part).flatten() for part in parts]).sort().values
    expected = torch.equal(counted, torch.arange(numel))
    assert (views.tiling_error(parts, numel) is None) == expected


@pytest.mark.parametrize(
    ("parts", "numel", "message"),
    [
        ([], 4, "only 0 of 4 elements are covered"),
        ([View(0, (((3, 1),),))], 4, "only 3 of 4 elements are covered"),
        ([View(0, (((3, 1),),)), View(2, (((2, 1),),))], 4, "the parts have 5 elements for 4: they overlap"),
        ([View(0, (((2, 1),),)), View(1, (((2, 1),),))], 4, "some elements are covered twice"),
        ([View(0, (((2, 1),),)), View(3, (((2, 1),),))], 4, "a part reaches outside the 4 elements"),
        ([View(-2, (((2, 1),),)), View(0, (((2, 1),),))], 4, "a part reaches outside the 4 elements"),
        ([View(0, (((2, 3),),)), View(1, (((2, 3),),))], 4, "a part reaches outside the 4 elements"),
        ([View(0, (((4, 0),),))], 4, "some elements are covered twice"),
        ([View(0, (((2, 1),), ((2, 1),)))], 4, "some elements are covered twice"),
        ([View(0, (((3, 1),), ((2, 1),)))], 6, "some elements are covered twice"),
    ],
)
def test_a_hole_an_overlap_and_a_part_outside_are_told(parts: list[View], numel: int, message: str) -> None:
    assert views.tiling_error(parts, numel) == message


def test_an_empty_tensor_is_tiled_by_an_empty_view() -> None:
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3)):
        assert views.tiling_error([contiguous(shape)], 0) is None
    assert views.tiling_error([contiguous((2, 4))], 0) is not None


def test_the_proof_of_a_regular_layout_counts_no_elements() -> None:
    groups, inside, columns = 128, 10 * 128, 1 << 40  # a weight that no machine could hold
    target = contiguous((groups * inside, columns))
    outer, inner = split_dim(target.dims[0], (groups, inside))
    split = View(0, (outer, inner, target.dims[1]))
    parts = [narrow(split, 1, 0, 1024), narrow(split, 1, 1024, 128), narrow(split, 1, 1152, 128)]
    assert views.tiling_error(parts, groups * inside * columns) is None
    assert views.tiling_error([*parts[:2], parts[1]], groups * inside * columns) is not None


def test_a_layout_too_irregular_to_prove_is_refused_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MAX_CELLS", 8)
    parts = [View(0, (((16, 2),),)), View(1, (((16, 2),),))]
    assert views.tiling_error(parts, 32) is None  # regular: pairs, sixteen times
    parts = [View(0, (((1, 1),),)), View(1, (((31, 1),),))]
    assert views.tiling_error(parts, 32) == "too irregular to prove: 32 separate cells (at most 8)"


@pytest.mark.parametrize("cells", [1, 2, 32])
def test_a_layout_of_as_many_cells_as_may_be_is_proven(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part for each cell, so that nothing can be factored out but in the first, which is one cell."""
    parts = [View(n, (((1, 1),),)) for n in range(cells)]
    monkeypatch.setattr(views, "MAX_CELLS", cells)
    assert views.tiling_error(parts, cells) is None
    assert views.tiling_error([parts[0], *parts[:-1]], cells) == (
        None if cells == 1 else "some elements are covered twice"
    )
    monkeypatch.setattr(views, "MAX_CELLS", cells - 1)
    assert f"too irregular to prove: {cells} separate cells" in (views.tiling_error(parts, cells) or "")
