"""Running what has been cut: the main thread takes memory for the parameters and hands out pieces to threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType

import torch

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.reading import ByteReader, is_cached
from tepatch.planning.plan import Plan
from tepatch.progress import ProgressBar
from tepatch.transfer.interrupts import uninterrupted
from tepatch.transfer.pieces import Piece
from tepatch.transfer.placing import Doubts, Target
from tepatch.transfer.settings import Reading
from tepatch.transfer.turns import quick_turns
from tepatch.transfer.work import Group, Order, Spent, Work, new_event

Allocate = Callable[[str], torch.Tensor]
"""From a parameter's name to memory for it, or for this process's shard of it."""
Seal = Callable[[str, torch.Tensor], None]
"""Takes a parameter that is assembled, whole."""


class Stream:
    """Reads pieces of a checkpoint's files into parameters. A context: afterwards nothing is open or pinned.

    ``device`` is where most parameters are. ``allocate`` is called from the thread that calls ``run`` only.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        reading: Reading,
        *,
        device: torch.device,
        allocate: Allocate,
        bar: ProgressBar,
    ) -> None:
        self.plan = plan
        stamps = {file: stamp for file in checkpoint.files if (stamp := checkpoint.stamp(file)) is not None}
        self._is_cached = {file: is_cached(stamp) for file, stamp in stamps.items()}
        self.reading = reading.settled(is_cached=all(self._is_cached.values()))
        self.device = device
        self.doubts = Doubts()
        self.bar = bar
        self.bytes_read = 0
        self.spent = Spent()
        """Of all readers."""
        self.moving = Spent()
        """Of the mover."""
        self.allocate_seconds = 0.0
        self.unpinned = 0
        """Buffers for a GPU that the system did not let be pinned."""
        self._checkpoint = checkpoint
        self._allocate = allocate
        self._readers: dict[str, ByteReader] = {}
        self._targets: dict[str, Target] = {}
        self._lock = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._targets.clear()
        self._readers.clear()
        self._open.close()

    def reserve(self, names: Iterable[str]) -> None:
        """Take memory for these parameters before anything is read: a GPU does little else while it gives some."""
        for name in names:
            self._target(name)

    def run(
        self,
        groups: Mapping[str, Iterable[Piece]],
        seal: Seal | None = None,
        sizes: Mapping[str, int] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Read all pieces and return when all is in its place.

        ``groups`` are pieces by names. One with a name is one parameter, which is given to ``seal`` once it is whole.
        ``sizes`` has its bytes: as many are in memory at once as take no more than two of the largest would.
        ``meanwhile`` is called when all that is left is to wait. Raises ``CheckpointError`` or ``LoadError``; what
        allocating or ``meanwhile`` raises goes through. An interrupt is raised when all threads have ended, which they
        do with the piece that they are at.
        """
        work = Work(self)
        uninterrupted(partial(self._run, work, groups, seal, sizes or {}, meanwhile), work.fail)

    @quick_turns()  # this thread would hold up the others
    def _run(
        self,
        work: Work,
        groups: Mapping[str, Iterable[Piece]],
        seal: Seal | None,
        sizes: Mapping[str, int],
        meanwhile: Callable[[], None] | None,
    ) -> None:
        most = 2 * max(sizes.values(), default=0)
        staged: dict[str, int] = {}
        try:
            work.start()
            for name, pieces in groups.items():
                group = None
                if name:
                    pieces = tuple(pieces)
                    group = Group(name, len(pieces))
                while group is not None and staged and sum(staged.values()) + sizes[name] > most and not work.failed:
                    staged.pop(self._sealed(work, seal), None)
                for piece in pieces:
                    if work.failed:
                        break
                    work.orders.put(Order(piece, {p.target: self._target(p.target) for p in piece.placements}, group))
                if group is not None:
                    staged[name] = sizes[name]
                if work.failed:
                    break
            if meanwhile is not None and not work.failed:
                meanwhile()
            while staged and not work.failed:
                staged.pop(self._sealed(work, seal), None)
            work.finish()
        except BaseException as error:
            work.fail(error)
            work.finish()
            work.failed.clear()  # errors hold frames, and these parameters
            raise
        finally:
            for used in {target.device for target in self._targets.values() if target.is_cuda}:
                torch.cuda.synchronize(used)
        if work.failed:
            first = work.failed[0]
            work.failed.clear()
            raise first

    def verify(self) -> None:
        """Raise ``CheckpointError`` if a file that was read has changed since its header was."""
        for reader in self._readers.values():
            reader.stamp.verify()

    def is_asked_ahead(self, file: str) -> bool:
        """Whether the system is told what will be read of a file."""
        return self.reading.cache == "use" and not self._is_cached[file]

    @property
    def looks_ahead(self) -> bool:
        """Whether it is of any file."""
        return any(map(self.is_asked_ahead, self._is_cached))

    def reader(self, file: str) -> ByteReader:
        """The open file."""
        with self._lock:
            if (reader := self._readers.get(file)) is None:
                stamp = self._checkpoint.stamp(file)
                assert stamp is not None
                past_cache = self.reading.cache == "bypass" and not self._is_cached[file]
                opened = ByteReader(stamp, past_cache=past_cache)
                self._open.callback(opened.close)
                reader = self._readers[file] = opened
            return reader

    def _target(self, name: str) -> Target:
        if (target := self._targets.get(name)) is None:
            started = time.perf_counter()
            tensor = self._allocate(name)
            event = None
            if tensor.is_cuda:
                event = new_event()
                event.record(torch.cuda.current_stream(tensor.device))
            target = self._targets[name] = Target(tensor, event)
            self.allocate_seconds += time.perf_counter() - started
        return target

    def _sealed(self, work: Work, seal: Seal | None) -> str:
        """Wait for a parameter to be whole and give it away; gives its name, or none if a thread has failed instead."""
        if (group := work.whole.get()) is None:
            return ""
        tensor = self._targets.pop(group.name).tensor
        if group.event is not None:
            group.event.wait(torch.cuda.current_stream(tensor.device))
        if seal is not None:
            seal(group.name, tensor)
        return group.name
