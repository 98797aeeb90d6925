"""Executing a plan, in either direction, one tensor at a time.

Loading walks the checkpoint's files in order and copies each source straight into a strided view of its final
parameter: every parameter is allocated once, on its final device, and no file stays open after its last tensor.
Saving reads the same pairs of views from the other side. Nothing here knows a model: parameters are handed out
as plain tensors, so that a load that fails has touched no module.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tepatch.assembly import assemble, check_constants, check_copy, is_out_of_memory, put
from tepatch.checkpoint import Checkpoint, TensorInfo, torch_dtype
from tepatch.errors import LoadError, Problem
from tepatch.mapping.plan import Copy, Fill, Plan
from tepatch.progress import ProgressBar

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""From a parameter's name, shape and dtype to new memory for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a load took: wall-clock seconds, and bytes of the checkpoint."""

    bytes_read: int
    seconds: float


def load_tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    allocate: Allocate | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, torch.Tensor], Timing]:
    """Read a checkpoint into new tensors, one for each parameter of the plan that is not tied.

    Shapes and dtypes are those of ``plan.targets``. They are on ``device``, unless ``allocate`` puts each where it
    belongs. Memory: the tensors themselves and at most one source tensor. ``progress`` shows a bar on stderr (default:
    when that is a terminal). Raises ``LoadError`` when memory runs out and ``CheckpointError`` when a file can not be
    read or a redundant copy differs.
    """
    started = time.perf_counter()
    out: dict[str, torch.Tensor] = {}
    done = 0
    is_one_device = allocate is None
    allocate = allocate or partial(_on, device)
    try:
        with ProgressBar(plan.source_bytes, progress, "loading") as bar:
            for fill in plan.fills:
                _apply_fill(fill, _allocated(out, plan, fill.target, allocate))
            for file, steps in _visits(plan, checkpoint):
                with checkpoint.open(file) as shard:
                    for info, copies in steps:
                        source = shard.read(info)
                        for copy in copies:
                            put(copy.step(), source, _allocated(out, plan, copy.target, allocate))
                        if not copies:
                            check_copy(plan, info.name, source, out[plan.sources[info.name].note])
                        done += info.nbytes
                        bar.advance(info.nbytes)
                        del source
        for used in {tensor.device for tensor in out.values() if tensor.is_cuda}:
            torch.cuda.synchronize(used)
    except BaseException as error:
        # Give the memory back now: the error's traceback keeps every frame, and their tensors, alive.
        out.clear()
        traceback.clear_frames(error.__traceback__)
        if not is_out_of_memory(error):
            raise
        on = f" on {device}" if is_one_device else ""
        raise LoadError(
            Problem(
                where=plan.location,
                what=f"out of memory{on} after reading {done:,} of {plan.source_bytes:,} bytes",
                expected=f"{plan.target_bytes:,} bytes for the model's parameters",
                found=str(error).splitlines()[0],
                fix="use a device with more memory or a smaller dtype; nothing was kept of this load",
            )
        ) from None
    return out, Timing(bytes_read=done, seconds=time.perf_counter() - started)


def restore_tensors(plan: Plan, parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The plan backwards: yield each source tensor, rebuilt from the model's ``parameters``, one at a time.

    Names, shapes and dtypes are the checkpoint's own. A source that the plan calls redundant is yielded as the
    parameter it copies; ignored sources are not. Tensors are new, contiguous, and on the parameters' device.
    Raises ``SaveError`` when a part that the checkpoint has no place for is no longer the constant that it was.
    """
    reverse = plan.reverse()
    detached = {name: tensor.detach() for name, tensor in parameters.items()}
    check_constants(reverse, detached.__getitem__)
    for name in reverse.writes:
        yield name, assemble(reverse, name, detached.__getitem__)


def _visits(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, list[tuple[TensorInfo, list[Copy]]]]]:
    """Files to open and what to read in each, in the order of the bytes.

    Redundant copies come last (without copies, to be compared): the parameter that such a tensor must be equal
    to may be filled from any file.
    """
    by_source: dict[str, list[Copy]] = {}
    for copy in plan.copies:
        by_source.setdefault(copy.source, []).append(copy)
    first: dict[str, list[tuple[TensorInfo, list[Copy]]]] = {}
    second: dict[str, list[tuple[TensorInfo, list[Copy]]]] = {}
    for info in checkpoint.tensors.values():  # files in order, then offsets
        if info.name in by_source:
            first.setdefault(info.file, []).append((info, by_source[info.name]))
        elif plan.sources[info.name].state == "redundant":
            second.setdefault(info.file, []).append((info, []))
    return [*first.items(), *second.items()]


def _allocated(out: dict[str, torch.Tensor], plan: Plan, name: str, allocate: Allocate) -> torch.Tensor:
    tensor = out.get(name)
    if tensor is None:
        entry, dtype = plan.targets[name], torch_dtype(plan.targets[name].dtype)
        assert dtype is not None
        tensor = out[name] = allocate(name, entry.shape, dtype)
    return tensor


def _on(device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _view(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def _apply_fill(fill: Fill, target: torch.Tensor) -> None:
    pair = fill.pair
    _view(target, pair.sizes, pair.target_strides, pair.target_offset).fill_(fill.value)
