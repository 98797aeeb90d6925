"""A folder that appears complete, or not at all; and a job that goes on where it was killed.

Files are written in a hidden folder beside the destination and become the destination by one rename. What a crash
can leave is always in that one folder, ``.NAME.tepatch-partial``:

    lock      held while somebody writes
    journal   which files of ``new`` are complete, of which job
    new/      what will be the destination
    old/      what was the destination, for the moment between two renames, when it is overwritten

What has to be done about such remains is read off the disk alone: ``old`` without a destination is moved back;
``old`` beside a destination and without ``new`` means that the renames were done, and only cleaning up was not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tepatch.checkpoint.containment import name_fault
from tepatch.checkpoint.destination import destination_problems, is_checkpoint, real_destination, staging_folder
from tepatch.checkpoint.journal import append_journal, read_journal, start_journal, sync_folder
from tepatch.checkpoint.listing import shortened
from tepatch.checkpoint.locking import FolderLock
from tepatch.errors import Problem, SaveError

# Small writes are gathered; one larger than this goes to the file as it is, without being copied.
_BUFFER_BYTES = 1 << 20


class Staging:
    """Writes the files of a checkpoint so that ``destination`` is complete or absent (or what it was before).

        with Staging(Path("out"), overwrite=False, source=Path("in"), need={"model.safetensors": 1000}, job=job) as new:
            if not new.is_done("model.safetensors"):
                with new.create("model.safetensors") as stream:
                    stream.write(data)
            new.write("config.json", text)
            new.commit()

    ``need`` has the bytes of each large file: the space is checked with it first, and the files at the end.
    ``job`` identifies what is written (a digest of all that decides the bytes). When the block ends early, by an
    error or a kill, complete files stay for the next run of the same job; without a job nothing stays.
    ``source`` is what is read meanwhile, and must be elsewhere.

    Raises ``SaveError`` for a destination that is no path. Entering raises it with every rule of the destination that
    is broken, when another process writes there, and when the space will not do: before anything is written.
    Afterwards, what the operating system refuses is a ``SaveError`` too. Several threads may create different files
    at once.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        overwrite: bool,
        source: Path | None = None,
        need: Mapping[str, int],
        job: str | None = None,
    ) -> None:
        self.destination = real_destination(destination)
        self.notes: list[str] = []
        """What was found and done about the remains of earlier runs, for the report: one sentence each."""
        self._overwrite = overwrite
        self._source = source
        self._need = dict(need)
        self._job = job
        self._root = staging_folder(self.destination)
        self._new = self._root / "new"
        self._old = self._root / "old"
        self._journal = self._root / "journal"
        self._lock: FolderLock | None = None
        self._is_prepared = False
        self._mutex = threading.Lock()
        self._done: dict[str, int] = {}
        self._writing: set[str] = set()
        # Of the complete files, those that this run knows of: an earlier version may have written others.
        self._wanted: set[str] = set()
        for file in self._need:
            _check_name(file)

    def __enter__(self) -> Staging:
        try:
            with self._failures(str(self.destination)):
                self._check_destination(sees_remains=True)
                _make_folders(self.destination.parent)
                self._lock = FolderLock(self._root, where=str(self.destination))
                self._bring_back_old()
                # Again: the folder that was moved back counts, and so does what the last holder of the lock wrote.
                self._check_destination()
                self._take_up()
                self._check_space()
        except BaseException:
            self._leave()
            raise
        if not self._lock.is_exclusive:
            self.notes.append(f"{self._root} has no locks: another process that writes there would go unseen")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def is_done(self, file: str) -> bool:
        """Whether an earlier run of this job has written ``file``; if so, it is kept, and need not be created."""
        with self._mutex:
            if file in self._done:
                self._wanted.add(file)
            return file in self._done

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        """A stream for the bytes of ``file``, which gets its name at the end of the block, and only if it is whole.

        ``fileno()`` may be used to write past the stream (``os.copy_file_range``): flush the stream before. Raises
        ``ValueError`` for a name that is not a plain file's, or that is being written already.
        """
        _check_name(file)
        self._check_open()
        with self._mutex:
            if file in self._writing:
                raise ValueError(f"{file} is being written already")
            self._writing.add(file)
        partial = self._new / f".{file}.partial"
        try:
            with self._failures(str(self.destination / file)):
                stream = partial.open("wb", buffering=_BUFFER_BYTES)
                try:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                    nbytes = os.fstat(stream.fileno()).st_size
                except BaseException:
                    # Closing flushes; on a full disk it would fail again, in place of the error that is on its way.
                    with contextlib.suppress(OSError):
                        stream.close()
                    raise
                stream.close()
                self._check_size(file, nbytes)
                os.replace(partial, self._new / file)
                self._finish(file, nbytes)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        finally:
            with self._mutex:
                self._writing.discard(file)

    def write(self, file: str, data: bytes | str) -> None:
        """Write a small file as a whole; text is written as UTF-8."""
        with self.create(file) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)

    def commit(self) -> None:
        """Make the files the destination, and leave nothing else. Raises ``SaveError`` unless all are there."""
        self._check_open()
        with self._failures(str(self.destination)):
            self._check_complete()
            for file in self._done.keys() - self._wanted:
                os.unlink(self._new / file)
                self.notes.append(f"left out {file}, which an earlier run had written, and this one does not")
            sync_folder(self._new)
            # Hours may have passed since the first time.
            self._check_destination()
            if os.path.lexists(self.destination):
                os.rename(self.destination, self._old)
            # Should this fail, _leave moves the old folder back.
            os.rename(self._new, self.destination)
            sync_folder(self._root)
            sync_folder(self.destination.parent)
        self._leave()

    def _check_open(self) -> None:
        if self._lock is None:
            raise ValueError("a Staging is written to inside its with block, and before commit")

    def _check_destination(self, *, sees_remains: bool = False) -> None:
        problems = destination_problems(self.destination, overwrite=self._overwrite, source=self._source)
        if problems and sees_remains and os.path.lexists(self.destination):
            # Of a run that was killed when all but tidying up was done, nobody else would come to see the remains.
            problems[0] = replace(problems[0], details=(*problems[0].details, *self._remains()))
        if problems:
            raise SaveError(problems)

    def _remains(self) -> tuple[str, ...]:
        """Of a destination that is refused: tidy up what is left beside it, or else say where it is."""
        if self._root.is_symlink() or not self._root.is_dir():
            return ()
        try:
            lock = FolderLock(self._root, where=str(self.destination))
        except (OSError, SaveError):
            return ()  # whoever holds it is at work there, and tidies up
        try:
            # Read off the disk as in _bring_back_old, but nothing is taken back or decided here.
            is_source = self._source is not None and Path(os.path.realpath(self._source)).is_relative_to(self._root)
            has_old = os.path.lexists(self._old)
            if os.path.lexists(self._new) or is_source or (has_old and not is_checkpoint(self.destination)):
                return (f"unfinished files of an earlier run are in {self._root}: if nobody needs them, remove it",)
            for path in (self._journal, self._old):
                _remove(path)
            return (f"removed {self._root}: the run that wrote this was complete, and only tidying up was not",)
        except OSError as error:
            return (f"remains of an earlier run are in {self._root}, and can not be tidied up: {error}",)
        finally:
            lock.release()

    def _bring_back_old(self) -> None:
        """Undo, or see as done, an overwrite that was cut short between its two renames."""
        if not os.path.lexists(self._old):
            return
        if not os.path.lexists(self.destination):
            os.rename(self._old, self.destination)
            sync_folder(self.destination.parent)
            self.notes.append(f"moved {self.destination} back, which an interrupted overwrite had moved away")
        elif os.path.lexists(self._new):
            # Somebody else wrote the destination after the crash, and neither folder is ours to delete.
            raise SaveError(
                Problem(
                    where=str(self.destination),
                    what="an overwrite was interrupted here, and something else has been put in its place since",
                    details=(f"what stood here before it: {self._old}",),
                    fix=f"move what you need to another place, then remove {self._root}",
                )
            )
        else:
            _remove(self._old)
            self.notes.append(f"removed {self._old}: its overwrite was complete, and only this was left of it")

    def _take_up(self) -> None:
        """Keep the complete files of this job; remove whatever else an earlier run has left."""
        self._is_prepared = True
        noted = read_journal(self._journal, job=self._job) if self._job is not None else None
        self._done = {file: nbytes for file, nbytes in (noted or {}).items() if self._is_whole(file, nbytes)}
        if noted is None and os.path.lexists(self._new):
            whose = "another job" if self._job is not None else "an interrupted run"
            self.notes.append(f"removed the unfinished files of {whose} from {self._root}")
        elif self._done:
            self.notes.append(f"going on; complete already: {', '.join(shortened(sorted(self._done)))}")
        # The journal of another job goes before its files do, and a new one comes when they are gone.
        if noted is None:
            self._journal.unlink(missing_ok=True)
        self._new.mkdir(exist_ok=True)
        for name in os.listdir(self._new):
            if name not in self._done:
                _remove(self._new / name)
        if self._job is not None:
            start_journal(self._journal, job=self._job, done=self._done)

    def _is_whole(self, file: str, nbytes: int) -> bool:
        path = self._new / file
        if "/" in file or path.is_symlink() or not path.is_file():
            return False
        return path.stat().st_size == nbytes == self._need.get(file, nbytes)

    def _check_space(self) -> None:
        missing = sum(nbytes for file, nbytes in self._need.items() if file not in self._done)
        free = shutil.disk_usage(self._root).free
        if missing <= free:
            return
        kept = (f"what stands at {self.destination} now stays until the end",) if self.destination.exists() else ()
        raise SaveError(
            Problem(
                where=str(self.destination.parent),
                what="there is not enough space on this file system",
                details=kept,
                expected=f"{missing:,} bytes",
                found=f"{free:,} bytes are free",
                fix="free some space, or choose a destination elsewhere",
            )
        )

    def _check_size(self, file: str, nbytes: int) -> None:
        expected = self._need.get(file, nbytes)
        if nbytes != expected:
            raise SaveError(
                Problem(
                    where=str(self.destination / file),
                    what="was not written as it was planned, and is given up",
                    expected=f"{expected:,} bytes",
                    found=f"{nbytes:,} bytes",
                )
            )

    def _finish(self, file: str, nbytes: int) -> None:
        sync_folder(self._new)
        with self._mutex:
            if self._job is not None:
                append_journal(self._journal, file=file, nbytes=nbytes)
            self._done[file] = nbytes
            self._wanted.add(file)

    def _check_complete(self) -> None:
        unwritten = dict.fromkeys(self._need.keys() - self._wanted, "was not written")
        unwritten |= dict.fromkeys(self._writing, "is still being written")
        if unwritten:
            raise SaveError(
                [
                    Problem(where=str(self.destination / file), what=f"{reason}, and so the checkpoint is not complete")
                    for file, reason in sorted(unwritten.items())
                ]
            )

    def _leave(self) -> None:
        """Bring the disk to rest: nothing stays but what the next run of this job can use."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if os.path.lexists(self._old) and not os.path.lexists(self.destination):
                os.rename(self._old, self.destination)
            is_resumable = self._job is not None and bool(self._done) and self._new.exists()
            # Somebody has put a third folder where the old one stood, between the two renames.
            is_undecided = os.path.lexists(self._old) and self._new.exists()
            if self._is_prepared and not is_resumable and not is_undecided:
                # The lock goes last: with it gone, another process may begin here.
                for path in (self._journal, self._new, self._old):
                    _remove(path)
        except OSError as error:
            self.notes.append(f"could not tidy up {self._root}: {error}")
        finally:
            lock.release()

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Turn what the operating system refuses into ``SaveError``."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            again = "run the same again: files that are complete are kept" if self._job is not None else "run it again"
            raise SaveError(
                Problem(
                    where=where,
                    what="could not be written",
                    details=self._free_space(),
                    found=str(error),
                    fix=f"free some space, then {again}" if is_full else f"put that right, then {again}",
                )
            ) from error

    def _free_space(self) -> tuple[str, ...]:
        try:
            free = shutil.disk_usage(self.destination.parent).free
        except OSError:
            return ()
        return (f"{free:,} bytes are free on this file system",)


def _check_name(file: str) -> None:
    fault = name_fault(file)
    if fault or "/" in file or (file.startswith(".") and file.endswith(".partial")):
        raise ValueError(f"{file!r} cannot be a file of a checkpoint: {fault or 'it is in a folder, or our own'}")


def _make_folders(folder: Path) -> None:
    """Make ``folder`` and those above it, safely on the disk."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
