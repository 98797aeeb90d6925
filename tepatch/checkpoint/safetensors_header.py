"""The header of a safetensors file, checked against the file it stands in.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length N, little
endian; N bytes of JSON which map each tensor to its dtype, shape and ``data_offsets`` counted from the end of
the header; then the data, where tensors follow each other without a gap and end with the file.

Parsed here and not by the safetensors package because a plan wants every problem of every file at once, each
with the name of its tensor, and because a tensor that occurs twice must not go unseen.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.listing import MAX_NAMED, parse_json
from tepatch.checkpoint.recognise import PEEK, not_weights, recognised
from tepatch.dtypes import ITEM_SIZES, PACKED
from tepatch.errors import CheckpointError, Problem

# The limit that the safetensors package itself sets.
MAX_HEADER_BYTES = 100_000_000
# As many dimensions as torch can iterate over; it also bounds the cost of multiplying hostile sizes.
MAX_DIMENSIONS = 64


def read_safetensors_header(path: Path, *, file: str, where: str) -> list[TensorInfo]:
    """The tensors of one safetensors file by their offset, from its header only.

    ``file`` becomes ``TensorInfo.file``; ``where`` names the file in messages. Raises ``CheckpointError``
    with every problem of the header.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(PEEK)
            if start[8:9] != b"{" and recognised(start, path) is not None:
                raise CheckpointError(not_weights(start, path, where=where, wanted="safetensors file"))
            stream.seek(0)
            return parse_safetensors_header(stream, size=size, file=file, where=where)
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error


def parse_safetensors_header(stream: BinaryIO, *, size: int, file: str, where: str) -> list[TensorInfo]:
    """As ``read_safetensors_header``, from a stream of ``size`` bytes."""
    entries, data_start = _read_json(stream, size=size, where=where)
    infos: list[TensorInfo] = []
    problems: list[Problem] = []
    for name, entry in entries.items():
        try:
            if name == "__metadata__":
                _check_metadata(entry)
            else:
                infos.append(_tensor(name, entry, file=file, data_start=data_start))
        except _WrongEntryError as error:
            problems.append(
                Problem(
                    where=f"{where}: {name if name.isprintable() else ascii(name)}",
                    what=error.what,
                    expected=error.expected,
                    found=error.found,
                )
            )
    if not problems:
        # With an entry left out, every later offset would look wrong.
        infos.sort(key=lambda info: (info.offset, info.nbytes))
        problems = _layout_problems(infos, data_start=data_start, size=size, where=where)
    if len(problems) > MAX_NAMED:
        more = Problem(where=where, what=f"{len(problems) - MAX_NAMED:,} more entries of this header are wrong")
        problems = [*problems[:MAX_NAMED], more]
    if problems:
        raise CheckpointError(problems)
    return infos


class _WrongEntryError(Exception):
    """What is wrong with one entry of the header; the caller knows its name."""

    def __init__(self, what: str, *, expected: str = "", found: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.found = found


def _read_json(stream: BinaryIO, *, size: int, where: str) -> tuple[dict[str, object], int]:
    """The header's JSON object, and the position in the file at which the data starts."""

    def refuse(what: str, *, found: str = "", fix: str = "") -> CheckpointError:
        return CheckpointError(Problem(where=where, what=what, found=found, fix=fix))

    prefix = stream.read(8)
    if len(prefix) < 8:
        raise refuse("is shorter than the 8 bytes every safetensors file starts with", found=f"{size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise refuse(
            f"announces a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} the format allows",
            fix="check that this is a safetensors file, and whole",
        )
    if 8 + length > size:
        raise refuse(
            f"announces a header of {length:,} bytes, longer than the file",
            found=f"{size:,} bytes",
            fix="the file is not whole, or not safetensors: download it again",
        )
    text = stream.read(length)
    if not text.startswith(b"{"):
        raise refuse("its header is not a JSON object", found=repr(text[:20]))
    header = parse_json(text, where=where, subject="header")
    return header, 8 + length


def _check_metadata(entry: object) -> None:
    if entry is None:
        return
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise _WrongEntryError("must map strings to strings")


def _tensor(name: str, entry: object, *, file: str, data_start: int) -> TensorInfo:
    # Also keeps out lone surrogates, which cannot be printed, and terminal escapes, which must not be.
    if not name.isprintable():
        raise _WrongEntryError("the name of the tensor holds characters that cannot be printed")
    if not isinstance(entry, dict):
        raise _WrongEntryError("is not described by a JSON object", found=_excerpt(entry))
    dtype = entry.get("dtype")
    if isinstance(dtype, str) and dtype in PACKED:
        raise _WrongEntryError(f"dtype {dtype} packs several elements into a byte, and is not supported")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _WrongEntryError("unknown dtype", expected=", ".join(ITEM_SIZES), found=_excerpt(dtype))
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise _WrongEntryError("the shape is not a list of sizes", found=_excerpt(shape))
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _WrongEntryError("data_offsets is not a pair of positions", found=_excerpt(offsets))
    start, end = offsets
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if end - start != nbytes:
        raise _WrongEntryError(
            "data_offsets does not match shape and dtype",
            expected=f"{_excerpt(nbytes)} bytes for {dtype} {_excerpt(shape)}",
            found=f"{_excerpt(offsets)}",
        )
    return TensorInfo(name=name, shape=tuple(shape), dtype=dtype, file=file, offset=data_start + start, nbytes=nbytes)


def _is_size(value: object) -> bool:
    # type() and not isinstance(): True is an int, but not a size.
    return type(value) is int and 0 <= value < 2**63


def _layout_problems(infos: list[TensorInfo], *, data_start: int, size: int, where: str) -> list[Problem]:
    """Gaps and overlaps between tensors that are sorted by offset, and between the last one and the file."""
    problems: list[Problem] = []
    position, last = data_start, "the header"
    for info in infos:
        gap = info.offset - position
        if gap < 0:
            what = f"overlaps {last} by {-gap:,} bytes"
            problems.append(Problem(where=f"{where}: {info.name}", what=what))
        elif gap > 0:
            what = f"{gap:,} bytes before it belong to no tensor"
            problems.append(Problem(where=f"{where}: {info.name}", what=what))
        if info.offset + info.nbytes >= position:
            position, last = info.offset + info.nbytes, info.name
    if position > size:
        problems.append(
            Problem(
                where=where,
                what=f"is truncated: {position - size:,} bytes are missing",
                expected=f"{position:,} bytes",
                found=f"{size:,} bytes",
                fix="download or copy the file again",
            )
        )
    elif position < size:
        what = f"{size - position:,} bytes at its end belong to no tensor"
        found, expected = f"{size:,} bytes", f"{position:,} bytes"
        problems.append(Problem(where=where, what=what, expected=expected, found=found))
    return problems


def _excerpt(value: object) -> str:
    """A value from a file, short and printable."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        # Integers of thousands of digits refuse to be printed.
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
