"""Fresh weights, as a checkpoint.

``build`` needs weights that Hugging Face's own initialiser would give the same architecture. Its rules are
written for Hugging Face's layers, so that is what it gets: a stock model on the meta device is materialised a
block at a time, initialised by its own class, and read like a checkpoint. The plan then carries the values into
the patched layers, and the mapping is proven against the stock model's names and shapes on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tepatch.checkpoint import ShardReader, TensorInfo
from tepatch.dtypes import item_size, torch_dtype
from tepatch.errors import LoadError, Problem
from tepatch.hf.model import initializer_of, is_poisoned, poisoned, target_specs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FreshWeights:
    """A ``Checkpoint`` whose tensors are made when they are read. ``stock`` is on the meta device."""

    def __init__(self, stock: PreTrainedModel, *, dtype: torch.dtype) -> None:
        self.stock = stock
        self.dtype = dtype
        self.device = torch.device("cpu")
        """Where tensors are made; to be set before the first is read."""
        self.location = f"fresh {type(stock).__name__}"
        self.also_present: tuple[str, ...] = ()
        self.others: dict[str, str] = {}
        self.absent: tuple[str, ...] = ()
        self.wrappers: tuple[str, ...] = ()
        self.config_folder = Path()
        self.manifest = None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        specs, _ = target_specs(self.stock, self.dtype)
        return {
            name: TensorInfo(
                name=name,
                shape=spec.shape,
                dtype=spec.dtype,
                file=self._block(name),
                offset=0,
                nbytes=prod(spec.shape) * item_size(spec.dtype),
            )
            for name, spec in specs.items()
        }

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def _block(self, name: str) -> str:
        """The module that is initialised as one: an item of a list of layers, else the tensor's own module."""
        parts = name.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            if isinstance(self.stock.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
                return ".".join(parts[:end])
        return ".".join(parts)

    def stamp(self, file: str, /) -> None:
        """Never a file: tensors are made."""

    @contextmanager
    def open(self, file: str) -> Iterator[ShardReader]:
        """Materialise and initialise one block for as long as it is read."""
        block = copy.deepcopy(self.stock.get_submodule(file)).to(self.dtype)
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(poisoned(parameter.data, self.device))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = poisoned(buffer, self.device)
        with torch.no_grad():
            for path, module in reversed(list(block.named_modules())):  # children before parents, as transformers does
                where = ".".join(part for part in (file, path) if part)
                initializer_of(self.stock, where)._init_weights(module)  # type: ignore[no-untyped-call]
        yield _Block(file, block)


class _Block:
    def __init__(self, path: str, block: nn.Module) -> None:
        self._path = path
        self._block = block

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        name = info.name.removeprefix(self._path).removeprefix(".")
        owner, _, leaf = name.rpartition(".")
        tensor: torch.Tensor = getattr(self._block.get_submodule(owner), leaf).detach()
        if is_poisoned(tensor):
            raise LoadError(
                Problem(
                    where=info.name,
                    what="the model's own initialiser leaves this tensor without values",
                    fix="fresh weights can not be made for this architecture; load a checkpoint",
                )
            )
        return tensor.to(torch_dtype(info.dtype))  # a class may keep some in float32
