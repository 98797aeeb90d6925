"""Executing a plan, in either direction.

Loading reads a checkpoint's files in order and puts each part of each source straight into a strided view of its final
parameter: every parameter is allocated once, on its final device. Files of plain bytes go through ``streaming``, what
has to be asked for by name (pickled files, fresh weights, libraries) one tensor at a time. Saving reads the same pairs
of views from the other side. Nothing here knows a model: parameters are handed out as plain tensors, so that a load
that fails has touched no module.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

import torch

from tepatch.checkpoint import Checkpoint, TensorInfo
from tepatch.dtypes import item_size, torch_dtype
from tepatch.errors import LoadError, Problem, first_line
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Plan, Step
from tepatch.progress import ProgressBar
from tepatch.transfer.pieces import Piece, Tensor, cut, cut_apart, cut_compared
from tepatch.transfer.settings import Reading
from tepatch.transfer.shards import Cut, clip, shard_shape
from tepatch.transfer.steps import (
    assemble,
    check_constants,
    check_copy,
    differing_copy,
    is_out_of_memory,
    overflow_error,
    put,
)
from tepatch.transfer.stream import Stream

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""From a parameter's name, shape and dtype to new memory for it."""
Seal = Callable[[torch.Tensor], torch.Tensor]
"""From a parameter, once it is whole, to what is kept of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a load took: wall-clock seconds, and bytes of the checkpoint."""

    bytes_read: int
    seconds: float
    stages: Mapping[str, float]
    """Parts of ``seconds``, see ``Report.seconds``."""
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Destination:
    """Where parameters go: all of them to ``device``, but for what is said otherwise."""

    device: torch.device
    allocate: Allocate | None = None
    """Gives memory to a parameter (default: new memory on ``device``)."""
    shards: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    """The part of a parameter that is wanted here, for those that are not wanted whole."""
    seals: Mapping[str, Seal] = field(default_factory=dict)
    """For parameters that are not kept as they are read: what each is given to once it is assembled."""


def load_tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    to: Destination,
    reading: Reading | None = None,
    progress: bool | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[dict[str, torch.Tensor], Timing]:
    """Read a checkpoint into new tensors, one for each parameter of the plan that is not tied.

    Shapes and dtypes are those of ``plan.targets``, or of the shard that is wanted. Memory: the tensors themselves,
    and what ``reading`` says; for a file that can not be read by its bytes, one source tensor. ``progress`` shows a bar
    on stderr (default: when that is a terminal). ``meanwhile`` is called once unless something has failed before; while
    files are being read, if any is read by its bytes. Raises ``LoadError`` when memory runs out or a dtype can not hold
    a value, and ``CheckpointError`` when a file can not be read or a redundant copy differs.
    """
    started = time.perf_counter()
    load = _Load(plan, checkpoint, to, reading or Reading(), meanwhile)
    try:
        with ProgressBar(plan.source_bytes, progress, "loading") as bar:
            load.run(bar)
    except BaseException as error:
        # Give the memory back now: the error's traceback keeps every frame, and their tensors, alive.
        load.out.clear()
        traceback.clear_frames(error.__traceback__)
        if not is_out_of_memory(error):
            raise
        on = f" on {to.device}" if to.allocate is None else ""
        raise LoadError(
            Problem(
                where=plan.location,
                what=f"out of memory{on} after reading {load.bytes_read:,} of {plan.source_bytes:,} bytes",
                expected=f"{plan.target_bytes:,} bytes for the model's parameters",
                found=first_line(error),
                fix="use a device with more memory or a smaller dtype; nothing was kept of this load",
            )
        ) from None
    seconds = time.perf_counter() - started
    return load.out, Timing(bytes_read=load.bytes_read, seconds=seconds, stages=load.stages, notes=tuple(load.notes))


class _Load:
    """One load under way."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        to: Destination,
        reading: Reading,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.to = to
        self.reading = reading
        self.meanwhile = meanwhile
        self.out: dict[str, torch.Tensor] = {}
        self.bytes_read = 0
        self.stages: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self, bar: ProgressBar) -> None:
        """Fill ``out``."""
        streamed, named = self._ways()
        by_name = {info.name for info in named}
        # Not whole when its bytes have been read, or needed as it is until copies of it have been compared.
        later = {copy.target for copy in self.plan.copies if copy.source in by_name}
        later |= {entry.note for entry in self.plan.sources.values() if entry.state == "redundant"}
        staged = frozenset(self.to.seals.keys() - later)
        comparing = cut_compared(self.plan, streamed, piece_bytes=self.reading.piece_bytes, clip=self._clip)
        with Stream(
            self.plan, self.checkpoint, self.reading, device=self.to.device, allocate=self._allocated, bar=bar
        ) as stream:
            try:
                by_bytes = {tensor.name for tensor in streamed}
                filled = {copy.target for copy in self.plan.copies if copy.source in by_bytes} - self.to.seals.keys()
                stream.reserve(name for name in self.plan.writes if name in filled)
                groups = self._groups(streamed, staged)
                stream.run(groups, self._seal, {name: self._nbytes(name) for name in staged}, self.meanwhile)
                self._read_named(named, bar)
                for name in self.plan.writes:
                    self._allocated(name)  # what is made of constants only, or empty
                if comparing:
                    stream.run({"": comparing})
                self._compare_named(named, bar)
                for name in self.to.seals.keys() - (staged & groups.keys()):  # also those with nothing to read
                    self._seal(name, self.out[name])
                self._settle_doubts(stream)
                stream.verify()
            finally:
                self.bytes_read += stream.bytes_read
        threads, spent = stream.reading.num_threads, stream.spent
        self.stages = {
            "allocate": stream.allocate_seconds,
            "read": spent.read / threads,
            "copy": spent.copy / threads,
            "place": spent.place / threads + stream.moving.place,
        }
        if stream.unpinned:
            self.notes.append("the system let no memory be pinned (ulimit -l), which makes copies to a GPU slower")

    def _groups(self, streamed: Sequence[Tensor], staged: frozenset[str]) -> Mapping[str, Iterable[Piece]]:
        """What fills the parameters, in the groups of ``Stream.run``."""
        piece_bytes = self.reading.piece_bytes
        if not staged:
            return {"": cut(self.plan, streamed, piece_bytes=piece_bytes, clip=self._clip)}
        return cut_apart(self.plan, streamed, piece_bytes=piece_bytes, clip=self._clip, apart=staged)

    def _ways(self) -> tuple[list[Tensor], list[TensorInfo]]:
        """What is read by its bytes, and what by its name."""
        streamed: list[Tensor] = []
        named: list[TensorInfo] = []
        is_direct = self.reading.source == "direct"
        is_bytes = {file: is_direct and self.checkpoint.stamp(file) is not None for file in self.checkpoint.files}
        wanted = {copy.source for copy in self.plan.copies}
        for info in self.checkpoint.tensors.values():  # files in order, then offsets
            if info.name not in wanted and self.plan.sources[info.name].state != "redundant":
                continue
            if is_bytes[info.file]:
                streamed.append(Tensor(info.name, info.file, info.offset, info.dtype))
            else:
                named.append(info)
        return streamed, named

    def _clip(self, name: str, step: Step) -> Sequence[Step]:
        cuts = self.to.shards.get(name)
        return clip(step, self.plan.targets[name].shape, cuts) if cuts else (step,)

    def _allocated(self, name: str) -> torch.Tensor:
        """A parameter's memory, its constant parts filled."""
        if (tensor := self.out.get(name)) is not None:
            return tensor
        entry, dtype = self.plan.targets[name], torch_dtype(self.plan.targets[name].dtype)
        assert dtype is not None
        shape = shard_shape(entry.shape, self.to.shards.get(name, ()))
        if self.to.allocate is None:
            tensor = torch.empty(shape, dtype=dtype, device=self.to.device)
        else:
            tensor = self.to.allocate(name, shape, dtype)
        for fill in self.plan.constants.get(name, ()):
            sizes, _, strides, _, offset = fill.pair
            whole = Step("", sizes, strides, offset, strides, offset, IDENTITY, False)
            for step in self._clip(name, whole):
                tensor.as_strided(step.sizes, step.write_strides, step.write_offset).fill_(fill.value)
        self.out[name] = tensor
        return tensor

    def _nbytes(self, name: str) -> int:
        """What a parameter takes, whole or its shard, in bytes."""
        entry = self.plan.targets[name]
        return prod(shard_shape(entry.shape, self.to.shards.get(name, ()))) * item_size(entry.dtype)

    def _seal(self, name: str, tensor: torch.Tensor) -> None:
        del self.out[name]
        self.out[name] = self.to.seals[name](tensor)

    def _read_named(self, named: Sequence[TensorInfo], bar: ProgressBar) -> None:
        steps: dict[str, list[tuple[str, Step]]] = {}
        for copy in self.plan.copies:
            steps.setdefault(copy.source, []).append((copy.target, copy.step()))
        for info, source in self._tensors([info for info in named if info.name in steps]):
            for target, step in steps[info.name]:
                for part in self._clip(target, step):
                    put(part, source, self._allocated(target))
            self._count(info, bar)

    def _compare_named(self, named: Sequence[TensorInfo], bar: ProgressBar) -> None:
        """Redundant copies come last: the parameter that one must be equal to may be filled from any file."""
        notes = {info.name: self.plan.sources[info.name].note for info in named}
        for info, copy in self._tensors([info for info in named if notes[info.name]]):
            part = copy
            for each in self.to.shards.get(notes[info.name], ()):
                part = part.narrow(each.dim, each.start, each.size)
            check_copy(self.plan, info.name, part, self.out[notes[info.name]])
            self._count(info, bar)

    def _tensors(self, infos: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """The tensors of ``infos``, which are in the order of the files; each good until the next is asked for."""
        for file, wanted in groupby(infos, key=lambda info: info.file):
            with self.checkpoint.open(file) as shard:
                for info in wanted:
                    yield info, shard.read(info)

    def _count(self, info: TensorInfo, bar: ProgressBar) -> None:
        self.bytes_read += info.nbytes
        bar.advance(info.nbytes)

    def _settle_doubts(self, stream: Stream) -> None:
        for placement in stream.doubts.confirmed():
            if placement.is_compared:
                raise differing_copy(self.plan, placement.source)
            info = self.checkpoint.tensors[placement.source]
            with self.checkpoint.open(info.file) as shard:
                values = shard.read(info)
                dtype = torch_dtype(self.plan.targets[placement.target].dtype)
                assert dtype is not None
                raise overflow_error(placement.step, values, dtype)


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
