"""Interrupts during a load: told at once, raised when it can end in order, and wherever they come nothing is left."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.interrupts import uninterrupted
from tepatch.transfer.memory import HostMemory
from tepatch.transfer.settings import Reading

Make = Callable[..., Any]


@pytest.fixture
def handler() -> Iterator[Callable[[Any], None]]:
    """Sets the handler of SIGUSR1, which is set back afterwards."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handle: signal.signal(signal.SIGUSR1, handle)
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_is_told_at_once_and_raised_at_the_end() -> None:
    told: list[BaseException] = []
    done = []

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append(len(told))
        signal.raise_signal(signal.SIGINT)
        done.append(len(told))

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(interrupted, told.append)
    assert done == [1, 2]
    assert [type(error) for error in told] == [KeyboardInterrupt] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_comes_in_the_place_of_an_error() -> None:
    def fail(*, is_interrupted: bool) -> None:
        if is_interrupted:
            signal.raise_signal(signal.SIGINT)
        raise ValueError("of the work")

    with pytest.raises(KeyboardInterrupt) as got:
        uninterrupted(lambda: fail(is_interrupted=True), lambda _: None)
    assert got.value.__context__ is None  # which would keep the frames of a load alive
    with pytest.raises(ValueError, match="of the work"):
        uninterrupted(lambda: fail(is_interrupted=False), lambda _: None)


def test_any_handler_that_raises_is_an_interrupt_and_one_that_does_not_is_none(
    handler: Callable[[Any], None],
) -> None:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"signal {number}")

    told: list[BaseException] = []
    handler(late)
    with pytest.raises(TimeoutError, match=f"signal {int(signal.SIGUSR1)}"):
        uninterrupted(lambda: signal.raise_signal(signal.SIGUSR1), told.append)
    assert len(told) == 1
    seen: list[int] = []
    handler(lambda number, frame: seen.append(number))
    uninterrupted(lambda: signal.raise_signal(signal.SIGUSR1), told.append)
    assert seen == [signal.SIGUSR1]
    assert len(told) == 1


def test_a_handler_that_is_set_meanwhile_stays(handler: Callable[[Any], None]) -> None:
    def first(number: int, frame: object) -> None: ...

    def second(number: int, frame: object) -> None: ...

    handler(first)
    uninterrupted(lambda: handler(second), lambda _: None)
    assert signal.getsignal(signal.SIGUSR1) is second


def test_in_another_thread_there_is_nothing_to_do() -> None:
    handlers: list[Any] = []
    before = signal.getsignal(signal.SIGINT)

    def look() -> None:
        handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=uninterrupted, args=(look, lambda _: None))
    thread.start()
    thread.join()
    uninterrupted(look, lambda _: None)
    assert handlers[0] is before
    assert handlers[1] is not before


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(3))
def test_wherever_interrupts_come_nothing_is_left(seed: int, sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real ones in each of a hundred loads, at any time from before threads start until after they have ended."""
    made, rng, main = sample(), random.Random(seed), threading.get_ident()
    ring: list[HostMemory] = []
    make, close = HostMemory.__init__, HostMemory.close
    monkeypatch.setattr(HostMemory, "__init__", lambda self, *a, **k: (make(self, *a, **k), ring.append(self))[0])
    monkeypatch.setattr(HostMemory, "close", lambda self: (close(self), ring.remove(self))[0])
    to, reading = Destination(device=torch.device("cpu")), Reading(threads=3, piece_bytes=64, buffers=4)
    inside: list[bool] = []
    interrupted = 0

    def handle(number: int, frame: object) -> None:
        if inside:
            raise KeyboardInterrupt

    def interrupt(*waits: float) -> None:
        for seconds in waits:
            time.sleep(seconds)
            signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's own would be interrupted too
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    before = signal.signal(signal.SIGINT, handle)
    try:
        for _ in range(100):
            thread = threading.Thread(target=interrupt, args=(rng.random() * 0.02, rng.random() * 0.003))
            thread.start()
            try:
                try:
                    inside.append(True)
                    load_tensors(made.plan, made.checkpoint, to=to, reading=reading, progress=False)
                finally:
                    inside.clear()
            except KeyboardInterrupt:
                interrupted += 1
            thread.join()
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("tepatch-read")]
            assert not ring
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted > 10
    gc.collect()  # an error's frames refer to it
    assert len(os.listdir("/proc/self/fd")) == files
