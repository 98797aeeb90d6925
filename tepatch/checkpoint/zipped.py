"""The zip of a ``.bin`` file: where each entry's bytes are, and whether they are those that were saved.

torch maps the file and takes as many bytes at an entry's place as its pickle claims, whatever the entry's own length
is, and looks at no checksum. So entries that were exchanged, or cut, would be read as numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_PIECE = 1 << 20
MAX_PICKLE_BYTES = 100_000_000
"""As many as a safetensors header may have."""
STORAGE_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    "ComplexDoubleStorage": 16,
}
"""Bytes of one element, by the name of the class that a pickle gives to a tensor's data."""


class DamagedZipError(Exception):
    """What is wrong with the zip, or with one of its entries."""

    def __init__(self, what: str, *, expected: str = "", found: str = "", entry: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.found = found
        self.entry = entry


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in the zip, as its directory and its own header say."""

    name: str
    offset: int
    nbytes: int
    crc: int
    """0 where none was computed, which torch can be told to do."""

    def check(self, stream: BinaryIO) -> None:
        """Raise ``DamagedZipError`` unless the bytes have the checksum that was stored with them."""
        if not self.crc:
            return
        stream.seek(self.offset)
        left, crc = self.nbytes, 0
        while left:
            piece = stream.read(min(_PIECE, left))
            if not piece:
                break
            crc, left = zlib.crc32(piece, crc), left - len(piece)
        if crc != self.crc:
            raise DamagedZipError(
                "its bytes are not those that were saved",
                expected=f"the checksum {self.crc:08x}",
                found=f"{crc:08x}",
                entry=self.name,
            )


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file's pickle says is in it."""

    entries: dict[str, Entry]
    """The entries with data, by the key that the pickle calls each by."""
    keys: dict[str, tuple[str, ...]]
    """The keys of what each name's tensor is made of."""
    has_bytesio: bool


def read_contents(path: Path) -> Contents:
    """The entries that hold data and the names that they belong to: each exactly as long as its tensors say.

    No code of the file is run. Raises ``DamagedZipError``, and ``zipfile.BadZipFile`` and its like.
    """
    with path.open("rb") as stream:
        entries = _entries(stream)
        try:
            pickled = entries.pop("data.pkl")
        except KeyError:
            raise DamagedZipError("cannot be read as a PyTorch checkpoint: it has no data.pkl") from None
        if pickled.nbytes > MAX_PICKLE_BYTES:
            found = f"{pickled.nbytes:,} bytes"
            raise DamagedZipError("its pickle is larger than that of any checkpoint", found=found, entry=pickled.name)
        pickled.check(stream)
        stream.seek(pickled.offset)
        text = stream.read(pickled.nbytes)
    reader = _Reader(text)
    value = reader.load()
    entries = {name.removeprefix("data/"): entry for name, entry in entries.items() if name.startswith("data/")}
    for key, nbytes in reader.claims.items():
        if key not in entries:
            raise DamagedZipError("its tensors claim data that the file does not have", found=f"data/{key}"[:80])
        if entries[key].nbytes != nbytes:
            raise DamagedZipError(
                "its tensors claim data of other sizes than the file has",
                expected=f"{nbytes:,} bytes",
                found=f"{entries[key].nbytes:,} bytes",
                entry=entries[key].name,
            )
    items = value.items() if isinstance(value, dict) else ()
    keys = {name: tuple(dict.fromkeys(_keys_in(each))) for name, each in items if isinstance(name, str)}
    return Contents({key: entries[key] for key in reader.claims}, keys, reader.has_bytesio)


def _entries(stream: BinaryIO) -> dict[str, Entry]:
    """All entries, by their names without the archive's own: each where its own header is, and none over another."""
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        end = archive.start_dir
    out: dict[str, Entry] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:  # a memory map would take the compressed bytes for weights
            raise DamagedZipError("is compressed", entry=info.filename)
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            raise DamagedZipError("is not where the zip says", entry=info.filename)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = stream.read(name_length)
        if magic != _LOCAL_MAGIC or name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise DamagedZipError("is not where the zip says", entry=info.filename)
        if info.file_size != info.compress_size:
            raise DamagedZipError("has two lengths", entry=info.filename)
        short = info.filename.partition("/")[2]
        if short in out:
            raise DamagedZipError("is there twice", entry=info.filename)
        offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        out[short] = Entry(info.filename, offset, info.file_size, info.CRC)
    position, last = 0, ""
    for entry in sorted(out.values(), key=lambda entry: entry.offset):
        if entry.offset < position or entry.offset + entry.nbytes > end:
            raise DamagedZipError("overlaps what follows it", entry=last if entry.offset < position else entry.name)
        position, last = entry.offset + entry.nbytes, entry.name
    return out


@dataclass(frozen=True, slots=True)
class _Data:
    key: str


class _Inert:
    """What stands for every object in the pickle: it keeps its arguments, and does nothing."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass


class _Names(dict[Any, Any]):
    """An ``OrderedDict`` in the pickle, which a state dict is."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Builds the shape of what was pickled from inert parts: no name in it is looked up."""

    def __init__(self, text: bytes) -> None:
        self.claims: dict[str, int] = {}
        """Bytes of the data by its key."""
        self.has_bytesio = False
        for opcode, argument, _ in pickletools.genops(text):
            # The C unpickler makes room for as many objects as this number says.
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(text):
                raise DamagedZipError("its pickle counts more objects than it has bytes")
        super().__init__(io.BytesIO(text), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Names
        self.has_bytesio |= (module, name) == (io.BytesIO.__module__, "BytesIO")
        return name if module.startswith("torch") and name in STORAGE_SIZES else type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> _Data:
        match pid:
            case ("storage", str(kind), str(key), _, int(numel)) if kind in STORAGE_SIZES and numel >= 0:
                nbytes = numel * STORAGE_SIZES[kind]
                if self.claims.setdefault(key, nbytes) != nbytes:
                    raise DamagedZipError("its pickle gives the data of one entry two lengths", found=key[:80])
                return _Data(key)
        raise DamagedZipError(
            "its pickle describes the data of a tensor otherwise than torch does", found=ascii(pid)[:80]
        )


def _keys_in(value: Any) -> Iterator[str]:
    """The keys of the data that an entry of the dictionary is made of."""
    todo, seen = [value], set[int]()
    while todo:
        each = todo.pop()
        if id(each) in seen:  # a list in a pickle may hold itself
            continue
        seen.add(id(each))
        if isinstance(each, _Data):
            yield each.key
        elif isinstance(each, _Inert):
            todo += each.arguments
        elif isinstance(each, tuple | list):
            todo += each
