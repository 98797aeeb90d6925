"""What a checkpoint's files will be, to the byte, before any of them is written.

The layout of every file follows from names, shapes and dtypes alone: which tensor is in which shard, each header,
each position, the index. So the space that is needed is known at the start, files can be written in any order and
by several writers, and each tensor goes straight to its place, without a second copy of it anywhere.

    shards = plan_shards({"model.norm.weight": spec, ...}, max_shard_size="5GB")
    for shard in shards:
        stream.write(shard.header)
        for info in shard.tensors:  # in the order of the file, without gaps
            stream.write(tensor_bytes(tensor_named(info.name)))
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING

from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.safetensors_header import MAX_DIMENSIONS, MAX_HEADER_BYTES
from tepatch.dtypes import ITEM_SIZES
from tepatch.errors import PlanError, Problem

if TYPE_CHECKING:
    import torch

    from tepatch.planning.plan import TensorSpec

# The data starts at a multiple of this, the size of the largest element: then every element is aligned.
_ALIGNMENT = 8
_PREFIXES = ("K", "M", "G", "T")
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate(_PREFIXES)},
    **{f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate(_PREFIXES)},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file as it will be written: ``header``, then the data of ``tensors``, and nothing else."""

    file: str
    """Its name, relative to the checkpoint's folder."""
    tensors: tuple[TensorInfo, ...]
    """In the order of their data. ``offset`` counts from the start of the file; there are no gaps."""
    header: bytes
    """Everything before the data: eight bytes with a length, and JSON of that length."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors)


def plan_shards(
    tensors: Mapping[str, TensorSpec], *, max_shard_size: int | str, stem: str = "model"
) -> tuple[Shard, ...]:
    """Deal ``tensors`` out to safetensors files, in the order given.

    A new file begins where the next tensor would bring the data of one to more than ``max_shard_size`` (bytes, or
    text for ``parse_size``); a tensor larger than that has a file of its own. One file is called
    ``STEM.safetensors``, several are ``STEM-00001-of-00003.safetensors`` and want the index of ``index_json``.
    Within a file, tensors stand by the size of their elements, the largest first: the format allows no gaps, and
    so each element is aligned.

    Raises ``PlanError`` with every tensor that a safetensors file cannot hold.
    """
    limit = parse_size(max_shard_size)
    problems = [problem for name, spec in tensors.items() if (problem := _refusal(name, spec)) is not None]
    if problems:
        raise PlanError(problems)
    groups: list[list[tuple[str, TensorSpec]]] = [[]]
    size = 0
    for name, spec in tensors.items():
        nbytes = _nbytes(spec)
        if size and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, spec))
        size += nbytes
    if len(groups) == 1:
        return (_shard(f"{stem}.safetensors", groups[0]),)
    total = len(groups)
    return tuple(
        _shard(f"{stem}-{number:05}-of-{total:05}.safetensors", group) for number, group in enumerate(groups, start=1)
    )


def index_name(stem: str = "model") -> str:
    """The name of the index beside several shards of this stem."""
    return f"{stem}.safetensors.index.json"


def index_json(shards: Sequence[Shard]) -> str:
    """The index of several shards: which tensor is in which file, and the totals that Hugging Face writes."""
    infos = [info for shard in shards for info in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(prod(info.shape) for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        },
        "weight_map": {info.name: info.file for info in infos},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def parse_size(size: int | str) -> int:
    """A number of bytes, from one or from text: ``"5GB"`` is 5 * 1000**3, ``"5GiB"`` is 5 * 1024**3.

    Raises ``PlanError`` for anything that is not a whole byte at least.

    >>> parse_size("1.5KB"), parse_size("1 KiB"), parse_size("300")
    (1500, 1024, 300)
    """
    number = Fraction(0)
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", size, re.ASCII)
        if match and match[2].upper() in _UNITS:
            number = Fraction(match[1]) * _UNITS[match[2].upper()]
    elif type(size) is int:  # True is an int, but not a size
        number = Fraction(size)
    if number < 1:
        raise PlanError(
            Problem(
                where="max_shard_size",
                what="is not a size",
                expected='a number of bytes from 1, or text such as "500MB", "5GB" or "1GiB"',
                found=repr(size),
            )
        )
    return int(number)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in memory, and in a safetensors file; nothing is copied.

    ``tensor`` is contiguous and on the CPU, of any dtype and shape. Raises ``ValueError`` for any other, because
    its bytes are not all of it, or not in order.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"a contiguous tensor on the CPU is wanted, without a lazy conjugate or sign: {tensor!r}")
    if not tensor.nbytes:
        return memoryview(b"")
    # Not by way of numpy: that would forbid the tensor's storage to be resized, for good (FSDP does that).
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined] # it lives as long as its bytes are looked at
    return memoryview(memory).cast("B")


def _refusal(name: str, spec: TensorSpec) -> Problem | None:
    """What would keep the reader of ``safetensors_header`` from taking this tensor."""
    where = name if name.isprintable() else ascii(name)
    if name == "__metadata__":
        return Problem(where=where, what="this name has another meaning in a safetensors file")
    if not name.isprintable():
        return Problem(where=where, what="the name of the tensor holds characters that cannot be printed")
    if spec.dtype not in ITEM_SIZES:
        what = "a safetensors file cannot hold this dtype"
        return Problem(where=where, what=what, expected=", ".join(ITEM_SIZES), found=spec.dtype)
    if len(spec.shape) > MAX_DIMENSIONS:
        what = f"has more than {MAX_DIMENSIONS} dimensions"
        return Problem(where=where, what=what, found=str(len(spec.shape)))
    return None


def _nbytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * ITEM_SIZES[spec.dtype]


def _shard(file: str, group: Iterable[tuple[str, TensorSpec]]) -> Shard:
    ordered = sorted(group, key=lambda entry: -ITEM_SIZES[entry[1].dtype])  # sorting is stable
    # transformers wants to know which framework a file is from, and asks for this.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = []
    position = 0
    for name, spec in ordered:
        starts.append(position)
        end = position + _nbytes(spec)
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise PlanError(
            Problem(
                where=file,
                what=f"its header would be larger than the {MAX_HEADER_BYTES:,} bytes that the format allows",
                found=f"{len(text):,} bytes for {len(starts):,} tensors",
                fix="set a smaller max_shard_size, so that there are fewer tensors in a file",
            )
        )
    header = struct.pack("<Q", len(text)) + text
    infos = tuple(
        TensorInfo(
            name=name,
            shape=tuple(spec.shape),
            dtype=spec.dtype,
            file=file,
            offset=len(header) + start,
            nbytes=_nbytes(spec),
        )
        for (name, spec), start in zip(ordered, starts, strict=True)
    )
    return Shard(file=file, tensors=infos, header=header)
