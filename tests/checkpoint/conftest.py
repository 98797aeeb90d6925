"""Writes small checkpoints, well formed and otherwise: real files, never stand-ins."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def write_raw() -> Callable[..., Path]:
    """Writes a safetensors file of any header, with ``data`` bytes of holes after it."""

    def write(path: Path, header: object, *, data: int = 0, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        path.write_bytes(struct.pack("<Q", size) + text)
        os.truncate(path, 8 + len(text) + data)
        return path

    return write


@pytest.fixture
def write_index() -> Callable[..., Path]:
    """Writes an index file with this ``weight_map``."""

    def write(folder: Path, weight_map: object, *, name: str = "model.safetensors.index.json") -> Path:
        path = folder / name
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    return write


@pytest.fixture
def write_shards(write_index: Callable[..., Path]) -> Callable[..., Path]:
    """Writes files of tensors and an index that lists them; the suffix decides the kind."""

    def write(folder: Path, shards: Mapping[str, Tensors], *, index: str = "") -> Path:
        kind = ".bin" if next(iter(shards)).endswith(".bin") else ".safetensors"
        for file, tensors in shards.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if kind == ".bin":
                torch.save(tensors, folder / file)
            else:
                save_file(tensors, folder / file)
        stem = "pytorch_model" if kind == ".bin" else "model"
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        write_index(folder, weight_map, name=index or f"{stem}{kind}.index.json")
        return folder

    return write


@pytest.fixture
def two_shards() -> dict[str, Tensors]:
    """Four tensors in two safetensors shards, of different dtypes."""
    return {
        "model-00001-of-00002.safetensors": {
            "a": torch.arange(6.0).view(2, 3),
            "b": torch.arange(4, dtype=torch.int64),
        },
        "model-00002-of-00002.safetensors": {
            "c": torch.arange(5.0).to(torch.bfloat16),
            "d": torch.tensor(7.0, dtype=torch.float16),
        },
    }
