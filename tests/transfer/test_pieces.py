"""How a checkpoint is cut into pieces: none too large, none read twice, neighbours together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tepatch.dtypes import item_size
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Step
from tepatch.transfer.pieces import WIDENED, Piece, Tensor, cut, cut_apart, cut_compared

Make = Callable[..., Any]


def pieces_of(sample: Any, piece_bytes: int, **more: Any) -> list[Piece]:
    tensors = [Tensor(i.name, i.file, i.offset, i.dtype) for i in sample.checkpoint.tensors.values()]
    filling = cut(sample.plan, tensors, piece_bytes=piece_bytes, **more)
    return [*filling, *cut_compared(sample.plan, tensors, piece_bytes=piece_bytes, **more)]


@pytest.mark.parametrize("piece_bytes", [64, 300, 4096, 1 << 20])
def test_no_piece_is_larger_than_it_may_be_and_no_byte_is_in_two(piece_bytes: int, sample: Make) -> None:
    made = sample()
    pieces = pieces_of(made, piece_bytes)
    assert max(piece.nbytes for piece in pieces) <= piece_bytes
    for file in made.checkpoint.files:
        spans = sorted((p.position, p.position + p.nbytes) for p in pieces if p.file == file)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert sum(p.nbytes for p in pieces) == sum(info.nbytes for info in made.checkpoint.tensors.values())


def test_pieces_come_in_the_order_of_the_bytes(sample: Make) -> None:
    made = sample(copy=False)
    pieces = pieces_of(made, 300)
    of_files = [[p.position for p in pieces if p.file == file] for file in made.checkpoint.files]
    assert all(positions == sorted(positions) for positions in of_files)
    assert [p.file for p in pieces] == sorted((p.file for p in pieces), key=made.checkpoint.files.index)


def test_the_same_is_read_whether_parameters_come_together_or_apart(sample: Make) -> None:
    made = sample()
    tensors = [Tensor(i.name, i.file, i.offset, i.dtype) for i in made.checkpoint.tensors.values()]
    together = [each for piece in cut(made.plan, tensors, piece_bytes=300) for each in _elements(piece)]
    groups = cut_apart(made.plan, tensors, piece_bytes=300, apart=frozenset({"stacked", "apart.1"}))
    apart = [each for group in groups.values() for piece in group for each in _elements(piece)]
    assert sorted(apart) == sorted(together)


def _elements(piece: Piece) -> list[tuple[str, str, int, Step]]:
    return [(p.source, p.target, piece.position + p.start, p.step) for p in piece.placements]


def test_neighbours_are_read_together(sample: Make) -> None:
    assert len(pieces_of(sample(copy=False), 1 << 20)) == 2  # as many as files


def test_what_is_computed_in_float64_comes_in_smaller_pieces(sample: Make) -> None:
    affine = [
        each
        for piece in pieces_of(sample(), 512)
        for each in piece.placements
        if each.step.affine != IDENTITY and each.target == "shifted"
    ]
    assert affine
    assert all(each.span <= 512 // WIDENED for each in affine)


def test_what_is_assembled_has_pieces_of_its_own(sample: Make) -> None:
    made = sample()
    tensors = [Tensor(i.name, i.file, i.offset, i.dtype) for i in made.checkpoint.tensors.values()]
    groups = cut_apart(made.plan, tensors, piece_bytes=1 << 20, apart=frozenset({"stacked", "run"}))
    assert set(groups) == {"", "stacked", "run"}
    for name, group in groups.items():
        targets = {each.target for piece in group for each in piece.placements}
        assert targets == {name} if name else not targets & {"stacked", "run"}


def test_parts_that_lie_within_each_other_without_a_common_cut_are_read_apart() -> None:
    """Every second element of a tensor here, a block of it there."""
    from tepatch.transfer.pieces import _split

    every_second = Step("s", (32,), (2,), 0, (1,), 0, IDENTITY, False)
    block = Step("s", (16,), (1,), 8, (1,), 0, IDENTITY, False)
    parts = list(_split([("a", every_second), ("b", block)], 16))
    covered = {name: sum(step.numel for group in parts for target, step in group if target == name) for name in "ab"}
    assert covered == {"a": 32, "b": 16}
    assert item_size("BF16") == 2
