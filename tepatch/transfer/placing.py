"""Writing what was read where it belongs, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tepatch.dtypes import torch_dtype
from tepatch.planning.plan import Plan
from tepatch.transfer.pieces import Piece, Placement
from tepatch.transfer.steps import bits_of, differing_copy, overflow, put, put_unchecked


@dataclass(slots=True)
class Target:
    """A parameter, or the shard of one, that is being filled."""

    tensor: torch.Tensor
    is_ready: torch.cuda.Event | None = None
    """When its memory may be written to: others may have used it until then."""
    flat: torch.Tensor = field(init=False)
    """Its bytes, in order."""
    device: torch.device = field(init=False)
    is_cuda: bool = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        # Each is asked for with every piece, and torch makes it anew every time.
        self.flat = self.tensor.as_strided((self.tensor.numel(),), (1,)).view(torch.uint8)
        self.device, self.is_cuda, self.dtype = self.tensor.device, self.tensor.is_cuda, self.tensor.dtype


class Doubts:
    """What is only known on a GPU, and asked for once, at the end: numbers that became infinite, copies that differ."""

    def __init__(self) -> None:
        self._flags: list[tuple[Placement, torch.Tensor]] = []

    def add(self, placement: Placement, flag: torch.Tensor | None) -> None:
        """``flag`` (one bool) says whether something is wrong with ``placement``. Threads may share this."""
        if flag is not None:
            self._flags.append((placement, flag))

    def confirmed(self) -> list[Placement]:
        """Those with which something is wrong. Waits for the GPU."""
        if not self._flags:
            return []
        flags = torch.stack([flag.to("cpu", non_blocking=False) for _, flag in self._flags])
        return [self._flags[i][0] for i in flags.nonzero().flatten().tolist()]


def is_run(placement: Placement, target: Target) -> bool:
    """Whether the bytes go to the parameter as they are, one after the other."""
    return not placement.is_compared and placement.step.is_run and torch_dtype(placement.dtype) == target.dtype


def bytes_in(placement: Placement, target: Target) -> torch.Tensor:
    """The bytes of a parameter that a run goes to."""
    start = placement.step.write_offset * target.dtype.itemsize
    return target.flat[start : start + placement.span]


def scattered(piece: Piece, targets: Mapping[str, Target]) -> Sequence[torch.Tensor] | None:
    """Where a piece goes on the CPU if it is nothing but runs one after the other; None if it is not."""
    out, at = [], 0
    for placement in piece.placements:
        target = targets[placement.target]
        if target.is_cuda or placement.start != at or not is_run(placement, target):
            return None
        out.append(bytes_in(placement, target))
        at += placement.span
    return out if at == piece.nbytes else None


def place(plan: Plan, placement: Placement, held: torch.Tensor, target: Target, doubts: Doubts) -> None:
    """Write a part of ``held``, the bytes of a piece on the target's device, to the target, or compare it.

    On a CPU raises ``LoadError`` for a value that the target can not hold and ``CheckpointError`` for a copy that
    differs; on a GPU these are added to ``doubts``.
    """
    dtype = torch_dtype(placement.dtype)
    assert dtype is not None
    source = held[placement.start : placement.start + placement.span].view(dtype)
    out = target.tensor
    if placement.is_compared:
        seen = source.as_strided(placement.step.sizes, placement.step.read_strides, source.storage_offset()).to(
            out.dtype
        )
        offset = out.storage_offset() + placement.step.write_offset
        there = out.as_strided(placement.step.sizes, placement.step.write_strides, offset)
        differs = (bits_of(seen) != bits_of(there)).any()
        if out.is_cuda:
            doubts.add(placement, differs)
        elif bool(differs):
            raise differing_copy(plan, placement.source)
    elif out.is_cuda:
        doubts.add(placement, overflow(*put_unchecked(placement.step, source, out)))
    else:
        put(placement.step, source, out)
