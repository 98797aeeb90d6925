"""Places in words: what they say is read back here, and must be the positions of the view."""

from __future__ import annotations

import itertools
import re
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tepatch.planning.words import describe_pair, describe_view
from tepatch.views import Pair, View, contiguous, narrow, pair, split_dim

Shape = tuple[int, ...]


def touched(view: View) -> set[int]:
    atoms = [atom for dim in view.dims for atom in dim]
    steps = itertools.product(*(range(0, size * stride, stride) if stride else (0,) for size, stride in atoms))
    return {view.offset + sum(step) for step in steps}


def read_range(text: str, size: int) -> set[int]:
    if text == ":":
        return set(range(size))
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?(?: of every (\d+)(?:, (\d+) times)?)?", text)
    assert found, text
    start, end = int(found[1]), int(found[2] or int(found[1]) + 1)
    period = int(found[3] or size)
    times = int(found[4]) if found[4] else size // period if found[3] else 1
    return {index + turn * period for index in range(start, end) for turn in range(times)}


def read(text: str, shape: Shape) -> set[int]:
    """The positions that a text speaks of."""
    if text == "all":
        ranges = [":"] * len(shape)
    elif text.startswith("["):
        ranges = re.split(r", (?!\d+ times)", text[1:-1])
    else:
        ranges = [":"] * len(shape)
        for part in re.split(r", (?!\d+ times)", text):
            word, _, where = part.partition(" ")
            ranges[{"element": 0, "row": 0, "column": 1}[word.removesuffix("s")]] = where
    indices = [read_range(each, size) for each, size in zip(ranges, shape, strict=True)]
    strides = [stride for ((_, stride),) in contiguous(shape).dims]
    return {sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*indices)}


@st.composite
def looks(draw: st.DrawFn) -> tuple[View, Shape]:
    """A view as mappings make them: dimensions that are narrowed, as a whole or group by group."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    view = contiguous(shape)
    for dim, size in enumerate(shape):
        groups = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        outer, inner = split_dim(view.dims[dim], (groups, size // groups))
        parts = View(view.offset, (*view.dims[:dim], outer, inner, *view.dims[dim + 1 :]))
        for part in (dim, dim + 1):
            start = draw(st.integers(0, parts.shape[part] - 1))
            parts = narrow(parts, part, start, draw(st.integers(1, parts.shape[part] - start)))
        view = View(parts.offset, (*parts.dims[:dim], (*parts.dims[dim], *parts.dims[dim + 1]), *parts.dims[dim + 2 :]))
    return view, shape


@given(looks())
def test_the_words_for_a_place_say_which_elements_it_has(look: tuple[View, Shape]) -> None:
    view, shape = look
    text = describe_view(view, shape)
    assert "strides" not in text
    assert read(text, shape) == touched(view)
    assert (text == "all") == (len(touched(view)) == prod(shape))


@pytest.mark.parametrize(
    ("view", "shape", "text"),
    [
        (View(0, (((6, 1),),)), (2, 3), "all"),
        (View(64, (((2048, 1),),)), (4096,), "elements 64..2112"),
        (View(5, (((1, 1),),)), (9,), "element 5"),
        (View(6, (((6, 1),),)), (6, 3), "rows 2..4"),
        (View(3, (((3, 1),),)), (6, 3), "row 1"),
        (View(1, (((6, 3),),)), (6, 3), "column 1"),
        (View(4, (((2, 3), (2, 1)),)), (6, 3), "rows 1..3, columns 1..3"),
        (View(0, (((3, 6), (3, 1)),)), (6, 3), "row 0 of every 2"),
        (View(3, (((2, 6), (3, 1)),)), (6, 3), "row 1 of every 2, 2 times"),
        (View(24, (((12, 1),),)), (3, 4, 3), "[2, :, :]"),
        (View(27, (((6, 1),),)), (3, 4, 3), "[2, 1..3, :]"),
        (View(0, (((4, 1),),)), (3, 3), "from element 0, sizes [4], strides [1]"),
        (View(1, (((3, 1),),)), (3, 3), "from element 1, sizes [3], strides [1]"),
        (View(1, (((4, 1),),)), (3, 3), "from element 1, sizes [4], strides [1]"),
        (View(0, (((2, 12), (2, 4), (2, 1)),)), (24,), "from element 0, sizes [2, 2, 2], strides [12, 4, 1]"),
    ],
)
def test_a_place_in_words(view: View, shape: Shape, text: str) -> None:
    assert describe_view(view, shape) == text


def test_the_order_of_elements_is_said_where_it_changes() -> None:
    here = contiguous((4, 6))
    swapped = View(0, (here.dims[1], here.dims[0]))
    assert str(describe_pair(pair(here, (4, 6)), (4, 6), (4, 6))) == "all"
    assert str(describe_pair(pair(swapped, (6, 4)), (6, 4), (4, 6))) == "all, transposed"
    two, half = split_dim(here.dims[0], (2, 2))
    permuted = pair(View(0, ((*half, *two), here.dims[1])), (4, 6))
    assert str(describe_pair(permuted, (4, 6), (4, 6))) == "all, rows in another order"
    left, right = split_dim(here.dims[1], (3, 2))
    columns = pair(View(0, (here.dims[0], (*right, *left))), (4, 6))
    assert str(describe_pair(columns, (4, 6), (4, 6))) == "all, in another order"
    one = Pair((2, 3), (3, 1), (1, 2), 0, 0)
    assert str(describe_pair(one, (6,), (6,))) == "all, in another order"


def test_a_part_of_a_source_is_said_after_the_place_it_goes_to() -> None:
    words = describe_pair(Pair((12,), (1,), (1,), 6, 0), (9, 6), (2, 6))
    assert (words.source, words.target, words.order) == ("rows 1..3", "all", "")
    assert str(words) == "all <- rows 1..3"
