"""What a file was when its header was read, by which a change is noticed before its bytes are believed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tepatch.errors import CheckpointError, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """A file as it was when its header was read."""

    path: Path
    """The file itself, with links followed."""
    where: str
    """The file as the checkpoint names it, for messages."""
    size: int
    mtime_ns: int
    ctime_ns: int
    """No program can set it back, unlike the time of writing."""
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path, *, where: str) -> FileStamp:
        """The stamp of a file now. Raises OSError."""
        status = os.stat(path)
        return cls(
            path=path,
            where=where,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            inode=status.st_ino,
            device=status.st_dev,
        )

    def verify(self) -> None:
        """Raise ``CheckpointError`` unless the file is as it was."""
        try:
            now = FileStamp.of(self.path, where=self.where)
        except OSError as error:
            what = "is gone since its header was read"
            raise CheckpointError(Problem(where=self.where, what=what, found=str(error))) from error
        if now != self:
            raise CheckpointError(
                Problem(
                    where=self.where,
                    what="has changed since its header was read",
                    expected=self._state(),
                    found=now._state(),
                    fix="wait until nothing writes to the checkpoint, and start again",
                )
            )

    def _state(self) -> str:
        return (
            f"{self.size:,} bytes, written at {self.mtime_ns} ns, changed at {self.ctime_ns} ns, "
            f"inode {self.inode} of device {self.device}"
        )
