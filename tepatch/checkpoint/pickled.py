"""The tensors of a ``.bin`` file, which is a zip with a pickle in it.

Only ``torch.load(weights_only=True, mmap=True)`` touches the pickle: it runs no code of the file, and it maps
the tensors instead of reading them. Files of before PyTorch 1.6 cannot be mapped and are refused, as looking
at their names would read every weight.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tepatch.checkpoint.dtypes import dtype_code
from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.listing import MAX_NAMED
from tepatch.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

# How torch.save(_use_new_zipfile_serialization=False) starts: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ZIP_MAGIC = b"PK\x03\x04"
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
)


def read_pickled_header(path: Path, *, file: str, where: str) -> list[TensorInfo]:
    """The tensors of one ``.bin`` file in the order of its dictionary, without reading their data."""
    return [
        TensorInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_code(tensor.dtype) or "",
            file=file,
            offset=0,
            nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in load_pickled(path, where=where).items()
    ]


def load_pickled(path: Path, *, where: str) -> dict[str, torch.Tensor]:
    """The named tensors of a ``.bin`` file as memory maps.

    Raises ``CheckpointError`` when the file is anything but a dictionary of ordinary dense tensors.
    """
    import torch

    try:
        stored = _check_container(path, where=where)
        # On the CPU and not on "meta", so that a tensor which claims more than the file has is refused here.
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            Problem(
                where=where,
                what="holds pickled objects other than tensors, and is refused: loading it could run code",
                found=_reason(error),
                fix=f"if you trust the file, load it with torch yourself and {_RESAVE}",
            )
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            Problem(
                where=where,
                what="cannot be read as a PyTorch checkpoint",
                found=f"{type(error).__name__}: {_reason(error)}",
                fix="download or copy the file again",
            )
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(Problem(where=where, what="is not a dictionary of tensors", found=type(loaded).__name__))
    problems = [
        Problem(where=f"{where}: {key!r}", what=fault, found=_describe(value), fix=_advice(value))
        for key, value in loaded.items()
        if (fault := _fault(key, value))
    ]
    if problems:
        raise CheckpointError(problems)
    _check_sizes(loaded, stored, where=where)
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_container(path: Path, *, where: str) -> Counter[int]:
    """Let only a zip of uncompressed entries through to torch; the sizes of those that hold tensors' data."""
    with path.open("rb") as stream:
        start = stream.read(len(_LEGACY_MAGIC))
    if start == _LEGACY_MAGIC:
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
    if not start.startswith(_ZIP_MAGIC):
        raise CheckpointError(Problem(where=where, what="is not a PyTorch checkpoint", found=repr(start)))
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(
            Problem(
                where=where,
                what="is a damaged or truncated zip",
                found=str(error),
                fix="download or copy the file again",
            )
        ) from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        # A memory map would take the compressed bytes for weights.
        raise CheckpointError(Problem(where=where, what="is a compressed zip", found=packed[0], fix=_RESAVE))
    # An entry is ARCHIVE/data/KEY, where the archive has any name.
    return Counter(entry.file_size for entry in entries if entry.filename.partition("/")[2].startswith("data/"))


def _check_sizes(tensors: dict[str, torch.Tensor], stored: Counter[int], *, where: str) -> None:
    """Each tensor's data must be one entry of the zip: a map takes whatever bytes stand at its place."""
    # Tensors may share data, which is then one entry.
    claimed = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    unmatched = Counter(size for size in claimed.values() if size) - stored
    if unmatched:
        sizes = ", ".join(f"{size:,}" for size in list(unmatched)[:MAX_NAMED])
        raise CheckpointError(
            Problem(
                where=where,
                what="its tensors claim data of other sizes than the file has",
                found=f"claimed, but not stored: {sizes} bytes",
                fix="download or copy the file again",
            )
        )


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
