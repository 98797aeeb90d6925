"""A second copy of a tied tensor, read by its bytes or its name, whole or in shards: equal to the bit, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streaming_sample import plan_for, write_sample

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError
from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.shards import Cut

Change = Callable[[torch.Tensor], None]
CUTS = {
    "whole": [],
    "rows": [Cut(0, 30, 20)],
    "columns": [Cut(1, 8, 16)],
    "rows of columns": [Cut(1, 8, 16), Cut(0, 30, 20)],
    "nothing": [Cut(0, 30, 0)],
}
"""What a process has of ``embed`` [90, 32]."""


@pytest.fixture(params=["bytes", "name"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Loads a sample in which ``change`` has altered the copy, and ``both`` the tensor and the copy."""

    def made(*, change: Change | None = None, both: Change | None = None, cuts: list[Cut]) -> torch.Tensor:
        def altered(tensors: dict[str, torch.Tensor]) -> None:
            for name in ("embed", "head"):
                if both is not None:
                    both(tensors[name])
            if change is not None:
                change(tensors["head"])

        write_sample(tmp_path / "sample", altered)
        folder, plan = tmp_path / "sample", plan_for(tmp_path / "sample")
        if request.param == "name":  # what is pickled has no bytes of its own
            stored = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).items()]
            (tmp_path / "pickled").mkdir()
            torch.save(dict(stored), tmp_path / "pickled" / "pytorch_model.bin")
            folder = tmp_path / "pickled"
            plan = plan_for(folder)
        checkpoint = open_checkpoint(folder)
        to = Destination(device=torch.device("cpu"), shards={"embed": cuts} if cuts else {})
        out, _ = load_tensors(plan, checkpoint, to=to, progress=False)
        return out["embed"]

    return made


def at(row: int, column: int, value: float) -> Change:
    def change(tensor: torch.Tensor) -> None:
        tensor[row, column] = value

    return change


@pytest.mark.parametrize("kind", CUTS)
def test_an_equal_copy_is_taken(kind: str, load: Callable[..., Any]) -> None:
    shape = [90, 32]
    for cut in CUTS[kind]:
        shape[cut.dim] = cut.size
    assert list(load(cuts=CUTS[kind]).shape) == shape


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [
        ("whole", 0, 0),
        ("whole", 89, 31),
        ("rows", 30, 31),
        ("rows", 49, 0),
        ("columns", 89, 8),
        ("columns", 0, 23),
        ("rows of columns", 30, 8),
        ("rows of columns", 49, 23),
    ],
)
def test_a_copy_that_differs_in_one_element_that_is_here_is_an_error(
    kind: str, row: int, column: int, load: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match="head differs from embed"):
        load(change=at(row, column, 7.0), cuts=CUTS[kind])


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [("rows", 29, 0), ("rows", 50, 0), ("columns", 0, 7), ("columns", 0, 24), ("rows of columns", 29, 8)],
)
def test_what_another_process_has_is_compared_there(kind: str, row: int, column: int, load: Callable[..., Any]) -> None:
    load(change=at(row, column, 7.0), cuts=CUTS[kind])


@pytest.mark.parametrize("kind", ["whole", "rows"])
def test_copies_are_compared_by_their_bits(kind: str, load: Callable[..., Any]) -> None:
    """By value NaN would differ from itself, and -0.0 be what 0.0 is."""
    assert torch.isnan(load(both=at(31, 1, float("nan")), cuts=CUTS[kind])).any()


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (-0.0, 0.0)])
def test_zeros_of_two_signs_differ(one: float, other: float, load: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="head differs from embed"):
        load(both=at(31, 1, one), change=at(31, 1, other), cuts=[])
