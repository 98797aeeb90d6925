"""A checkpoint's tensors by name, and the parameters that they make, for several threads at once."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
import xxhash

from tepatch.checkpoint import ShardReader
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.checkpoint.reading import ByteReader
from tepatch.checkpoint.writing import tensor_bytes
from tepatch.dtypes import torch_dtype
from tepatch.planning import Plan
from tepatch.transfer.steps import PIECE_BYTES, Read, assemble

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Tensors:
    """The tensors of a checkpoint by name. Each file is opened once, for as long as the block lasts.

    What is read of a safetensors file is read into memory of its own and not mapped: a file that is cut short
    meanwhile is an error then, and not the end of the process.
    """

    def __init__(self, checkpoint: FolderCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._open = ExitStack()
        self._bytes: dict[str, ByteReader | None] = {}
        self._pickled: dict[str, ShardReader] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes.clear()
        self._pickled.clear()
        self._open.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor; not to be written to. Raises ``CheckpointError`` when its file has changed or is unreadable."""
        info = self._checkpoint.tensors[name]
        reader = self._reader(info.file)
        if reader is None:
            with self._lock:
                return self._pickled[info.file].read(info)
        reader.stamp.verify()
        out = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        reader.read_into(tensor_bytes(out), info.offset)
        return out

    def pieces(self, name: str, start: int, nbytes: int) -> Iterator[memoryview]:
        """The bytes of a tensor from ``start``, a piece at a time; each is gone when the next is asked for.

        Raises as ``read`` does.
        """
        info = self._checkpoint.tensors[name]
        reader = self._reader(info.file)
        if reader is None:
            data = tensor_bytes(self.read(name).contiguous())
            yield from (
                data[at : min(at + PIECE_BYTES, start + nbytes)] for at in range(start, start + nbytes, PIECE_BYTES)
            )
            return
        reader.stamp.verify()
        buffer = self._buffer()
        for at in range(start, start + nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, start + nbytes - at)]
            reader.read_into(piece, info.offset + at)
            yield piece

    def digests(self, names: Sequence[str], *, workers: int) -> dict[str, str]:
        """xxh3_128 over the bytes of each tensor: to recognise it, thirty times as fast as sha256."""

        def digest(name: str) -> str:
            out = xxhash.xxh3_128()
            for piece in self.pieces(name, 0, self._checkpoint.tensors[name].nbytes):
                out.update(piece)
            return out.hexdigest()

        with ThreadPoolExecutor(workers) as pool:
            return dict(zip(names, pool.map(digest, names), strict=True))

    def verify(self) -> None:
        """Raise ``CheckpointError`` if a file has changed since its header was read."""
        for stamp in self._checkpoint.stamps.values():
            stamp.verify()

    def _reader(self, file: str) -> ByteReader | None:
        with self._lock:
            if file not in self._bytes:
                stamp = self._checkpoint.stamp(file)
                reader = None if stamp is None else ByteReader(stamp)
                if reader is None:
                    self._pickled[file] = self._open.enter_context(self._checkpoint.open(file))
                else:
                    self._open.callback(reader.close)
                self._bytes[file] = reader
            return self._bytes[file]

    def _buffer(self) -> memoryview:
        """This thread's own."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(PIECE_BYTES))
        buffer: memoryview = self._local.buffer
        return buffer


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over the bytes of a tensor's elements, in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor.contiguous().cpu())).hexdigest()


class Parameters:
    """A model's parameters, put together from a checkpoint in another layout when they are asked for.

    The last one is kept for each thread: parts of equal size are often written one after the other.
    """

    def __init__(self, plan: Plan, read: Read) -> None:
        self._plan = plan
        self._read = read
        self._last = threading.local()

    def __call__(self, name: str) -> torch.Tensor:
        last: tuple[str, torch.Tensor] | None = getattr(self._last, "value", None)
        if last is None or last[0] != name:
            self._last.value = None  # so that there never are two
            last = self._last.value = (name, assemble(self._plan, name, self._read))
        return last[1]


def on_cpu_by_default(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, in which tensors are made on the CPU unless it says otherwise.

    Around it the caller may have set another device (``with torch.device("meta")``, ``torch.set_default_device``). What
    is computed on the way would be there, and without values on "meta".
    """

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return called
