"""What the rest of tepatch relies on: a checkpoint is named tensors in files which can be read one by one.

A plan needs ``tensors`` alone; an executor also opens ``files``. Both are written against these protocols,
so that a checkpoint may also come from somewhere other than a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tepatch.checkpoint.stamp import FileStamp

if TYPE_CHECKING:
    import torch

    from tepatch.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor in a checkpoint, known from headers only."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The code that safetensors uses: ``BF16``, ``F32``, ``I64``, ``F8_E4M3``, ..."""
    file: str
    """The file it is in, relative to the checkpoint's folder, as the index spells it."""
    offset: int
    """Byte position of its data in the file, to go through a file in order; 0 in a ``.bin`` file."""
    nbytes: int
    """Number of elements times the size of one, in bytes."""
    in_file: str = ""
    """Its name in the file: ``name``, but for parts of wrappers around modules."""

    def __post_init__(self) -> None:
        if not self.in_file:
            object.__setattr__(self, "in_file", self.name)


class ShardReader(Protocol):
    """One open file of a checkpoint."""

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        """The tensor on the CPU, with the shape and dtype of ``info``.

        It may be a memory map which is read on first use: it must not be written to. Raises
        ``CheckpointError`` when the file has changed since its header was read, or cannot be read.
        """
        ...


class Checkpoint(Protocol):
    """The tensors of one checkpoint, before and while they are read."""

    @property
    def location(self) -> str:
        """The folder, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor in every file: files in the order of ``files``, tensors by their offset."""
        ...

    @property
    def others(self) -> Mapping[str, str]:
        """Entries that are no tensors and may be left out, each with what it is: None, or a ``BytesIO``."""
        ...

    @property
    def absent(self) -> tuple[str, ...]:
        """Names that the index has and no file holds: no tensors, and an error only if one of them is needed."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the tensors, relative to the folder, sorted by name."""
        ...

    @property
    def also_present(self) -> tuple[str, ...]:
        """Other weight files in the folder, which were not chosen: for the report."""
        ...

    @property
    def wrappers(self) -> tuple[str, ...]:
        """What was taken out of the names of tensors, because wrappers had put it there: for the report."""
        ...

    @property
    def config_folder(self) -> Path:
        """The folder where ``config.json`` is, if there is one."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """What says that the tensors are a patched model's own parameters; None for an ordinary checkpoint."""
        ...

    def stamp(self, file: str, /) -> FileStamp | None:
        """One of ``files`` that holds the bytes of its tensors as they are, each at its offset; None for any other."""
        ...

    def open(self, file: str, /) -> AbstractContextManager[ShardReader]:
        """Open one of ``files`` for reading; everything is released at the end of the block."""
        ...
