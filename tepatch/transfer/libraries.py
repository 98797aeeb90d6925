"""Tensors of a checkpoint by their names, one at a time: from its own readers, or by a library that reads its files.

The libraries are there to be measured beside, and for storage that one of them knows better (GPUDirect, object stores).
What they hand out goes into the parameters by the same plan; the memory that they take meanwhile is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch

from tepatch.checkpoint import Checkpoint, TensorInfo
from tepatch.checkpoint.reading import as_promised
from tepatch.checkpoint.stamp import FileStamp
from tepatch.errors import BackendError, CheckpointError, Problem, TepatchError
from tepatch.transfer.steps import is_out_of_memory

PACKAGES = {
    "fastsafetensors": ("fastsafetensors", "fastsafetensors"),
    "runai": ("runai_model_streamer", "runai-model-streamer"),
    "instanttensor": ("instanttensor", "instanttensor"),
}
"""The module and the package of each source that is a library's."""


def read_tensors(
    checkpoint: Checkpoint, infos: Sequence[TensorInfo], *, source: str, device: torch.device
) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """The tensors of ``infos``, each good until the next is asked for; on ``device`` if the source puts them there.

    Raises ``CheckpointError`` when a file has changed since its header was read or can not be read, and
    ``BackendError`` when the library is not installed.
    """
    by_file: dict[str, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.file, []).append(info)
    stamps = {file: checkpoint.stamp(file) for file in by_file} if source in PACKAGES else {}
    plain = {file: stamp for file, stamp in stamps.items() if stamp is not None}
    for file, wanted in by_file.items():
        if file not in plain:
            with checkpoint.open(file) as shard:
                for info in wanted:
                    yield info, shard.read(info)
    if plain:
        yield from _by_library(source, plain, by_file, device)


def _by_library(
    source: str, stamps: dict[str, FileStamp], infos: dict[str, list[TensorInfo]], device: torch.device
) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    module, package = PACKAGES[source]
    try:
        library = import_module(module)
    except ImportError as error:
        raise BackendError(
            Problem(
                where="reading.source",
                what=f"'{source}' is not installed",
                found=str(error),
                fix=f"pip install {package}, or leave source out",
            )
        ) from None
    wanted = {info.in_file: (info, stamps[file]) for file, found in infos.items() if file in stamps for info in found}
    for stamp in stamps.values():
        stamp.verify()
    where = ", ".join(stamp.where for stamp in stamps.values())
    try:
        for name, tensor in _OPENERS[source](library, [str(stamp.path) for stamp in stamps.values()], wanted, device):
            if name in wanted:
                info, stamp = wanted.pop(name)
                yield info, as_promised(tensor, info, stamp)
    except TepatchError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(Problem(where=where, what=f"{package} can not read this", found=str(error))) from error
    if wanted:
        what = f"{package} left out tensors that the files have"
        raise CheckpointError(Problem(where=where, what=what, details=tuple(wanted)[:10]))
    for stamp in stamps.values():
        stamp.verify()


def _fastsafetensors(
    library: Any, paths: list[str], names: Iterable[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """A file at a time is whole on the device."""
    left = set(names)
    for path in paths:
        with library.fastsafe_open([path], device=str(device), nogds=True) as held:
            for name in held.keys():  # noqa: SIM118 (not a dict)
                if name in left:
                    yield name, held.get_tensor(name)


def _runai(
    library: Any, paths: list[str], names: Iterable[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """On the host, in buffers of the library's own."""
    with library.SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        yield from streamer.get_tensors()


def _instanttensor(
    library: Any, paths: list[str], names: Iterable[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of a ring of buffers on the device."""
    if device.type != "cuda":
        what = "instanttensor reads to a GPU only"
        raise BackendError(Problem(where="reading.source", what=what, found=str(device), fix="leave source out"))
    with ExitStack() as stack:
        held = stack.enter_context(library.safe_open(paths, framework="pt", device=device, copy=False))
        yield from held.tensors()


_OPENERS = {"fastsafetensors": _fastsafetensors, "runai": _runai, "instanttensor": _instanttensor}
