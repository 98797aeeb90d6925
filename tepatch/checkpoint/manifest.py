"""The manifest of a checkpoint in the layout of patched layers: ``tepatch.json``.

Such a checkpoint holds a patched model's own parameters, so that it loads without being put together. Its files are
called ``tepatch*.safetensors`` and not ``model*``: transformers would load those, find none of the names that it
knows, and go on with random weights. What is needed to go back to the original layout, bit for bit, is here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import xxhash

from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.listing import parse_json
from tepatch.dtypes import ITEM_SIZES
from tepatch.errors import CheckpointError, Problem

MANIFEST = "tepatch.json"
STEM = "tepatch"
"""What the names of the weight files begin with."""
FORMAT = "tepatch-checkpoint-1"
MAX_BYTES = 100_000_000
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Original:
    """A tensor of the original checkpoint: what has to come back."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Where a checkpoint in the layout of patched layers comes from, and how its parameters lie."""

    patch: str
    plugin: str
    """Name and version of the package that offers the patch; empty for a patch that was passed by hand."""
    mapping: str
    mapping_digest: str
    layout_digest: str
    """``Plan.layout_digest``: whatever the mapping's text, this is what must be the same."""
    model_class: str
    dtype: str
    tepatch: str
    """Version that wrote it."""
    source: str
    """The original's location, as it was named."""
    source_files: Mapping[str, int]
    """The original's weight files, and their bytes."""
    source_digests: Mapping[str, str]
    """xxh3_128 over the bytes of each tensor that was read from them: by what the original can be recognised."""
    originals: Mapping[str, Original]
    """The original's tensors, in its order."""
    ignored: Mapping[str, str]
    """Tensors of the original that no parameter holds, and why: they do not come back."""
    digest: str = ""
    """What the file says is the digest of all the rest; empty for a manifest that says none, or was not read."""

    def to_json(self) -> str:
        """The file's text. The same conversion gives the same text."""
        data = {"format": FORMAT, **self._body(), "digest": self._digest()}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @property
    def is_edited(self) -> bool:
        """Whether it is not as it was written."""
        return self.digest not in ("", self._digest())

    @property
    def has_digests_of_originals(self) -> bool:
        """Whether ``source_digests`` are those of ``originals``: not if it was converted from a third layout."""
        return self.source_digests.keys() <= self.originals.keys()

    def _body(self) -> dict[str, Any]:
        data = asdict(self)
        del data["digest"]
        return data

    def _digest(self) -> str:
        """xxh3_128 over what the file says, whatever its spaces and the order of its keys."""
        text = json.dumps(self._body(), sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())


def printable(text: str) -> str:
    """Text as a manifest may hold it: a path with control characters, or with bytes that are no UTF-8, is escaped."""
    return text if text.isprintable() else ascii(text)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``; None if there is none. Raises ``CheckpointError`` for one that makes no sense."""
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return None
    where = str(path)
    real = file_inside(folder, MANIFEST)
    if not real.is_file():
        raise CheckpointError(Problem(where=where, what="is not a file"))
    try:
        if real.stat().st_size > MAX_BYTES:
            raise CheckpointError(Problem(where=where, what=f"is larger than {MAX_BYTES:,} bytes, no manifest is"))
        text = real.read_bytes()
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error
    return _parse(parse_json(text, where=where, subject="manifest"), where)


def _is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _parse(data: dict[str, object], where: str) -> Manifest:
    problems: list[Problem] = []

    def wrong(at: str, expected: str, found: object) -> None:
        problems.append(
            Problem(
                where=f"{where}: {at}",
                what="is not what a manifest has here",
                expected=expected,
                found=ascii(found)[:80],
                fix="restore the file as it was written, or convert again",
            )
        )

    def text(name: str) -> str:
        value = data.get(name)
        if not isinstance(value, str) or (value and not value.isprintable()):
            wrong(name, "text", value)
            return ""
        return value

    def table(name: str) -> dict[str, Any]:
        value = data.get(name)
        if not isinstance(value, dict) or not all(key.isprintable() for key in value):
            wrong(name, "a JSON object", value)
            return {}
        return value

    if data.get("format") != FORMAT:
        raise CheckpointError(
            Problem(
                where=where,
                what="this version of tepatch does not read this manifest",
                expected=FORMAT,
                found=ascii(data.get("format"))[:80],
                fix="use the version that wrote it, or a newer one",
            )
        )
    originals: dict[str, Original] = {}
    for name, entry in table("originals").items():
        values = entry if isinstance(entry, dict) else {}
        shape, dtype = values.get("shape"), values.get("dtype")
        if not _is_shape(shape) or not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            wrong(f"originals.{name}", "shape and dtype", entry)
            continue
        originals[name] = Original(shape=tuple(shape), dtype=str(dtype))
    files = table("source_files")
    if not all(type(size) is int for size in files.values()):
        wrong("source_files", "bytes of each file", files)
    digests, ignored = table("source_digests"), table("ignored")
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests.values()):
        wrong("source_digests", "32 hexadecimal digits for each name", digests)
    if not all(isinstance(reason, str) for reason in ignored.values()):
        wrong("ignored", "a reason for each name", ignored)
    out = Manifest(
        patch=text("patch"),
        plugin=text("plugin"),
        mapping=text("mapping"),
        mapping_digest=text("mapping_digest"),
        layout_digest=text("layout_digest"),
        model_class=text("model_class"),
        dtype=text("dtype"),
        tepatch=text("tepatch"),
        source=text("source"),
        source_files=files,
        source_digests=digests,
        originals=originals,
        ignored=ignored,
        digest=text("digest") if "digest" in data else "",
    )
    if problems:
        raise CheckpointError(problems)
    return out
