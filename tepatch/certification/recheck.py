"""Checking a certified checkpoint again, without its source: is every byte what it was?

Nothing of the checkpoint is trusted or needs to be sound: ranges of its files are hashed as the certificate lists
them. So one damaged file is one problem, named, and the others are checked all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tepatch.certification.certificate import (
    CERTIFICATE,
    PAGE,
    FileRecord,
    ReadCertificate,
    StoredRecord,
    read_certificate,
)
from tepatch.certification.folders import listed, matters, range_digest, subfolders_note
from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.checkpoint.manifest import printable
from tepatch.checkpoint.pickled import load_pickled
from tepatch.checkpoint.safetensors_header import read_safetensors_header
from tepatch.errors import CheckpointError, PlanError, Problem, visible
from tepatch.mapping.names import fold


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of ``check_certificate``."""

    certificate: str
    """The certificate's file."""
    folder: str
    """What was checked."""
    created: str
    """When the certificate was; empty if it can not be read."""
    files: int
    tensors: int
    bytes: int
    """Numbers of what was to be checked, as the certificate lists it."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        data = asdict(self)
        return {"passed": self.passed, **data, "problems": [asdict(problem) for problem in self.problems]}

    def __str__(self) -> str:
        count = len(self.problems)
        verdict = f"FAILED ({count} problem{'' if count == 1 else 's'})" if count else "PASSED"
        lines = [
            f"{verdict}: {self.folder}, {self.files:,} files, {self.tensors:,} tensors, {self.bytes:,} bytes, "
            f"certified {self.created or 'never'}"
        ]
        return visible("\n".join([*lines, *(f"  note: {note}" for note in self.notes)]))


def check_certificate(
    path: str | PathLike[str],
    *,
    destination: str | PathLike[str] | None = None,
    source: str | PathLike[str] | None = None,
    workers: int = 2,
) -> CheckResult:
    """Recompute all digests of a certified checkpoint, and name every file and tensor that is not what it was.

    ``path`` is the certificate, or the folder that it is in. ``destination`` is the folder of the checkpoint, by
    default the certificate's own; ``source`` is the checkpoint that it was made from, if that is to be checked as
    well. Files that the certificate does not know are a problem if they could change what is loaded, and else a note.
    Sub-folders are not covered, and named in a note.

    Raises ``CheckpointError`` only if there is no certificate at all, and ``PlanError`` for ``workers`` that are none.
    """
    if not isinstance(workers, int) or workers < 1:
        raise PlanError(Problem(where="workers", what="at least one worker is needed", found=repr(workers)))
    path = Path(path)
    path = path / CERTIFICATE if path.is_dir() else path
    folder = Path(destination) if destination is not None else path.parent
    try:
        certificate = read_certificate(path)
    except CheckpointError as error:
        if not path.is_file():
            raise
        return CheckResult(
            certificate=str(path),
            folder=str(folder),
            created="",
            files=0,
            tensors=0,
            bytes=0,
            problems=error.problems,
            notes=("nothing was checked: the certificate can not be read",),
        )
    checker = _Checker(folder, certificate, workers)
    checker.check_itself(path)
    checker.check_files()
    if source is not None:
        checker.check_source(source)
    side = certificate.destination
    return CheckResult(
        certificate=str(path),
        folder=str(folder),
        created=certificate.created,
        files=len(side.files),
        tensors=len(side.stored),
        bytes=sum(record.bytes for record in side.files.values()),
        problems=tuple(checker.problems),
        notes=tuple(checker.notes),
    )


class _Checker:
    def __init__(self, folder: Path, certificate: ReadCertificate, workers: int) -> None:
        self._folder = folder
        self._certificate = certificate
        self._workers = workers
        self._files = certificate.destination.files
        self._stored: dict[str, dict[str, StoredRecord]] = {name: {} for name in self._files}
        for name, record in certificate.destination.stored.items():
            self._stored[record.file][name] = record
        self._owners = {r.sha256: name for name, r in certificate.destination.stored.items() if r.bytes}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def check_itself(self, path: Path) -> None:
        """Is the certificate what was written, and does it say that all was well?"""
        self.problems += self._certificate.edits
        if not self._certificate.passed:
            what = "this certificate says itself that tensors were lost or changed"
            self.problems.append(Problem(where=str(path), what=what, fix="read its problems"))
        page = path.with_name(PAGE)
        if not page.is_file():
            self.notes.append(f"{PAGE} is not beside the certificate")
            return
        try:
            found = range_digest(page, 0, page.stat().st_size)
        except (OSError, CheckpointError) as error:
            self.problems.append(Problem(where=str(page), what="cannot be read", found=str(error)))
            return
        if found != self._certificate.page_sha256:
            self.problems.append(Problem(where=str(page), what="is not the page that was written with the certificate"))

    def check_files(self) -> None:
        """Every file of the destination, and that there is no other."""
        with ThreadPoolExecutor(self._workers) as pool:
            for problems in pool.map(self._file, self._files):
                self.problems += problems
        if not self._folder.is_dir():
            return
        if note := subfolders_note(self._folder, self._files):
            self.notes.append(note)
        for name in listed(self._folder):
            if name in self._files:
                continue
            shown = printable(name)
            if matters(self._folder, name):
                what = "was not there when the checkpoint was certified, and could change what is loaded"
                self.problems.append(Problem(where=str(self._folder / shown), what=what, fix="remove it"))
            else:
                self.notes.append(f"{shown} was not there when the checkpoint was certified")

    def check_source(self, location: str | PathLike[str]) -> None:
        """The source's tensors, by name, in whatever files they are."""
        try:
            checkpoint = open_checkpoint(location)
            found = _digests(checkpoint, self._workers)
        except CheckpointError as error:
            self.problems += error.problems
            return
        for name, record in self._certificate.source.stored.items():
            where = f"{checkpoint.location}: {name}"
            if name not in found:
                self.problems.append(Problem(where=where, what="is missing from the source"))
            elif found[name] != (record.dtype, record.shape, record.sha256):
                self.problems.append(Problem(where=where, what="is not the tensor that was certified (source)"))
        added = [name for name in found if name not in self._certificate.source.stored]
        self.problems += [
            Problem(where=f"{checkpoint.location}: {name}", what="was not in the source that was certified")
            for name in added
        ]

    def _file(self, name: str) -> list[Problem]:
        record, where = self._files[name], str(self._folder / name)
        try:
            path = file_inside(self._folder, name)
            if not path.is_file():
                held = fold(self._stored[name], 12)
                return [Problem(where=where, what="is missing", details=tuple(held))]
            size = path.stat().st_size
        except CheckpointError as error:
            return list(error.problems)
        except OSError as error:
            return [Problem(where=where, what="cannot be read", found=str(error))]
        problems = []
        if size != record.bytes:
            what = "is truncated" if size < record.bytes else "has become longer"
            expected, found = f"{record.bytes:,} bytes", f"{size:,} bytes"
            problems.append(Problem(where=where, what=what, expected=expected, found=found))
        try:
            if record.header_sha256:
                return [*problems, *self._safetensors(name, path, where, record, size)]
            if not problems and range_digest(path, 0, size) == record.sha256:
                return []
            return [*problems, *self._other(name, path, where)]
        except CheckpointError as error:
            return [*problems, *error.problems]

    def _safetensors(self, name: str, path: Path, where: str, record: FileRecord, size: int) -> list[Problem]:
        problems, stored = [], self._stored[name]
        places = {tensor: (each.offset, each.bytes) for tensor, each in stored.items()}
        if range_digest(path, 0, record.header_bytes) != record.header_sha256:
            problems.append(Problem(where=where, what="its header is not the one that was certified"))
            try:
                infos = {info.name: info for info in read_safetensors_header(path, file=name, where=where)}
            except CheckpointError as error:
                return [*problems, *error.problems]
            problems += _changed(where, stored, {n: (i.dtype, tuple(i.shape)) for n, i in infos.items()})
            places = {tensor: (infos[tensor].offset, infos[tensor].nbytes) for tensor in stored if tensor in infos}
        for tensor, (start, count) in places.items():
            at = f"{where}: {tensor}"
            if start + count > size:
                problems.append(Problem(where=at, what="is cut off"))
            elif (found := range_digest(path, start, count)) != stored[tensor].sha256:
                problems.append(self._damaged(at, found))
        return problems

    def _other(self, name: str, path: Path, where: str) -> list[Problem]:
        """A file whose digest is another one: as it is, or with the tensors in it that are to blame."""
        stored = self._stored[name]
        problems = [Problem(where=where, what="is not the file that was certified: its bytes have changed")]
        if not stored:
            return problems
        from tepatch.dtypes import dtype_code
        from tepatch.transfer.reader import tensor_digest

        tensors = load_pickled(path, where=where).tensors
        forms = {each: (dtype_code(tensor.dtype) or "", tuple(tensor.shape)) for each, tensor in tensors.items()}
        problems += _changed(where, stored, forms)
        for each in stored.keys() & tensors.keys():
            found = tensor_digest(tensors[each])
            if found != stored[each].sha256:
                problems.append(self._damaged(f"{where}: {each}", found))
        return problems

    def _damaged(self, where: str, found: str) -> Problem:
        owner = self._owners.get(found)
        details = (f"these are the values of {owner}",) if owner else ()
        return Problem(where=where, what="is not what was certified: its values have changed", details=details)


def _changed(
    where: str, stored: Mapping[str, StoredRecord], found: Mapping[str, tuple[str, tuple[int, ...]]]
) -> list[Problem]:
    """Tensors that a file holds and did not, or the other way, or in another form."""
    problems = [Problem(where=f"{where}: {n}", what="is no longer in this file") for n in stored if n not in found]
    for name, (dtype, shape) in found.items():
        if name not in stored:
            problems.append(Problem(where=f"{where}: {name}", what="was not in this file when it was certified"))
        elif (dtype, shape) != (stored[name].dtype, stored[name].shape):
            expected, now = f"{stored[name].dtype} {list(stored[name].shape)}", f"{dtype} {list(shape)}"
            problems.append(Problem(where=f"{where}: {name}", what="has another form", expected=expected, found=now))
    return problems


def _digests(checkpoint: FolderCheckpoint, workers: int) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and sha256 of every tensor of a checkpoint."""
    from tepatch.transfer.reader import Tensors, tensor_digest

    with Tensors(checkpoint) as tensors, ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda name: tensor_digest(tensors.read(name)), checkpoint.tensors)
        infos = checkpoint.tensors.values()
        return {i.in_file: (i.dtype, tuple(i.shape), sha256) for i, sha256 in zip(infos, found, strict=True)}
