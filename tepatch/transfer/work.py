"""The threads that fill parameters: some that each read a piece of a file, and one that sends it to GPUs.

Readers read, each into a buffer of a common ring, and for a parameter on the CPU straight into it; what goes to the CPU
in another order or dtype they also put in its place. All else is left to others: readers would wait for each other's
turn in Python. For a GPU the ring is pinned, and one thread, the mover, has the device copy from it while the readers
go on. What is a run of bytes goes straight into its parameter; what is not (another dtype, another order) is brought to
the device as it is and put in its place there.

Of files that the page cache does not hold, one thread tells the system what will be read next. A disk gives what it can
only when it is asked for much at once, and readers alone ask for little: each waits for its own piece.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from tepatch.checkpoint.reading import BLOCK
from tepatch.checkpoint.writing import tensor_bytes
from tepatch.dtypes import item_size
from tepatch.errors import LoadError, Problem
from tepatch.transfer.memory import HostMemory
from tepatch.transfer.pieces import Piece
from tepatch.transfer.placing import Target, bytes_in, is_run, place, scattered

if TYPE_CHECKING:
    from tepatch.transfer.stream import Stream

AHEAD_BYTES = 512 << 20
"""Of pieces that no reader has begun with, asked of the disk. Half of it was enough for one of 2 GB/s."""
MOST_AHEAD = 4096
"""Such pieces, however small they are."""


def new_event() -> torch.cuda.Event:
    """One that nothing has been recorded in: who waits for it goes on at once."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _has_passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _stays_aligned(piece: Piece) -> bool:
    """Whether a piece's elements are aligned where they are in the file, and so in memory that is read by blocks."""
    return all((piece.position + each.start) % item_size(each.dtype) == 0 for each in piece.placements)


@dataclass(slots=True)
class Spent:
    """Seconds of threads, by what they went to."""

    read: float = 0.0
    """Waiting for the file system."""
    copy: float = 0.0
    """Waiting for a buffer: to be pinned, or that a GPU is done with it."""
    place: float = 0.0
    """Sending bytes on their way, and putting them in another order or dtype."""

    def add(self, other: Spent) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True, eq=False)
class Group:
    """Pieces that make one parameter whole."""

    name: str
    left: int
    event: torch.cuda.Event | None = None
    """When the last of them has arrived on its GPU."""


@dataclass(frozen=True, slots=True)
class Order:
    """A piece to read, and what its placements name."""

    piece: Piece
    targets: dict[str, Target]
    group: Group | None


@dataclass(slots=True, eq=False)
class _Buffer:
    """One buffer of the ring."""

    memory: HostMemory
    events: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)
    """When a device copies from it no more."""


class Work:
    """The threads of one run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._to_read = queue.SimpleQueue() if stream.looks_ahead else self.orders
        """The same, once the disk has been asked for them."""
        self.whole: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self.failed: list[BaseException] = []
        reading = stream.reading
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[Order, _Buffer, int] | None] = queue.SimpleQueue()
        """What is in a buffer, and from which of its bytes on."""
        self._ring: list[_Buffer] = []
        self._ring_is_wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Has something as soon as somebody waits for a buffer: for some loads nobody ever does."""
        self._has_all = False
        """Whether all is read, so that no more buffers are needed."""
        self._is_inference = torch.is_inference_mode_enabled()  # of this thread; only so can others fill its tensors
        self._lock = threading.Lock()
        self._readers = [self._thread(self._reader, stream.spent, f"{i}") for i in range(reading.num_threads)]
        self._movers = [self._thread(self._move, stream.moving, "mover")]
        self._others = [self._thread(self._make_ring, Spent(), "ring")]
        self._may_ask: queue.SimpleQueue[None] = queue.SimpleQueue()
        """As many as pieces that may still be asked for ahead."""
        if stream.looks_ahead:
            for _ in range(min(MOST_AHEAD, max(1, AHEAD_BYTES // reading.piece_bytes))):
                self._may_ask.put(None)
            self._others.append(self._thread(self._look_ahead, Spent(), "ahead"))

    def _thread(self, run: Callable[[Spent], None], total: Spent, name: str) -> threading.Thread:
        return threading.Thread(target=self._guarded, args=(run, total), name=f"tepatch-read-{name}", daemon=True)

    def start(self) -> None:
        """Start all threads. Raises ``LoadError`` if the system gives no more of them."""
        for thread in (*self._readers, *self._movers, *self._others):
            try:
                thread.start()
            except RuntimeError as error:
                raise LoadError(
                    Problem(
                        where=self.stream.plan.location,
                        what=f"no thread can be started for reading, beside {threading.active_count()} that there are",
                        found=str(error),
                        fix="allow this process more (ulimit -u), or more memory (ulimit -v), or read with fewer:"
                        " reading=Reading(threads=1)",
                    )
                ) from None

    def fail(self, error: BaseException) -> None:
        """Have everyone stop, and wait for nothing that will not come.

        Any thread may call this at any time, the handler of a signal too: what is used here needs no lock.
        """
        self.failed.append(error)
        self.whole.put(None)
        self._may_ask.put(None)
        self._ring_is_wanted.put(None)
        for _ in self._readers:
            for awaited in (self._free, self.orders, self._to_read):
                awaited.put(None)
        self._read.put(None)

    def finish(self) -> None:
        """Wait until all that was ordered is done, or given up after a failure, and give the ring back."""
        for _ in self._readers:
            self.orders.put(None)
        _join(self._readers)
        self._has_all = True
        self._ring_is_wanted.put(None)
        _join(self._others)
        self._read.put(None)
        _join(self._movers)
        self._readers, self._movers, self._others = [], [], []  # gone while nothing can be interrupted
        while self._ring:
            self._ring.pop().memory.close()

    def _guarded(self, run: Callable[[Spent], None], total: Spent) -> None:
        spent = Spent()
        try:
            # Or CUDA takes a context, and hundreds of MiB, on the first GPU of the machine too.
            on = torch.cuda.device(self.stream.device) if self.stream.device.type == "cuda" else nullcontext()
            with torch.inference_mode(self._is_inference), torch.no_grad(), on:
                run(spent)
        except BaseException as error:
            self.fail(error)
        finally:
            with self._lock:
                total.add(spent)

    def _reader(self, spent: Spent) -> None:
        while (order := self._to_read.get()) is not None:
            piece, group = order.piece, order.group
            if self.stream.is_asked_ahead(piece.file):
                self._may_ask.put(None)
            if self.failed:
                continue
            file = self.stream.reader(piece.file)
            started = time.perf_counter()
            is_past_cache = file.can_bypass and _stays_aligned(piece)
            if not is_past_cache and (parts := scattered(piece, order.targets)) is not None:
                file.scatter([tensor_bytes(part) for part in parts], piece.position)
                spent.read += time.perf_counter() - started
                del order, parts  # from now on this must keep no parameter alive
                self._done(piece, group)
                continue
            if not self._ring and self._ring_is_wanted.empty():
                self._ring_is_wanted.put(None)
            if (buffer := self._free.get()) is None:  # something has failed meanwhile
                continue
            got = time.perf_counter()
            start = 0
            if is_past_cache:
                start = file.read_past_cache(buffer.memory.view, piece.position, piece.nbytes)
            else:
                file.read_into(buffer.memory.view[: piece.nbytes], piece.position)
            read = time.perf_counter()
            spent.copy += got - started
            spent.read += read - got
            if any(target.is_cuda for target in order.targets.values()):
                self._read.put((order, buffer, start))
                del order
            else:
                held = buffer.memory.bytes[start : start + piece.nbytes]
                for each in piece.placements:
                    place(self.stream.plan, each, held, order.targets[each.target], self.stream.doubts)
                spent.place += time.perf_counter() - read
                self._free.put(buffer)
                del order
                self._done(piece, group)

    def _look_ahead(self, spent: Spent) -> None:
        """Hand on what is ordered, and ask for it before."""
        try:
            while (order := self.orders.get()) is not None:
                piece = order.piece
                if not self.failed and self.stream.is_asked_ahead(piece.file):
                    self._may_ask.get()  # a failure gives one back, for who waits here then
                    self.stream.reader(piece.file).expect(piece.position, piece.nbytes)
                self._to_read.put(order)
                del order  # this must keep no parameter alive
        finally:
            for _ in self._readers:
                self._to_read.put(None)

    def _make_ring(self, spent: Spent) -> None:
        """Make one buffer after the other: a driver pins memory for one thread at a time."""
        reading = self.stream.reading
        nbytes = (-(-reading.piece_bytes // BLOCK) + 2) * BLOCK
        is_cuda = self.stream.device.type == "cuda"
        self._ring_is_wanted.get()
        for _ in range(reading.num_buffers):
            if self._has_all or self.failed:
                return
            buffer = _Buffer(HostMemory(nbytes, is_pinned=is_cuda, where=self.stream.plan.location))
            self._ring.append(buffer)
            self.stream.unpinned += is_cuda and not buffer.memory.is_pinned
            self._free.put(buffer)

    def _move(self, spent: Spent) -> None:
        """Have GPUs copy what the readers have read."""
        on_way: deque[_Buffer] = deque()
        mover = _Mover(self.stream)
        try:
            while True:
                if on_way and self._read.empty():  # some reader may be waiting
                    for event in on_way[0].events.values():
                        event.synchronize()
                    self._free.put(on_way.popleft())
                    continue
                if (read := self._read.get()) is None:
                    return
                if self.failed:
                    continue
                order, buffer, start = read
                piece, group = order.piece, order.group
                started = time.perf_counter()
                mover.move(order, buffer, start)
                if group is not None:
                    group.event = mover.mark(order)
                on_way.append(buffer)
                spent.place += time.perf_counter() - started
                del read, order, buffer
                self._done(piece, group)
                while on_way and all(map(_has_passed, on_way[0].events.values())):
                    self._free.put(on_way.popleft())
        finally:
            mover.close()

    def _done(self, piece: Piece, group: Group | None) -> None:
        self.stream.bar.advance(piece.nbytes)
        with self._lock:
            self.stream.bytes_read += piece.nbytes
            if group is None:
                return
            group.left -= 1
            is_whole = group.left == 0
        if is_whole:
            self.whole.put(group)


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait for the end of those that have begun."""
    for thread in threads:
        if thread.ident is not None:
            thread.join()


class _Mover:
    """What the mover has: on each GPU a stream, and memory for what can not go straight to its place."""

    def __init__(self, stream: Stream) -> None:
        self._of = stream
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._held: dict[torch.device, torch.Tensor] = {}
        self._current: torch.cuda.Stream | None = None

    def move(self, order: Order, buffer: _Buffer, start: int) -> None:
        """Send a piece, which is in ``buffer`` from its byte ``start`` on, to its place; its events tell of the end."""
        host = buffer.memory.bytes
        for device in dict.fromkeys(target.device for target in order.targets.values()):
            stream = None if device.type != "cuda" else self._enter(device)
            held: torch.Tensor | None = None
            for each in order.piece.placements:
                target = order.targets[each.target]
                if target.device != device:
                    continue
                if stream is not None and target.is_ready is not None:
                    stream.wait_event(target.is_ready)
                    target.is_ready = None  # what comes later comes after it on this stream
                if stream is not None and is_run(each, target):
                    first = start + each.start
                    bytes_in(each, target).copy_(host[first : first + each.span], non_blocking=True)
                    continue
                if held is None:
                    held = host[start : start + order.piece.nbytes]
                    if stream is not None:
                        held = self._on(device)[: order.piece.nbytes].copy_(held, non_blocking=True)
                place(self._of.plan, each, held, target, self._of.doubts)
            if stream is not None:
                if (event := buffer.events.get(device)) is None:
                    event = buffer.events[device] = new_event()
                event.record(stream)

    def mark(self, order: Order) -> torch.cuda.Event:
        """What tells that all that has been sent to the device of ``order``'s parameter so far has arrived."""
        (device,) = {target.device for target in order.targets.values()}
        event = new_event()
        event.record(self._enter(device))
        return event

    def close(self) -> None:
        """Wait for what is on its way, and give everything back."""
        for stream in self._streams.values():
            stream.synchronize()
        self._held.clear()

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
