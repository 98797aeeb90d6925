"""One writer at a time: a lock that a killed process cannot leave behind.

The kernel drops an ``flock`` with the process that holds it, so nothing has to guess whether a lock file that lies
about is old. The file itself only gives the lock a name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from tepatch.errors import Problem, SaveError

# Network file systems may be mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """The right to write in ``folder``, which is made if need be; held from the start until ``release``.

    Raises ``SaveError`` at once when somebody else, of this process or another, holds it, and OSError.
    """

    def __init__(self, folder: Path, *, where: str) -> None:
        self._folder = folder
        self._path = folder / "lock"
        self.is_exclusive = True
        """False where the file system has no locks, and so nobody else was kept out."""
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            try:
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise SaveError(Problem(where=str(folder), what="is not a folder", fix="remove it"))
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue  # its last holder has just removed the folder
            try:
                self._acquire(where)
                if self._is_current():
                    os.truncate(self._fd, 0)
                    os.write(self._fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)

    def release(self) -> None:
        """Let go, and remove the lock file; and the folder, when nothing else is in it."""
        # Removed while it is held: whoever opened it before sees in _is_current that it has lost its name.
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        os.close(self._fd)

    def _acquire(self, where: str) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            what = "another process is writing this checkpoint"
            raise SaveError(Problem(where=where, what=what, found=holder, fix="wait until it is done")) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.is_exclusive = False

    def _is_current(self) -> bool:
        """Whether the file that is locked is the one that others would open now."""
        try:
            named = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._fd))
