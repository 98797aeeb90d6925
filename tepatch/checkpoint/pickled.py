"""The tensors of a ``.bin`` file, which is a zip with a pickle in it.

``torch.load(weights_only=True, mmap=True)`` makes the tensors: it runs no code of the file, and it maps them instead of
reading them. What they are maps of is held against the zip (``zipped``). Files of before PyTorch 1.6 cannot be mapped
and are refused, as looking at their names would read every weight.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.listing import shortened
from tepatch.checkpoint.recognise import PEEK, ZIP_MAGIC, not_weights
from tepatch.checkpoint.zipped import Contents, DamagedZipError, read_contents
from tepatch.dtypes import dtype_code
from tepatch.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

# How torch.save(_use_new_zipfile_serialization=False) starts: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_DOWNLOAD_AGAIN = "download or copy the file again"
_RESAVE = "save it again with torch.save or, better, as safetensors"
# Whatever an instruction of a damaged pickle runs into comes out of torch.load as it is.
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
    MemoryError,
    UnicodeError,
)


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a ``.bin`` file holds."""

    tensors: Mapping[str, torch.Tensor]
    """As memory maps, by name."""
    others: Mapping[str, str]
    """Entries that are no tensors and can be left out, each with what it is."""
    contents: Contents
    """Where the data is that the tensors are made of."""


def _no_bytes() -> bytes:
    """``bytes()``, which an empty ``BytesIO`` is pickled with. With a number it would take that much memory."""
    return b""


_BYTESIO: list[Callable[..., object] | tuple[Callable[..., object], str]] = [io.BytesIO, (_no_bytes, "builtins.bytes")]


def read_pickled_header(path: Path, *, file: str, where: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of one ``.bin`` file in the order of its dictionary, without reading their data; and the others."""
    loaded = load_pickled(path, where=where)
    infos = [
        TensorInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_code(tensor.dtype) or "",
            file=file,
            offset=0,
            nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in loaded.tensors.items()
    ]
    return infos, dict(loaded.others)


def load_pickled(path: Path, *, where: str) -> Pickled:
    """What a ``.bin`` file holds, its tensors as memory maps of exactly the bytes that they say.

    Raises ``CheckpointError`` when the file is anything but a dictionary of ordinary dense tensors, and of what can be
    left out (None, and the ``BytesIO`` of Transformer Engine's extra state).
    """
    import torch

    try:
        _check_container(path, where=where)
        contents = None
        with contextlib.suppress(*_DAMAGE, pickle.UnpicklingError, zipfile.BadZipFile):
            contents = read_contents(path)
        allowed = _BYTESIO if contents is not None and contents.has_bytesio else []
        with torch.serialization.safe_globals(allowed):
            # On the CPU and not on "meta", so that a tensor which claims more than the file has is refused here.
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # Only now: what torch refuses is told first.
        contents = contents if contents is not None else read_contents(path)
    except DamagedZipError as error:
        raise CheckpointError(_damaged(error, where)) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            Problem(
                where=where,
                what="holds pickled objects other than tensors, and is refused: loading it could run code",
                found=_reason(error),
                fix=f"if you trust the file, load it with torch yourself and {_RESAVE}",
            )
        ) from error
    except (*_DAMAGE, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(
            Problem(
                where=where,
                what="cannot be read as a PyTorch checkpoint",
                found=f"{type(error).__name__}: {_reason(error)}",
                fix=_DOWNLOAD_AGAIN,
            )
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(Problem(where=where, what="is not a dictionary of tensors", found=type(loaded).__name__))
    others = {key: kind for key, value in loaded.items() if (kind := _kind_of_other(key, value))}
    problems = [
        Problem(where=f"{where}: {key!r}", what=fault, found=_describe(value), fix=_advice(value))
        for key, value in loaded.items()
        if key not in others and (fault := _fault(key, value))
    ]
    if problems:
        raise CheckpointError(problems)
    tensors = {name: tensor.detach() for name, tensor in loaded.items() if name not in others}
    if unknown := [name for name in tensors if name not in contents.keys]:
        raise CheckpointError(
            Problem(
                where=where, what="its pickle makes tensors otherwise than torch.save does", details=shortened(unknown)
            )
        )
    return Pickled(tensors, others, contents)


def check_data(path: Path, contents: Contents, key: str, *, where: str) -> None:
    """Raise ``CheckpointError`` unless the data called ``key`` has the checksum that was stored with it. Reads it."""
    try:
        with path.open("rb") as stream:
            contents.entries[key].check(stream)
    except DamagedZipError as error:
        raise CheckpointError(_damaged(error, where)) from error
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error


def _damaged(error: DamagedZipError, where: str) -> Problem:
    at = f"{where}: {error.entry}" if error.entry else where
    if error.what == "is compressed":
        return Problem(where=where, what="is a compressed zip", found=error.entry, fix=_RESAVE)
    return Problem(where=at, what=error.what, expected=error.expected, found=error.found, fix=_DOWNLOAD_AGAIN)


def _check_container(path: Path, *, where: str) -> None:
    """Let only what looks like a zip through to torch."""
    with path.open("rb") as stream:
        start = stream.read(PEEK)
    if start.startswith(_LEGACY_MAGIC):
        raise CheckpointError(
            Problem(
                where=where,
                what="is in the format of before PyTorch 1.6, which must be read whole to be looked at",
                fix=_RESAVE,
            )
        )
    if start.startswith(b"\x80"):
        what = "is a bare pickle, and is refused: loading it could run code"
        raise CheckpointError(Problem(where=where, what=what, fix=_RESAVE))
    if not start.startswith(ZIP_MAGIC):
        raise CheckpointError(not_weights(start, path, where=where, wanted="PyTorch checkpoint"))
    try:
        with zipfile.ZipFile(path) as archive:
            archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(
            Problem(where=where, what="is a damaged or truncated zip", found=str(error), fix=_DOWNLOAD_AGAIN)
        ) from error


def _kind_of_other(key: object, value: object) -> str:
    """What an entry is that is no tensor and may be left out; empty for any other."""
    if not isinstance(key, str) or not key.isprintable():
        return ""
    return "None" if value is None else "BytesIO" if type(value) is io.BytesIO else ""


def _fault(key: object, value: object) -> str:
    """What is wrong with one entry of the dictionary; empty when nothing is."""
    import torch

    if not isinstance(key, str) or not key.isprintable():
        return "the name of this entry is not a printable string"
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return "this entry is not a plain tensor"
    if value.layout != torch.strided or value.device.type != "cpu":
        return "this tensor has no plain dense data"
    # Quantized tensors, which carry a scale besides their data, have dtypes of their own.
    if dtype_code(value.dtype) is None:
        return "the dtype of this tensor has no safetensors code"
    return ""


def _describe(value: object) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{type(value).__name__} of {value.dtype}, {value.layout}, on {value.device}"


def _advice(value: object) -> str:
    nested = isinstance(value, dict)
    return f"take the inner dictionary and {_RESAVE}" if nested else f"leave it out and {_RESAVE}"


def _reason(error: BaseException) -> str:
    """The one line of torch's message that says what happened, not what else could be tried."""
    text = str(error).strip()
    telling = re.search(r".*(?:GLOBAL|[Uu]nsupported).*", text) or re.search(r".+", text)
    line = telling[0].strip() if telling else "no reason given"
    return ascii(line)[1:-1][:200]
