"""What this machine can do at best with a checkpoint's files, to measure a load against: limits, with no model in them.

``stream_bytes`` is the loader's own machinery with nothing to put in another place, ``read_bytes`` and ``copy_bytes``
are its two halves alone. And the page cache, which decides what a measured read means.
"""

from __future__ import annotations

import errno
import os
import queue
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.reading import BLOCK, cached_bytes
from tepatch.checkpoint.stamp import FileStamp
from tepatch.errors import CheckpointError, LoadError, Problem
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Plan, Step
from tepatch.progress import ProgressBar
from tepatch.transfer.memory import HostMemory
from tepatch.transfer.pieces import Piece, Placement
from tepatch.transfer.settings import MIB, Reading
from tepatch.transfer.steps import is_out_of_memory
from tepatch.transfer.stream import Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was moved, and in what time."""

    nbytes: int
    seconds: float


def byte_files(checkpoint: Checkpoint) -> dict[str, FileStamp]:
    """The files that a load reads by their bytes. Raises ``CheckpointError`` when there is none."""
    stamps = {file: checkpoint.stamp(file) for file in checkpoint.files}
    found = {file: stamp for file, stamp in stamps.items() if stamp is not None}
    if not found:
        raise CheckpointError(
            Problem(
                where=checkpoint.location,
                what="has no file whose bytes can be read as they are",
                expected="safetensors",
                found=", ".join(checkpoint.files[:3]),
            )
        )
    return found


def stream_bytes(checkpoint: Checkpoint, reading: Reading, *, device: torch.device) -> tuple[torch.Tensor, Measured]:
    """All bytes of the files, headers too, one after the other in one ``uint8`` tensor on ``device``.

    Raises ``LoadError`` when the device has too little memory, and ``CheckpointError``.
    """
    files = byte_files(checkpoint)
    total = sum(stamp.size for stamp in files.values())
    # What a stream wants of a plan: its place, for messages.
    plan = Plan(
        patch="",
        mapping="",
        digest="",
        location=checkpoint.location,
        copies=(),
        fills=(),
        sources={},
        targets={},
        rules=(),
    )
    started = time.perf_counter()
    try:
        out = torch.empty(total, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory on {device} for all bytes of the checkpoint at once ({total:,})"
        raise LoadError(Problem(where=checkpoint.location, what=what)) from None
    with (
        ProgressBar(total, False, "") as bar,
        Stream(plan, checkpoint, reading, device=device, allocate=lambda _: out, bar=bar) as stream,
    ):
        stream.run({"": _pieces(files, reading.piece_bytes)})
        stream.verify()
    return out, Measured(nbytes=total, seconds=time.perf_counter() - started)


def read_bytes(checkpoint: Checkpoint, reading: Reading, *, is_direct: bool = False) -> Measured:
    """Read all bytes of the files and keep none: by ``reading``'s threads, each into one buffer of its own.

    With ``is_direct`` past the page cache, which it neither uses nor fills. Raises ``CheckpointError``, also where the
    file system has no such reads.
    """
    files = byte_files(checkpoint)
    piece_bytes = -(-reading.piece_bytes // BLOCK) * BLOCK
    flags = os.O_RDONLY | (os.O_DIRECT if is_direct else 0)
    left: queue.SimpleQueue[tuple[FileStamp, int, int]] = queue.SimpleQueue()
    started = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        with HostMemory(piece_bytes, is_pinned=False, where=checkpoint.location) as memory:
            while True:
                try:
                    stamp, file, position = left.get_nowait()
                except queue.Empty:
                    return done
                done += _read(stamp, file, position, memory.view)

    with ExitStack() as stack:
        for stamp in files.values():
            stamp.verify()
            try:
                file = os.open(stamp.path, flags)
            except OSError as error:
                what = "cannot be read past the page cache" if is_direct else "cannot be opened"
                raise CheckpointError(Problem(where=stamp.where, what=what, found=str(error))) from error
            stack.callback(os.close, file)
            for position in range(0, stamp.size, piece_bytes):
                left.put((stamp, file, position))
        with ThreadPoolExecutor(reading.num_threads) as pool:
            total = sum(pool.map(work, range(reading.num_threads)))
    return Measured(nbytes=total, seconds=time.perf_counter() - started)


def copy_bytes(nbytes: int, reading: Reading, *, device: torch.device) -> Measured:
    """Copy ``nbytes`` from a pinned buffer to a GPU, in pieces of ``reading``: what the bus gives. No file is read."""
    out = torch.empty(nbytes, dtype=torch.uint8, device=device)
    with HostMemory(reading.piece_bytes, is_pinned=True) as memory:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for start in range(0, nbytes, reading.piece_bytes):
            part = out[start : start + reading.piece_bytes]
            part.copy_(memory.bytes[: part.numel()], non_blocking=True)
        torch.cuda.synchronize(device)
        return Measured(nbytes=nbytes, seconds=time.perf_counter() - started)


def forget(paths: Iterable[Path]) -> None:
    """Ask the system to drop these files from the page cache; what is not on the disk yet is written first.

    Nobody has to be root for it, and no other file loses anything. ``cached_share`` tells whether it worked: a file
    that somebody has mapped stays, and so does what is on a file system in memory.
    """
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(paths: Iterable[Path]) -> float | None:
    """The part of these files in the page cache, by a byte in each MiB; None where the system does not say."""
    try:
        seen = [is_held for path in paths for is_held in cached_bytes(path, every=MIB)]
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not on this file system
            return None
        raise
    return sum(seen) / max(1, len(seen))


def _pieces(files: dict[str, FileStamp], piece_bytes: int) -> Iterator[Piece]:
    base = 0
    for file, stamp in files.items():
        for position in range(0, stamp.size, piece_bytes):
            nbytes = min(piece_bytes, stamp.size - position)
            step = Step(file, (nbytes,), (1,), 0, (1,), base + position, IDENTITY, False)
            yield Piece(file, position, nbytes, (Placement(file, "", "U8", 0, step),))
        base += stamp.size


def _read(stamp: FileStamp, file: int, position: int, buffer: memoryview) -> int:
    """Fill the buffer from ``position``, or up to the file's end."""
    done, wanted = 0, min(len(buffer), stamp.size - position)
    while done < wanted:
        try:
            # The whole rest of the buffer, also at the end of the file: a direct read ends at a multiple of BLOCK.
            count = os.preadv(file, [buffer[done:]], position + done)
        except OSError as error:
            what = f"cannot be read at byte {position + done:,}"
            raise CheckpointError(Problem(where=stamp.where, what=what, found=str(error))) from error
        if count == 0:
            stamp.verify()
            raise CheckpointError(Problem(where=stamp.where, what=f"ends at byte {position + done:,}"))
        done += count
    return wanted
