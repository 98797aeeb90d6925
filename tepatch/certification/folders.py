"""The files of a checkpoint's folder, as a certificate records them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tepatch.certification.certificate import CERTIFICATE, PAGE, FileRecord
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.listing import shortened
from tepatch.checkpoint.manifest import printable
from tepatch.checkpoint.resolve import weight_files
from tepatch.errors import CheckpointError, Problem

_CONFIG_SUFFIXES = (".json", ".py", ".jinja", ".model", ".tiktoken")
_BLOCK = 1 << 22


def weight_records(folder: Path, files: Iterable[str]) -> dict[str, FileRecord]:
    """What is recorded of the files that hold a checkpoint's tensors, beside the digests of those."""
    out = {}
    for name in files:
        path = file_inside(folder, name)
        size = _size(path)
        if name.endswith(".safetensors"):
            length = header_bytes(path)
            sha256 = range_digest(path, 0, length)
            out[name] = FileRecord(bytes=size, header_bytes=length, header_sha256=sha256)
        else:
            out[name] = FileRecord(bytes=size, sha256=range_digest(path, 0, size))
    return out


def beside_weights(
    folder: Path,
    weights: Sequence[str],
    *,
    hash_all: bool,
    each: Callable[..., list[Any]],
) -> dict[str, FileRecord]:
    """The other files of a folder. With ``hash_all`` every one; else not those that look like other weights."""
    names = [name for name in listed(folder) if name not in weights]
    others = set(weight_files(folder)) - {name for name in names if name.endswith(".json")}
    chosen = [name for name in names if hash_all or name not in others]

    def record(name: str) -> FileRecord:
        path = file_inside(folder, name)
        size = _size(path)
        return FileRecord(bytes=size, sha256=range_digest(path, 0, size))

    return dict(zip(chosen, each(record, chosen), strict=True))


def listed(folder: Path) -> list[str]:
    """The files of a folder that a certificate is about: not hidden ones, not folders, not the certificate itself."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(Problem(where=str(folder), what="cannot be read", found=str(error))) from error
    own = (CERTIFICATE, PAGE)
    # A broken link is no file, and still something that was not there before.
    return [name for name in names if not (name.startswith(".") or name in own or (folder / name).is_dir())]


def subfolders_note(folder: Path, files: Iterable[str]) -> str:
    """What to say of folders inside a certified one, whose files nobody looks at; empty if there are none.

    ``files`` are those that are covered: an index may place weights in a sub-folder.
    """
    try:
        names = [name for name in sorted(os.listdir(folder)) if (folder / name).is_dir() and not name.startswith(".")]
    except OSError as error:
        raise CheckpointError(Problem(where=str(folder), what="cannot be read", found=str(error))) from error
    partly = {file.split("/")[0] for file in files if "/" in file}
    shown = [printable(name) + (" (but for its weights)" if name in partly else "") for name in names]
    return f"sub-folders are not covered: {', '.join(shortened(shown))}" if shown else ""


def matters(folder: Path, name: str) -> bool:
    """Whether a file of this name could change what is loaded: weights, settings, a tokenizer, code."""
    return name in weight_files(folder) or name.endswith(_CONFIG_SUFFIXES) or not name.isprintable()


def header_bytes(path: Path) -> int:
    """Bytes before the data of a safetensors file, whose header has been read."""
    with path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def range_digest(path: Path, start: int, count: int) -> str:
    """sha256 over ``count`` bytes of a file, or as many as there are. Raises ``CheckpointError``."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while count > 0 and (block := stream.read(min(count, _BLOCK))):
                digest.update(block)
                count -= len(block)
    except OSError as error:
        raise CheckpointError(Problem(where=str(path), what="cannot be read", found=str(error))) from error
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(Problem(where=str(path), what="cannot be read", found=str(error))) from error
