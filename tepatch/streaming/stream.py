"""Running it: threads that each read a piece of a file, and one that sends what they have read to GPUs.

The main thread takes memory for the parameters, in the order in which they are needed, and hands out pieces. Readers do
nothing but read, each into a buffer of a common ring: they would wait for each other's turn in Python otherwise. For a
GPU the ring is pinned, and one thread, the mover, has the device copy from it while the readers go on. What is a run of
bytes goes straight into its parameter; what is not (another dtype, another order) is brought to the device as it is and
put in its place there. For a parameter on the CPU, runs are read straight into it, and readers put the rest in place.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from types import TracebackType

import torch

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.reading import ByteReader
from tepatch.checkpoint.writing import tensor_bytes
from tepatch.mapping.plan import Plan
from tepatch.progress import ProgressBar
from tepatch.streaming.memory import HostMemory
from tepatch.streaming.pieces import Piece
from tepatch.streaming.placing import Doubts, Target, bytes_in, is_run, place, scattered
from tepatch.streaming.settings import Reading

Allocate = Callable[[str], torch.Tensor]
"""From a parameter's name to memory for it, or for this process's shard of it."""
Seal = Callable[[str, torch.Tensor], None]
"""Takes a parameter that is assembled, whole."""
_MAX_STAGED = 2
"""Parameters that are assembled at once: one is read while the one before is still on its way."""


def new_event() -> torch.cuda.Event:
    """One that nothing has been recorded in: who waits for it goes on at once."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _has_passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Spent:
    """Seconds of threads, by what they went to."""

    read: float = 0.0
    """Waiting for the file system."""
    copy: float = 0.0
    """Waiting for a buffer that a GPU is done with."""
    place: float = 0.0
    """Sending bytes on their way, and putting them in another order or dtype."""

    def add(self, other: Spent) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True, eq=False)
class _Group:
    """Pieces that make one parameter whole."""

    name: str
    left: int
    event: torch.cuda.Event | None = None
    """When the last of them has arrived on its GPU."""


@dataclass(frozen=True, slots=True)
class _Order:
    piece: Piece
    targets: dict[str, Target]
    group: _Group | None


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
        self.reading = reading
        self.device = device
        self.doubts = Doubts()
        self.bar = bar
        self.bytes_read = 0
        self.spent = Spent()
        self.allocate_seconds = 0.0
        self.unpinned = 0
        """Threads whose buffers the system did not let be pinned."""
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

    def run(self, groups: Mapping[str, Iterable[Piece]], seal: Seal | None = None) -> None:
        """Read all pieces and return when all is in its place.

        A group with a name is one parameter, which is given to ``seal`` once it is whole; two are in memory at once.
        Raises ``CheckpointError`` or ``LoadError``; what allocating raises goes through.
        """
        work = _Work(self)
        work.start()
        staged = 0
        try:
            for name, pieces in groups.items():
                listed = list(pieces)
                group = _Group(name, len(listed)) if name else None
                if group is not None and staged == _MAX_STAGED:
                    staged -= self._sealed(work, seal)
                for piece in listed:
                    if work.failed:
                        break
                    work.orders.put(_Order(piece, {p.target: self._target(p.target) for p in piece.placements}, group))
                staged += group is not None
                if work.failed:
                    break
            while staged and not work.failed:
                staged -= self._sealed(work, seal)
        except BaseException as error:
            work.fail(error)
            raise
        finally:
            work.finish()
            for used in {target.tensor.device for target in self._targets.values() if target.tensor.is_cuda}:
                torch.cuda.synchronize(used)
        if work.failed:
            raise work.failed[0]

    def verify(self) -> None:
        """Raise ``CheckpointError`` if a file that was read has changed since its header was."""
        for reader in self._readers.values():
            reader.stamp.verify()

    def reader(self, file: str) -> ByteReader:
        """The open file."""
        with self._lock:
            if (reader := self._readers.get(file)) is None:
                stamp = self._checkpoint.stamp(file)
                assert stamp is not None
                opened = ByteReader(stamp)
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

    def _sealed(self, work: _Work, seal: Seal | None) -> int:
        """Wait for a parameter to be whole and give it away; 0 if a thread has failed instead."""
        if (group := work.whole.get()) is None:
            return 0
        tensor = self._targets.pop(group.name).tensor
        if group.event is not None:
            group.event.wait(torch.cuda.current_stream(tensor.device))
        if seal is not None:
            seal(group.name, tensor)
        return 1


@dataclass(slots=True, eq=False)
class _Buffer:
    """One buffer of the ring."""

    memory: HostMemory
    events: list[torch.cuda.Event] = field(default_factory=list)
    """When nothing is copied from it any more."""


class _Work:
    """The threads of one run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self.whole: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self.failed: list[BaseException] = []
        reading = stream.reading
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[_Order, _Buffer] | None] = queue.SimpleQueue()
        self._ring: list[_Buffer] = []
        self._lock = threading.Lock()
        self._readers = [
            threading.Thread(target=self._guarded, args=(self._reader,), name=f"tepatch-read-{i}", daemon=True)
            for i in range(reading.num_threads)
        ]
        self._mover = threading.Thread(target=self._guarded, args=(self._move,), name="tepatch-read-mover", daemon=True)

    def start(self) -> None:
        for thread in (*self._readers, self._mover):
            thread.start()

    def fail(self, error: BaseException) -> None:
        """Have everyone stop, and wait for nothing that will not come."""
        self.failed.append(error)
        self.whole.put(None)
        for _ in self._readers:
            self._free.put(None)

    def finish(self) -> None:
        """Wait until all that was ordered is done, or given up after a failure, and give the ring back."""
        for _ in self._readers:
            self.orders.put(None)
        for thread in self._readers:
            thread.join()
        self._read.put(None)
        self._mover.join()
        for buffer in self._ring:
            buffer.memory.close()

    def _guarded(self, run: Callable[[Spent], None]) -> None:
        spent = Spent()
        try:
            with torch.no_grad():
                run(spent)
        except BaseException as error:
            self.fail(error)
        finally:
            with self._lock:
                self.stream.spent.add(spent)

    def _reader(self, spent: Spent) -> None:
        while (order := self.orders.get()) is not None:
            if self.failed:
                continue
            piece, group = order.piece, order.group
            file = self.stream.reader(piece.file)
            started = time.perf_counter()
            if (parts := scattered(piece, order.targets)) is not None:
                file.scatter([tensor_bytes(part) for part in parts], piece.position)
                spent.read += time.perf_counter() - started
                del order, parts  # from now on this must keep no parameter alive
                self._done(piece, group)
                continue
            if (buffer := self._buffer()) is None:
                continue
            got = time.perf_counter()
            file.read_into(buffer.memory.view[: piece.nbytes], piece.position)
            read = time.perf_counter()
            spent.copy += got - started
            spent.read += read - got
            if any(target.tensor.is_cuda for target in order.targets.values()):
                self._read.put((order, buffer))
                del order
            else:
                host = buffer.memory.bytes[: piece.nbytes]
                for each in piece.placements:
                    place(self.stream.plan, each, host, order.targets[each.target], self.stream.doubts)
                spent.place += time.perf_counter() - read
                self._free.put(buffer)
                del order
                self._done(piece, group)

    def _buffer(self) -> _Buffer | None:
        """A buffer that is free; None if something has failed meanwhile."""
        reading = self.stream.reading
        with self._lock:
            if self._free.empty() and len(self._ring) < reading.num_threads * reading.buffers:
                is_cuda = self.stream.device.type == "cuda"
                buffer = _Buffer(HostMemory(reading.piece_bytes, is_pinned=is_cuda))
                self._ring.append(buffer)
                self.stream.unpinned += is_cuda and not buffer.memory.is_pinned
                return buffer
        return self._free.get()

    def _move(self, spent: Spent) -> None:
        """Have GPUs copy what the readers have read."""
        reading = self.stream.reading
        on_way: deque[_Buffer] = deque()
        at_most = reading.num_threads * (reading.buffers - 1)
        mover = _Mover(self.stream)
        try:
            while (read := self._read.get()) is not None:
                if self.failed:
                    continue
                order, buffer = read
                piece, group = order.piece, order.group
                started = time.perf_counter()
                buffer.events = mover.move(order, buffer.memory.bytes)
                if group is not None:
                    group.event = mover.mark(order)
                on_way.append(buffer)
                spent.place += time.perf_counter() - started
                del read, order, buffer
                self._done(piece, group)
                while on_way and (len(on_way) > at_most or all(map(_has_passed, on_way[0].events))):
                    first = on_way.popleft()
                    for event in first.events:
                        event.synchronize()
                    self._free.put(first)
        finally:
            mover.close()

    def _done(self, piece: Piece, group: _Group | None) -> None:
        self.stream.bar.advance(piece.nbytes)
        with self._lock:
            self.stream.bytes_read += piece.nbytes
            if group is None:
                return
            group.left -= 1
            is_whole = group.left == 0
        if is_whole:
            self.whole.put(group)


class _Mover:
    """What the mover has: on each GPU a stream, and memory for what can not go straight to its place."""

    def __init__(self, stream: Stream) -> None:
        self._of = stream
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._held: dict[torch.device, torch.Tensor] = {}
        self._current: torch.cuda.Stream | None = None

    def move(self, order: _Order, memory: torch.Tensor) -> list[torch.cuda.Event]:
        """Send a piece in ``memory`` to its place. Returns what tells when nothing is copied from it any more."""
        events = []
        host: torch.Tensor | None = None
        for device in dict.fromkeys(target.tensor.device for target in order.targets.values()):
            mine = [(p, order.targets[p.target]) for p in order.piece.placements]
            mine = [(p, target) for p, target in mine if target.tensor.device == device]
            if device.type != "cuda":
                for each, target in mine:
                    place(self._of.plan, each, memory[: order.piece.nbytes], target, self._of.doubts)
                continue
            stream = self._enter(device)
            held: torch.Tensor | None = None
            for each, target in mine:
                if target.is_ready is not None:
                    stream.wait_event(target.is_ready)
                if is_run(each, target.tensor):
                    run = memory[each.start : each.start + each.span]
                    bytes_in(each, target).copy_(run, non_blocking=True)
                    continue
                if held is None:
                    host = memory[: order.piece.nbytes]
                    held = self._on(device)[: order.piece.nbytes]
                    held.copy_(host, non_blocking=True)
                place(self._of.plan, each, held, target, self._of.doubts)
            events.append(self._recorded(stream))
        return events

    def mark(self, order: _Order) -> torch.cuda.Event:
        """What tells that all that has been sent to the device of ``order``'s parameter so far has arrived."""
        (device,) = {target.tensor.device for target in order.targets.values()}
        return self._recorded(self._enter(device))

    def close(self) -> None:
        """Wait for what is on its way, and give everything back."""
        for stream in self._streams.values():
            stream.synchronize()
        self._held.clear()

    def _recorded(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = new_event()
        event.record(stream)
        return event

    def _enter(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for a device, made this thread's current one."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if self._current is not self._streams[device]:
            self._current = self._streams[device]
            torch.cuda.set_stream(self._current)
        return self._current

    def _on(self, device: torch.device) -> torch.Tensor:
        """Memory on a GPU for one piece as it stands in the file.

        It is taken from the default stream's, where it goes back to: what a stream of its own has cached, no other
        could use.
        """
        if device not in self._held:
            default = torch.cuda.default_stream(device)
            with torch.cuda.stream(default):
                self._held[device] = torch.empty(self._of.reading.piece_bytes, dtype=torch.uint8, device=device)
            self._streams[device].wait_stream(default)
        return self._held[device]
