"""Opening a checkpoint: which files, which tensors in them, and whether all of it fits together.

The headers of all files are read, and everything wrong with any of them is reported at once. The index is
held against the files, not trusted: what counts is what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.index import index_suffix, read_index
from tepatch.checkpoint.interface import ShardReader, TensorInfo
from tepatch.checkpoint.listing import counted, shortened
from tepatch.checkpoint.manifest import Manifest, read_manifest
from tepatch.checkpoint.pickled import read_pickled_header
from tepatch.checkpoint.reading import open_shard
from tepatch.checkpoint.recognise import unfinished
from tepatch.checkpoint.resolve import CONVERTED, find_weights, weight_files
from tepatch.checkpoint.safetensors_header import read_safetensors_header
from tepatch.checkpoint.stamp import FileStamp
from tepatch.checkpoint.wrappers import unwrapped
from tepatch.errors import CheckpointError, Problem

_DOWNLOAD_AGAIN = "download or copy the checkpoint again"


def open_checkpoint(
    location: str | os.PathLike[str],
    *,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
) -> FolderCheckpoint:
    """Find a checkpoint and read the headers of its files: names, shapes and dtypes, but no weights.

    ``location`` is a folder, one ``.safetensors``, ``.bin`` or index file, or a hub id (``org/name``). A hub
    id is looked up in the local Hugging Face cache only; nothing is downloaded. In a folder, files are looked
    for as transformers does: ``model.safetensors``, its index, ``pytorch_model.bin``, its index.

    ``variant`` is the ``fp16`` of ``model.fp16.safetensors``; ``subfolder`` is a folder below the location;
    ``revision`` is a branch, tag or commit of a hub id; ``use_safetensors`` True or False restricts the
    search to one kind of file.

    Raises ``CheckpointError``, with every problem that headers and index show: missing, truncated or
    malformed files, a tensor in two files or in another than the index says, file names or links that lead
    out of the folder, and pickled objects in a ``.bin`` file.
    """
    folder, entry = find_weights(
        location, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    weight_map = read_index(folder, entry) if index_suffix(entry) else None
    files = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (entry,)
    expected: dict[str, list[str]] = {file: [] for file in files}
    for name, file in (weight_map or {}).items():
        expected[file].append(name)

    problems: list[Problem] = []
    headers: dict[str, list[TensorInfo]] = {}
    others: dict[str, str] = {}
    stamps: dict[str, FileStamp] = {}
    for file in files:
        try:
            stamps[file] = _stamp(folder, file, num_expected=len(expected[file]))
            headers[file], no_tensors = _read_header(stamps[file], file=file)
            others |= no_tensors
        except CheckpointError as error:
            problems += error.problems
    tensors = _merge(headers, folder=folder, problems=problems)
    problems += _misplaced(expected, headers, tensors, folder=folder, index=entry)
    if problems:
        raise CheckpointError(problems)
    stored = set(tensors)
    wrappers: tuple[str, ...] = ()
    if entry not in CONVERTED:  # whose names are what tepatch has written
        tensors, wrappers = unwrapped(tensors, str(folder))
    return FolderCheckpoint(
        location=str(folder),
        tensors=MappingProxyType(tensors),
        others=MappingProxyType({name: kind for name, kind in others.items() if name not in stored}),
        absent=tuple(name for name in weight_map or () if name not in stored and name not in others),
        entry=entry,
        files=files,
        also_present=tuple(name for name in weight_files(folder) if name != entry and name not in expected),
        wrappers=wrappers,
        config_folder=folder,
        manifest=read_manifest(folder) if entry in CONVERTED else None,
        stamps=MappingProxyType(stamps),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderCheckpoint:
    """A ``Checkpoint`` whose files are in one folder."""

    location: str
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    others: Mapping[str, str] = field(repr=False)
    absent: tuple[str, ...] = field(repr=False)
    entry: str
    """The only file, or the index."""
    files: tuple[str, ...]
    also_present: tuple[str, ...]
    wrappers: tuple[str, ...]
    config_folder: Path
    manifest: Manifest | None
    stamps: Mapping[str, FileStamp] = field(repr=False)

    def stamp(self, file: str, /) -> FileStamp | None:
        """A file that holds the bytes of its tensors as they are, each at its offset; None if they are pickled."""
        return None if file.endswith(".bin") else self.stamps[file]

    @contextmanager
    def open(self, file: str, /) -> Iterator[ShardReader]:
        """Open one of ``files`` for reading; everything is released at the end of the block."""
        if file not in self.stamps:
            what = f"{file!r} is not a file of this checkpoint"
            raise CheckpointError(Problem(where=self.location, what=what, details=shortened(self.files)))
        reader = open_shard(self.stamps[file], file=file)
        try:
            yield reader
        finally:
            reader.close()


def _stamp(folder: Path, file: str, *, num_expected: int) -> FileStamp:
    where = str(folder / file)
    path = file_inside(folder, file)
    # A pipe or a device would block, or never end.
    if not os.path.isfile(path):
        missing = "is not a file" if os.path.exists(path) else "is missing"
        held = f"; the index places {counted(num_expected)} in it" if num_expected else ""
        partial = unfinished(folder, [file])
        details = tuple(f"{name} is there: its download has not ended" for name in partial)
        fix = f"let the download end, or start it again; else {_DOWNLOAD_AGAIN}" if partial else _DOWNLOAD_AGAIN
        raise CheckpointError(Problem(where=where, what=f"{missing}{held}", details=details, fix=fix))
    try:
        return FileStamp.of(path, where=where)
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error


def _read_header(stamp: FileStamp, *, file: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a file, and its entries that are none."""
    if file.endswith(".bin"):
        return read_pickled_header(stamp.path, file=file, where=stamp.where)
    return read_safetensors_header(stamp.path, file=file, where=stamp.where), {}


def _merge(headers: Mapping[str, list[TensorInfo]], *, folder: Path, problems: list[Problem]) -> dict[str, TensorInfo]:
    """All tensors by name; a name that two files hold is added to ``problems``."""
    tensors: dict[str, TensorInfo] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for infos in headers.values():
        for info in infos:
            first = tensors.setdefault(info.name, info)
            if first is not info:
                twice.setdefault((first.file, info.file), []).append(info.name)
    problems += [
        Problem(
            where=str(folder / second),
            what=f"holds {counted(len(names))} that {first} holds too",
            details=shortened(names),
            fix="one of the files does not belong here; nothing tells which values are right",
        )
        for (first, second), names in twice.items()
    ]
    return tensors


def _misplaced(
    expected: Mapping[str, list[str]],
    headers: Mapping[str, list[TensorInfo]],
    tensors: Mapping[str, TensorInfo],
    *,
    folder: Path,
    index: str,
) -> list[Problem]:
    """What the index places in a file that does not hold it, but another does.

    What no file holds is left to the plan, which knows whether anything needs it: indexes of published checkpoints name
    tensors that were taken out.
    """
    problems: list[Problem] = []
    for file, infos in headers.items():
        held = {info.name for info in infos}
        lacking = [name for name in expected[file] if name not in held and name in tensors]
        if lacking:
            problems.append(
                Problem(
                    where=str(folder / file),
                    what=f"lacks {counted(len(lacking))} which {index} places in it",
                    details=shortened([f"{name} (it is in {tensors[name].file})" for name in lacking]),
                    fix=_DOWNLOAD_AGAIN,
                )
            )
    return problems
