"""What the system is told about the bytes that will be read next of files that its page cache does not hold."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tepatch.checkpoint import reading as of_files
from tepatch.errors import CheckpointError
from tepatch.transfer import work
from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.settings import Reading

Make = Callable[..., Any]
PIECE = 256


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says that it has nothing in the page cache, whatever the file system here does."""
    read = os.preadv

    def asked(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return read(file, buffers, position, flags)

    monkeypatch.setattr(os, "preadv", asked)


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Position and length of all that the system is asked to bring into the page cache, in order."""
    said: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def noted(file: int, position: int, nbytes: int, kind: int) -> None:
        if kind == os.POSIX_FADV_WILLNEED:
            said.append((position, nbytes))
        advise(file, position, nbytes, kind)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    return said


def load(sample: Any, reading: Reading) -> dict[str, torch.Tensor]:
    to = Destination(device=torch.device("cpu"))
    return load_tensors(sample.plan, sample.checkpoint, to=to, reading=reading, progress=False)[0]


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("longest", [100, PIECE])
def test_the_disk_is_asked_for_each_byte_once_and_in_order(
    longest: int, sample: Make, advice: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_files, "_ADVISED", longest)
    made = sample(copy=False)
    loaded = load(made, Reading(threads=2, piece_bytes=PIECE))
    for name, expected in made.expected.items():
        assert torch.equal(loaded[name], expected), name
    infos = sorted(made.checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    assert sum(nbytes for _, nbytes in advice) == sum(info.nbytes for info in infos)
    first = [info for info in infos if info.file == infos[0].file]
    at, covered = first[0].offset, iter(advice)
    while at < first[-1].offset + first[-1].nbytes:
        position, nbytes = next(covered)
        assert position == at
        at += nbytes


@pytest.mark.parametrize("reading", [Reading(piece_bytes=PIECE), Reading(piece_bytes=PIECE, cache="bypass")])
def test_nothing_is_asked_for_that_is_cached_or_is_not_to_be(
    reading: Reading, sample: Make, advice: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, read = sample(), os.preadv

    def asked(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        if not flags & os.RWF_NOWAIT:
            return read(file, buffers, position, flags)
        if reading.cache == "bypass":
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return 1

    monkeypatch.setattr(os, "preadv", asked)
    load(made, reading)
    assert not advice


@pytest.mark.parametrize("bound", [("AHEAD_BYTES", 4 * PIECE), ("MOST_AHEAD", 4)])
@pytest.mark.parametrize("cached_file", ["", "model-00001"])
def test_no_more_is_asked_for_than_a_little_ahead_of_the_readers(
    cached_file: str,
    bound: tuple[str, int],
    sample: Make,
    advice: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However much the page cache holds of other files."""
    monkeypatch.setattr(work, *bound)
    made, read, begun, most, lock = sample(), os.preadv, [0], [0], threading.Lock()
    threads = 2

    def counted(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        is_cached = bool(cached_file) and cached_file in os.readlink(f"/proc/self/fd/{file}")
        if flags:
            if is_cached:
                return 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not is_cached:
            with lock:
                most[0] = max(most[0], len(advice) - begun[0])
                begun[0] += 1
        else:
            time.sleep(0.001)  # there would be time to ask for all
        return read(file, buffers, position)

    monkeypatch.setattr(os, "preadv", counted)
    load(made, Reading(threads=threads, piece_bytes=PIECE))
    assert 0 < most[0] <= 4 + threads


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(("ahead", "threads"), [(PIECE, 1), (PIECE, 3), (1 << 20, 2)])
def test_a_disk_that_fails_while_it_is_asked_ends_everything(
    ahead: int, threads: int, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "AHEAD_BYTES", ahead)
    made, read, calls = sample(), os.preadv, []

    def failing(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        calls.append(position)
        if not flags and len(calls) > 7:
            time.sleep(0.05)  # who asks ahead waits for the readers by then
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, position, flags)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"cannot be read at byte [\d,]+"):
        load(made, Reading(threads=threads, piece_bytes=PIECE))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tepatch-read")]


@pytest.mark.usefixtures("uncached")
def test_a_file_system_that_takes_no_advice_is_read_as_ever(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    advise = os.posix_fadvise

    def refusing(file: int, position: int, nbytes: int, kind: int) -> None:
        if kind == os.POSIX_FADV_WILLNEED:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        advise(file, position, nbytes, kind)

    monkeypatch.setattr(os, "posix_fadvise", refusing)
    made = sample()
    loaded = load(made, Reading(threads=2, piece_bytes=PIECE))
    assert torch.equal(loaded["run"], made.expected["run"])
