"""Which files of an unfinished job are complete, in a form that a crash cannot make lie.

A line is appended, and forced to the disk, only after the file it names has been: synced, renamed to its name, and
the rename synced. So a line, with the file's size, is proof, and no file has to be read again. A crash can cut the
last line short; that line, and any after it, is not believed, and costs writing one file again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

_VERSION = 1


def read_journal(path: Path, *, job: str) -> dict[str, int] | None:
    """File names and their bytes, from the journal of ``job``; None when there is none, or it is of another job."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    if _parsed(lines[0]) != _heading(job):
        return None
    done: dict[str, int] = {}
    for line in lines[1:-1]:  # what stands after the last newline was cut short
        match _parsed(line):
            case {"file": str(file), "bytes": int(nbytes)}:
                done[file] = nbytes
            case _:
                break
    return done


def start_journal(path: Path, *, job: str, done: Mapping[str, int]) -> None:
    """Begin the journal of ``job`` with the files that are complete already; replaces any other."""
    fresh = path.with_name(f"{path.name}.fresh")
    lines = [_heading(job), *({"file": file, "bytes": nbytes} for file, nbytes in done.items())]
    with fresh.open("wb") as stream:
        stream.writelines(_line(line) for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
    sync_folder(path.parent)


def append_journal(path: Path, *, file: str, nbytes: int) -> None:
    """Note that ``file``, of ``nbytes``, is complete and safe on the disk."""
    with path.open("ab", buffering=0) as stream:
        stream.write(_line({"file": file, "bytes": nbytes}))
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk; the contents of its files are another matter."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do this for a folder
            raise
    finally:
        os.close(fd)


def _heading(job: str) -> dict[str, object]:
    return {"journal": _VERSION, "job": job}


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> object:
    try:
        value: object = json.loads(line)
    except ValueError:
        return None
    return value
