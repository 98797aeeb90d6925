"""Where a checkpoint may be written: rules that are decided before a byte is.

A conversion takes long and ends with a rename, and with ``overwrite`` a folder goes for good. So what could make
that rename fail, or take away what nobody meant to give, is found at the start, and all of it at once.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from tepatch.errors import Problem, SaveError

# One of these, and no folder below, makes a folder a checkpoint: only that may be overwritten. Not any *.bin: many
# programs call their data so.
_STEMS = ("model", "pytorch_model", "adapter_model", "tepatch")
_SIGNS = (
    *("config.json", "tepatch.json", "*.index.json"),
    *(f"{stem}*{suffix}" for suffix in (".safetensors", ".bin") for stem in _STEMS),
)


def real_destination(destination: str | os.PathLike[str]) -> Path:
    """The absolute path of ``destination``, with the links of its parents followed, but not its own.

    Raises ``SaveError`` for what can be the path of no folder.
    """
    destination = _path(destination)
    if destination.name in ("", ".."):
        return Path(os.path.realpath(destination))
    return Path(os.path.realpath(destination.parent)) / destination.name


def _path(destination: object) -> Path:
    what = ""
    if not isinstance(destination, str | os.PathLike) or not isinstance(os.fspath(destination), str):
        what = "this is no path of a folder"
    elif not os.fspath(destination):
        what = "the destination is empty"  # and not the current folder, as pathlib takes it
    else:
        path = Path(destination)
        try:
            if b"\0" not in os.fsencode(path):
                return path
            what = "there is a NUL in this path, and no file system takes that"
        except UnicodeEncodeError as error:
            what = f"this is no path on this system: {error}"
    raise SaveError(Problem(where=ascii(destination)[:80], what=what, fix="give the path of a folder"))


def staging_folder(destination: Path) -> Path:
    """The folder beside ``destination`` that holds what is not finished: on the same file system, and hidden."""
    return destination.parent / f".{destination.name}.tepatch-partial"


def destination_problems(destination: Path, *, overwrite: bool, source: Path | None) -> list[Problem]:
    """Everything that speaks against writing a checkpoint to ``destination`` (of ``real_destination``).

    ``source`` is the folder or file that is read meanwhile. Nothing is changed on the disk. Raises OSError when
    the disk cannot be looked at.
    """
    # Told that the source exists, and may be overwritten, somebody would do just that.
    clash = _source_problem(destination, source) if source is not None else None
    clash = clash or _existing_problem(destination, overwrite=overwrite)
    return [problem for problem in (clash, _parent_problem(destination)) if problem is not None]


def _source_problem(destination: Path, source: Path) -> Problem | None:
    real, read = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if real.exists() and read.exists() and os.path.samefile(real, read):
        what = "this is the checkpoint that is read"
    elif real.is_relative_to(read):
        what = "this is inside the checkpoint that is read"
    elif read.is_relative_to(real) or read.is_relative_to(staging_folder(destination)):
        what = "the checkpoint that is read is inside this folder"
    elif linked := _link_into(real, read):
        what = f"the checkpoint that is read has its {linked} here, by a link"
    else:
        return None
    return Problem(where=str(destination), what=what, found=f"reading {source}", fix="choose another destination")


def _link_into(real: Path, read: Path) -> str:
    """The first entry of the folder ``read`` that is a link to something in ``real``; empty when there is none."""
    if not (real.is_dir() and read.is_dir()):
        return ""
    with os.scandir(read) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    return next((name for name in links if Path(os.path.realpath(read / name)).is_relative_to(real)), "")


def _existing_problem(destination: Path, *, overwrite: bool) -> Problem | None:
    if not os.path.lexists(destination):
        return None
    elsewhere = "choose another destination"
    reason = _why_kept(destination)
    if reason:
        return Problem(where=str(destination), what=f"exists, and is never overwritten: {reason}", fix=elsewhere)
    if not overwrite:
        fix = f"{elsewhere}, or replace it by --overwrite (overwrite=True)"
        return Problem(where=str(destination), what="exists", fix=fix)
    return None


def _why_kept(destination: Path) -> str:
    """Why what stands at ``destination`` may not be overwritten; empty when it may."""
    if destination.is_symlink():
        return "it is a symbolic link"
    if not destination.is_dir():
        return "it is not a folder"
    if os.path.ismount(destination):
        return "it is the root of a file system, and cannot be replaced by a rename"
    try:
        with os.scandir(destination) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        return f"it cannot be looked into ({error})"
    folders = sorted(name for name, is_folder in found if is_folder)
    if folders:
        return f"it holds a folder, {folders[0]}"
    if found and not any(map(_is_sign, (name for name, _ in found))):
        return f"it is not a checkpoint (none of {', '.join(_SIGNS)} is in it)"
    return ""


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a folder, and no link to one, with a checkpoint in it. Raises OSError."""
    return not folder.is_symlink() and folder.is_dir() and any(map(_is_sign, os.listdir(folder)))


def _is_sign(name: str) -> bool:
    return any(fnmatchcase(name, sign) for sign in _SIGNS)


def _parent_problem(destination: Path) -> Problem | None:
    """Why nothing can be made beside ``destination``; the folders above it that are missing will be made."""
    parent = destination.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        return Problem(where=str(parent), what=f"is not a folder, so {destination} cannot be in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        # Checked with access and not by the permission bits: those say nothing to root, nor of a read-only disk.
        is_read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        return Problem(
            where=str(parent),
            what="nothing can be written to this folder",
            found="a read-only file system" if is_read_only else "no permission",
            fix="choose another destination, or have the folder made writable",
        )
    return None
