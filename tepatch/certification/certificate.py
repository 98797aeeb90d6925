"""The certificate of a conversion: what was compared, with which result, and the digests to find any later change by.

It is data and nothing else: made by ``tepatch.certification``, written as JSON for programs and as a page for people,
and read again when a checkpoint is checked without its source. Its own digest shows an edit; it is no signature, for
whoever edits it on purpose can compute that digest anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tepatch.checkpoint.journal import sync_folder
from tepatch.checkpoint.listing import parse_json
from tepatch.dtypes import ITEM_SIZES
from tepatch.errors import CheckpointError, Problem, SaveError, visible

FORMAT = "tepatch-certificate-1"
CERTIFICATE = "tepatch-certificate.json"
PAGE = "tepatch-certificate.html"
MAX_BYTES = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_START = f'{{\n "format": "{FORMAT}"'

Status = Literal["equal", "converted", "tied copy", "ignored", "differs", "missing", "extra"]
FAILURES = ("differs", "missing", "extra")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """What became of one tensor of the original."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In the source; in the destination if the source does not have it."""
    status: Status
    note: str = ""
    """Why it is ignored, what a tied copy is equal to, or what is wrong."""
    source_sha256: str = ""
    destination_sha256: str = ""
    """Over the original's tensor as the destination gives it back; empty where there is none."""
    operation: str = ""
    """The declared operation that made the destination's values from the source's; empty for equal ones."""
    bound: float | None = None
    """The largest deviation that the operation allows: relative to the value's magnitude (at least the smallest
    normal number), which for a scaled or offset tensor includes the offset."""
    deviation: float | None = None
    """The largest deviation measured, in the same measure."""

    @property
    def outcome(self) -> str:
        """In words."""
        text = self.operation if self.status == "converted" else self.status
        return f"{text}, {self.note}" if self.note else text


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint's folder."""

    bytes: int
    sha256: str = ""
    """Over the whole file. Empty for safetensors: the digests of its header and of its tensors cover every byte."""
    header_bytes: int = 0
    header_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRecord:
    """A tensor as it stands in a file, by its own name."""

    file: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SideRecord:
    """A checkpoint that was compared."""

    location: str
    """As it was named."""
    layout: str
    files: Mapping[str, FileRecord]
    stored: Mapping[str, StoredRecord]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The result of ``certify``."""

    patch: str
    plugin: str
    """Name and version of the package that offers the patch; empty for a patch that was passed by hand."""
    mapping: str
    mapping_sha256: str
    layout_sha256: str
    """``Plan.layout_digest`` of the relation between the original's tensors and the parameters."""
    versions: Mapping[str, str]
    created: str
    """UTC, ISO 8601, in seconds."""
    source: SideRecord
    destination: SideRecord
    tensors: tuple[TensorRecord, ...] = field(repr=False)
    constants: int
    """Parameters of which parts have no place in the original, and were found to be the constants that they must be."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    parity: Mapping[str, Any] | None = None
    """Logits compared with Hugging Face's (``tepatch.verify``), and with a verdict, if that was asked for."""

    @property
    def passed(self) -> bool:
        """Whether everything came back as it was, or as it was declared."""
        return not self.problems and not any(tensor.status in FAILURES for tensor in self.tensors)

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of tensors by status, and bytes."""
        counts = Counter(tensor.status for tensor in self.tensors)
        return {
            "tensors": len(self.tensors),
            **{status.replace(" ", "_"): count for status, count in sorted(counts.items())},
            "constants": self.constants,
            "source_bytes": sum(each.bytes for each in self.source.stored.values()),
            "destination_bytes": sum(each.bytes for each in self.destination.stored.values()),
        }

    @property
    def sha256(self) -> str:
        """Over the certificate itself: to see an edit."""
        return body_digest(self._body())

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON-ready data."""
        return {"format": FORMAT, "sha256": self.sha256, **self._body()}

    def __str__(self) -> str:
        counts = Counter(tensor.outcome if tensor.status == "converted" else tensor.status for tensor in self.tensors)
        lines = [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.source.location} ({self.source.layout}) "
            f"-> {self.destination.location} ({self.destination.layout}), patch {self.patch}",
            *(f"  {count:,} {outcome}{self._worst(outcome)}" for outcome, count in sorted(counts.items())),
        ]
        if self.constants:
            lines.append(f"  {self.constants:,} parameters with constant parts")
        if self.parity is not None:
            lines.append(f"  parity, {self.parity['compared']}: {self.parity['verdict']}")
        return visible("\n".join([*lines, *(f"  note: {note}" for note in self.notes)]))

    def _worst(self, outcome: str) -> str:
        found = [t for t in self.tensors if t.outcome == outcome and t.deviation is not None and t.bound]
        if not found:
            return ""
        worst = max(found, key=lambda tensor: tensor.deviation or 0.0)
        return f" (largest deviation {worst.deviation:.3g}, bound {worst.bound:.3g})"

    def _body(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "patch": self.patch,
            "plugin": self.plugin,
            "mapping": {"name": self.mapping, "sha256": self.mapping_sha256},
            "layout_sha256": self.layout_sha256,
            "versions": dict(self.versions),
            "created": self.created,
            "totals": self.totals,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "parity": _finite(self.parity),
            "source": _side_json(self.source),
            "destination": _side_json(self.destination),
            "tensors": [_tensor_json(tensor) for tensor in self.tensors],
        }


def body_digest(data: Mapping[str, Any]) -> str:
    """sha256 over a certificate's canonical JSON (sorted, no spaces, ASCII), without its own digest and its page's."""
    body = {key: value for key, value in data.items() if key not in ("format", "sha256", "page_sha256")}
    text = json.dumps({"format": FORMAT, **body}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def certificate_text(data: Mapping[str, Any]) -> str:
    """The text of the file for JSON-ready data: the same data give the same bytes."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_certificate(certificate: Certificate, folder: Path) -> None:
    """Write the certificate and its page to ``folder``, each complete or not at all.

    Raises ``SaveError`` when something that is no certificate has one of their names, or nothing can be written.
    """
    from tepatch.certification.page import certificate_page

    check_writable(folder)
    page = certificate_page(certificate)
    data = certificate.to_json()
    head = {"format": data.pop("format"), "sha256": data.pop("sha256")}
    text = certificate_text({**head, "page_sha256": hashlib.sha256(page.encode()).hexdigest(), **data})
    _replace(folder / PAGE, page)
    _replace(folder / CERTIFICATE, text)


def check_writable(folder: Path) -> None:
    """Make ``folder`` if it is not there. Raises ``SaveError`` if a certificate can not be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problems = [problem for name in (CERTIFICATE, PAGE) if (problem := _foreign(folder / name)) is not None]
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not problems and not os.access(folder, os.W_OK | os.X_OK):
        fix = "choose another with --out (out=...)"
        problems = [Problem(where=str(folder), what="nothing can be written to this folder", fix=fix)]
    if problems:
        raise SaveError(problems)


def _foreign(path: Path) -> Problem | None:
    """A certificate is replaced by a newer one; whatever else has its name stays."""
    if not os.path.lexists(path):
        return None
    start = ""
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as stream:
            start = stream.read(4096).decode(errors="replace")
    if start.startswith(_START) or (path.name == PAGE and f'content="{FORMAT}"' in start):
        return None
    return Problem(
        where=str(path),
        what="is in the way of the certificate, and is no certificate itself",
        fix="move it away, or write the certificate to another folder",
    )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> SaveError:
    return SaveError(Problem(where=str(path), what="could not be written", found=str(error)))


@dataclass(frozen=True, kw_only=True)
class ReadCertificate:
    """What a check needs to know of a certificate on disk."""

    passed: bool
    created: str
    patch: str
    source: SideRecord
    destination: SideRecord
    page_sha256: str
    edits: tuple[Problem, ...]
    """Signs that the file is not as it was written."""


def read_certificate(path: Path) -> ReadCertificate:
    """Raises ``CheckpointError`` for a file that is missing, or so damaged that nothing can be checked by it."""
    where = str(path)
    try:
        if not path.is_file():
            raise CheckpointError(
                Problem(where=where, what="there is no certificate here", fix="make one: tepatch certify PATCH SRC DST")
            )
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(Problem(where=where, what=f"is larger than {MAX_BYTES:,} bytes, no certificate is"))
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error
    data = parse_json(raw, where=where, subject="certificate")
    if data.get("format") != FORMAT:
        found = ascii(data.get("format"))[:80]
        what = "this version of tepatch does not read this certificate"
        raise CheckpointError(Problem(where=where, what=what, expected=FORMAT, found=found))
    reader = _Reader(where)
    out = ReadCertificate(
        passed=reader.take(data, "passed", bool),
        created=reader.take(data, "created", str),
        patch=reader.take(data, "patch", str),
        source=reader.side(data, "source"),
        destination=reader.side(data, "destination"),
        page_sha256=reader.digest(data, "page_sha256"),
        edits=_edits(raw, data, where),
    )
    if reader.problems:
        raise CheckpointError(reader.problems)
    return out


def _edits(raw: bytes, data: dict[str, Any], where: str) -> tuple[Problem, ...]:
    try:
        found, text = body_digest(data), certificate_text(data).encode()
    except (ValueError, RecursionError):  # NaN, which JSON does not have and Python reads
        found, text = "", b""
    if found == data.get("sha256") and text == raw:
        return ()
    what = "this certificate has been edited or damaged: it is not what was written"
    said = data.get("sha256")
    shown = said if isinstance(said, str) and _SHA256.fullmatch(said) else ascii(said)
    return (Problem(where=where, what=what, expected=f"sha256 {shown}"[:80], found=f"sha256 {found}"),)


class _Reader:
    """Takes values of a known type out of JSON, and keeps what is wrong for one error at the end."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []

    def take(self, data: Mapping[str, Any], key: str, kind: type, at: str = "") -> Any:
        value: Any = data.get(key)
        # A terminal would obey what can not be printed.
        is_hidden = isinstance(value, str) and value != "" and not value.isprintable()
        if type(value) is not kind or is_hidden or (isinstance(value, int) and value < 0):
            self._wrong(f"{at}{key}", "text that can be printed" if is_hidden else kind.__name__, value)
            return kind()
        return value

    def digest(self, data: Mapping[str, Any], key: str, at: str = "", *, is_optional: bool = False) -> str:
        value = data.get(key, "" if is_optional else None)
        if not isinstance(value, str) or not (_SHA256.fullmatch(value) or (is_optional and not value)):
            self._wrong(f"{at}{key}", "64 hexadecimal digits", value)
            return ""
        return value

    def side(self, data: Mapping[str, Any], key: str) -> SideRecord:
        side = self.take(data, key, dict)
        files: dict[str, FileRecord] = {}
        stored: dict[str, StoredRecord] = {}
        for name, entry in self._entries(side, "files", f"{key}."):
            at = f"{key}.files.{name}."
            files[name] = FileRecord(
                bytes=self.take(entry, "bytes", int, at),
                sha256=self.digest(entry, "sha256", at, is_optional=True),
                header_bytes=self.take(entry, "header_bytes", int, at) if "header_bytes" in entry else 0,
                header_sha256=self.digest(entry, "header_sha256", at, is_optional=True),
            )
        for name, entry in self._entries(side, "stored", f"{key}."):
            at = f"{key}.stored.{name}."
            shape, dtype, file = entry.get("shape"), entry.get("dtype"), entry.get("file")
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
                self._wrong(f"{at}shape", "a list of sizes", shape)
                continue
            if not isinstance(dtype, str) or dtype not in ITEM_SIZES or not isinstance(file, str) or file not in files:
                self._wrong(at.removesuffix("."), "a dtype, and one of the files", entry)
                continue
            stored[name] = StoredRecord(
                file=file,
                offset=self.take(entry, "offset", int, at),
                bytes=self.take(entry, "bytes", int, at),
                dtype=dtype,
                shape=tuple(shape),
                sha256=self.digest(entry, "sha256", at),
            )
        return SideRecord(
            location=self.take(side, "location", str, f"{key}."),
            layout=self.take(side, "layout", str, f"{key}."),
            files=files,
            stored=stored,
        )

    def _entries(self, data: Mapping[str, Any], key: str, at: str) -> list[tuple[str, dict[str, Any]]]:
        table = self.take(data, key, dict, at)
        out = []
        for name, entry in table.items():
            if isinstance(entry, dict) and name.isprintable():
                out.append((name, entry))
            else:
                self._wrong(f"{at}{key}.{name!a}", "an object", entry)
        return out

    def _wrong(self, at: str, expected: str, found: object) -> None:
        what, shown = "is not what a certificate has here", ascii(found)[:80]
        self.problems.append(Problem(where=f"{self.where}: {at}", what=what, expected=expected, found=shown))


def _side_json(side: SideRecord) -> dict[str, Any]:
    return {
        "location": side.location,
        "layout": side.layout,
        "files": {name: _file_json(record) for name, record in side.files.items()},
        "stored": {name: {**asdict(each), "shape": list(each.shape)} for name, each in side.stored.items()},
    }


def _file_json(record: FileRecord) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if value or key == "bytes"}


def _tensor_json(tensor: TensorRecord) -> dict[str, Any]:
    data = {key: value for key, value in asdict(tensor).items() if value is not None and value != ""}
    return {**data, "shape": list(tensor.shape)}


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
