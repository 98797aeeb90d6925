"""Reading the bytes of one shard, and only if it still is the file whose header was checked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.pickled import Pickled, check_data, load_pickled
from tepatch.checkpoint.stamp import FileStamp
from tepatch.dtypes import torch_dtype
from tepatch.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch


BLOCK = 4096
"""Bytes. Reads past the page cache begin and end at multiples of it, in the file and in memory."""
_SAMPLE_EVERY = (1 << 26) + 12_345
"""Bytes of a file between two that are asked for to find out whether it is in the page cache."""
_ADVISED = 512 << 10
"""Bytes. Linux takes no longer advice than a device's largest request, or than it reads ahead anyway."""
_MAX_BUFFERS = 1024  # IOV_MAX of Linux: what one preadv takes


class SafetensorsReader:
    """One open safetensors file."""

    def __init__(self, stamp: FileStamp) -> None:
        from safetensors import SafetensorError, safe_open

        self._stamp = stamp
        stamp.verify()
        try:
            # Any: the package's types leave the methods of this class out.
            self._file: Any = safe_open(stamp.path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            stamp.verify()  # it may have gone only now, and this says so
            what = "cannot be opened"
            raise CheckpointError(Problem(where=stamp.where, what=what, found=str(error))) from error

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        """The tensor as a memory map of the file."""
        from safetensors import SafetensorError

        self._stamp.verify()
        try:
            tensor = self._file.get_tensor(info.in_file)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._stamp, info, found=str(error)) from error
        return as_promised(tensor, info, self._stamp)

    def close(self) -> None:
        """Let go of the file; tensors that are still held keep their own map of it."""
        self._file.__exit__(None, None, None)


class ByteReader:
    """The bytes of one safetensors file, by reading and not by a memory map.

    A map of a file that somebody shortens ends the process; a read ends with an error.
    """

    def __init__(self, stamp: FileStamp, *, past_cache: bool = False) -> None:
        """With ``past_cache``, ``can_bypass`` is true where the file system has reads past the page cache."""
        self.stamp = stamp
        self._opened: list[FileIO] = []
        self._direct: int | None = None
        try:
            self._file = self._open(os.O_RDONLY)
        except OSError as error:
            stamp.verify()  # a file that is gone is told as that
            raise CheckpointError(
                Problem(
                    where=stamp.where,
                    what="cannot be opened",
                    found=str(error),
                    fix="check its permissions (ls -l), and how many files may be open (ulimit -n)",
                )
            ) from error
        # Only now: what is put in its place between a check and the opening would be read in its stead.
        try:
            stamp.verify()
        except BaseException:
            self.close()
            raise
        with contextlib.suppress(OSError):  # this file system takes no advice
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read ahead further
        if past_cache:
            with contextlib.suppress(OSError):  # this file system has none
                self._direct = self._open(os.O_RDONLY | os.O_DIRECT)

    @property
    def can_bypass(self) -> bool:
        """Whether ``read_past_cache`` goes past the page cache."""
        return self._direct is not None

    def read_past_cache(self, buffer: memoryview, position: int, nbytes: int) -> int:
        """``read_into`` for ``nbytes``, but past the page cache where that ``can_bypass``.

        ``buffer`` begins at a multiple of ``BLOCK`` and has room for two more of them than the bytes need. Returns
        where in it the bytes begin. File systems that know no such reads are read as ever.
        """
        start, direct = position // BLOCK * BLOCK, self._direct
        end, done = position + nbytes - start, 0
        while direct is not None and done < end:
            try:
                count = os.preadv(direct, [buffer[done : -(-end // BLOCK) * BLOCK]], start + done)
            except OSError:
                count = 0
            if count == 0:
                break  # the ordinary read says what is wrong, if anything is
            done += count
        if done < end:
            self.read_into(buffer[:nbytes], position)
            return 0
        return position - start

    def expect(self, position: int, nbytes: int) -> None:
        """Have the system bring these bytes into the page cache, and wait for nothing."""
        with contextlib.suppress(OSError):  # this file system takes no advice
            for start in range(position, position + nbytes, _ADVISED):
                wanted = min(_ADVISED, position + nbytes - start)
                os.posix_fadvise(self._file, start, wanted, os.POSIX_FADV_WILLNEED)

    def read_into(self, buffer: memoryview, position: int) -> None:
        """Fill ``buffer`` with the bytes from ``position`` of the file. Threads may share the reader.

        Raises ``CheckpointError`` when the file can not be read or ends before.
        """
        self.scatter([buffer], position)

    def scatter(self, buffers: Sequence[memoryview], position: int) -> None:
        """Fill several buffers, one after the other, with the bytes from ``position``. Raises as ``read_into`` does."""
        left = [buffer for buffer in buffers if buffer]
        while left:
            try:
                count = os.preadv(self._file, left[:_MAX_BUFFERS], position)
            except OSError as error:
                raise CheckpointError(
                    Problem(
                        where=self.stamp.where,
                        what=f"cannot be read at byte {position:,}",
                        found=str(error),
                        fix="check the disk (dmesg) or the network mount, or copy the checkpoint again",
                    )
                ) from error
            if count == 0:
                self.stamp.verify()  # it has been shortened since, and this says so
                what = "ends before its header says that it does"
                raise CheckpointError(Problem(where=self.stamp.where, what=what, found=f"no byte at {position:,}"))
            position += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def close(self) -> None:
        """Let go of the file."""
        for each in self._opened:
            each.close()

    def __del__(self) -> None:
        """If an interrupt has come before anybody could ``close``."""
        self.close()

    def _open(self, flags: int) -> int:
        file = open(self.stamp.path, "rb", buffering=0, opener=lambda path, _: os.open(path, flags))  # noqa: SIM115 (close is later)
        self._opened.append(file)
        return file.fileno()


def is_cached(stamp: FileStamp) -> bool:
    """Whether the page cache holds a file, as far as some bytes of it tell; False where the system does not say.

    A file that can not be opened is not cached; whoever reads it says why.
    """
    try:
        return all(cached_bytes(stamp.path, every=_SAMPLE_EVERY))
    except OSError:
        return False


def cached_bytes(path: Path, *, every: int) -> Iterator[bool]:
    """Whether the page cache holds a file's last byte, and one in each ``every``.

    Asking for what it does not hold has the system read that page: ask once. Raises ``OSError`` where the system does
    not say, or the file can not be opened.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for position in (*range(every // 2, size, every), *([size - 1] if size else [])):
            try:
                yield os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                yield False


class PickledReader:
    """One open ``.bin`` file."""

    def __init__(self, stamp: FileStamp) -> None:
        self._stamp = stamp
        self._checked: set[str] = set()
        stamp.verify()
        try:
            self._loaded: Pickled | None = load_pickled(stamp.path, where=stamp.where)
        except CheckpointError:
            stamp.verify()  # it may have gone or changed only now, and this says so
            raise

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        """The tensor as a memory map of the file; it may be a view with strides of its own.

        Its bytes are read once before, for the zip has a checksum of them.
        """
        self._stamp.verify()
        if self._loaded is None or info.in_file not in self._loaded.tensors:
            raise _unreadable(self._stamp, info, found="no such tensor among the open ones")
        for key in self._loaded.contents.keys[info.in_file]:
            if key not in self._checked:
                check_data(self._stamp.path, self._loaded.contents, key, where=self._stamp.where)
                self._checked.add(key)
        return as_promised(self._loaded.tensors[info.in_file], info, self._stamp)

    def close(self) -> None:
        """Let go of the file; tensors that are still held keep their own map of it."""
        self._loaded = None


def open_shard(stamp: FileStamp, *, file: str) -> SafetensorsReader | PickledReader:
    """The reader for a file of this name. Raises ``CheckpointError`` when it cannot be opened."""
    return PickledReader(stamp) if file.endswith(".bin") else SafetensorsReader(stamp)


def _unreadable(stamp: FileStamp, info: TensorInfo, *, found: str) -> CheckpointError:
    return CheckpointError(Problem(where=f"{stamp.where}: {info.name}", what="cannot be read", found=found))


def as_promised(tensor: torch.Tensor, info: TensorInfo, stamp: FileStamp) -> torch.Tensor:
    """The tensor, once it is known to be the one that was planned with."""
    if tuple(tensor.shape) != info.shape or tensor.dtype != torch_dtype(info.dtype):
        raise CheckpointError(
            Problem(
                where=f"{stamp.where}: {info.name}",
                what="is not the tensor that the header promised",
                expected=f"{info.dtype} {list(info.shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        )
    return tensor
