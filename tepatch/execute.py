"""Executing a plan, in either direction, one tensor at a time.

Loading walks the checkpoint's files in order and copies each source straight into a strided view of its final
parameter: every parameter is allocated once, on its final device, and no file stays open after its last tensor.
Saving reads the same pairs of views from the other side. Nothing here knows a model: parameters are handed out
as plain tensors, so that a load that fails has touched no module.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tepatch.checkpoint import Checkpoint, TensorInfo, torch_dtype
from tepatch.errors import CheckpointError, LoadError, Problem
from tepatch.mapping.bind import IDENTITY
from tepatch.mapping.plan import Copy, Fill, Plan

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a load took: wall-clock seconds, and bytes of the checkpoint."""

    bytes_read: int
    seconds: float


def load_tensors(
    plan: Plan, checkpoint: Checkpoint, *, device: torch.device, progress: bool | None = None
) -> tuple[dict[str, torch.Tensor], Timing]:
    """Read a checkpoint into new tensors, one for each parameter of the plan that is not tied.

    Shapes and dtypes are those of ``plan.targets``. Memory: the tensors themselves and at most one source
    tensor. ``progress`` shows a bar on stderr (default: when that is a terminal). Raises ``LoadError`` when
    memory runs out and ``CheckpointError`` when a file can not be read or a redundant copy differs.
    """
    started = time.perf_counter()
    out: dict[str, torch.Tensor] = {}
    done = 0
    try:
        with _Bar(plan.source_bytes, progress) as bar:
            for fill in plan.fills:
                _apply_fill(fill, _allocate(out, plan, fill.target, device))
            for file, steps in _visits(plan, checkpoint):
                with checkpoint.open(file) as shard:
                    for info, copies in steps:
                        source = shard.read(info)
                        for copy in copies:
                            _load(copy, source, _allocate(out, plan, copy.target, device))
                        if not copies:
                            _check_redundant(plan, info, source, out)
                        done += info.nbytes
                        bar.advance(info.nbytes)
                        del source
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except BaseException as error:
        # Give the memory back now: the error's traceback keeps every frame, and their tensors, alive.
        out.clear()
        traceback.clear_frames(error.__traceback__)
        if not _is_out_of_memory(error):
            raise
        raise LoadError(
            Problem(
                where=plan.location,
                what=f"out of memory on {device} after reading {done:,} of {plan.source_bytes:,} bytes",
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
    """
    by_source: dict[str, list[Copy]] = {}
    for copy in plan.copies:
        by_source.setdefault(copy.source, []).append(copy)
    for name, entry in plan.sources.items():
        if entry.state == "ignored":
            continue
        dtype = torch_dtype(entry.dtype)
        if entry.state == "redundant":
            yield name, parameters[entry.note].detach().to(dtype, copy=True)
            continue
        copies = by_source[name]
        source = torch.empty(entry.shape, dtype=dtype, device=parameters[copies[0].target].device)
        for copy in copies:
            _save(copy, parameters[copy.target].detach(), source)
        yield name, source


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


def _allocate(out: dict[str, torch.Tensor], plan: Plan, name: str, device: torch.device) -> torch.Tensor:
    tensor = out.get(name)
    if tensor is None:
        entry = plan.targets[name]
        tensor = out[name] = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=device)
    return tensor


def _view(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def _load(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
    pair = copy.pair
    if target.device != source.device:
        source = source.to(target.device)
    seen = _view(source.contiguous(), pair.sizes, pair.source_strides, pair.source_offset)
    place = _view(target, pair.sizes, pair.target_strides, pair.target_offset)
    if copy.affine != IDENTITY:
        # In float64, so that the only rounding is the one to the target's dtype.
        seen = seen.double().mul_(copy.affine.scale).add_(copy.affine.offset)
    place.copy_(seen)
    # float16 ends at 65504. A number beyond it becomes infinite, and the model NaN, without a word from torch.
    if target.dtype == torch.float16 != seen.dtype and torch.isinf(place).any() and not torch.isinf(seen).any():
        raise LoadError(
            Problem(
                where=copy.source,
                what="values that float16 can not hold",
                expected=f"at most {torch.finfo(torch.float16).max}",
                found=str(float(seen.abs().max())),
                fix="load in bfloat16 or float32",
            )
        )


def _save(copy: Copy, target: torch.Tensor, source: torch.Tensor) -> None:
    pair = copy.pair
    seen = _view(target.contiguous(), pair.sizes, pair.target_strides, pair.target_offset)
    place = _view(source, pair.sizes, pair.source_strides, pair.source_offset)
    if copy.affine != IDENTITY:
        seen = seen.double().sub_(copy.affine.offset).div_(copy.affine.scale)
    place.copy_(seen)


def _apply_fill(fill: Fill, target: torch.Tensor) -> None:
    pair = fill.pair
    _view(target, pair.sizes, pair.target_strides, pair.target_offset).fill_(fill.value)


def _check_redundant(plan: Plan, info: TensorInfo, source: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
    name = plan.sources[info.name].note
    target = out[name]
    if not torch.equal(source.to(target.device, target.dtype), target):
        raise CheckpointError(
            Problem(
                where=f"{plan.location}/{info.file}",
                what=f"{info.name} differs from {name}, and the config says that they are one parameter",
                fix="set tie_word_embeddings=False in config.json if both are meant to be kept",
            )
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class _Bar:
    """A progress bar over bytes, on stderr, if wanted."""

    def __init__(self, total: int, wanted: bool | None) -> None:
        self._bar = None
        if wanted if wanted is not None else sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="loading")

    def __enter__(self) -> _Bar:
        return self

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
