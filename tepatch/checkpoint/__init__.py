"""A checkpoint on disk: the names, shapes and bytes of its tensors.

``open_checkpoint`` looks at headers only, so a plan for a model of any size is made in a moment and before a
weight is read. Files are taken to be hostile: no pickle is run, no file outside the folder is opened, and
every size is checked against the file. What is wrong is reported all at once, as a ``CheckpointError``.

    checkpoint = open_checkpoint("path/to/Llama-3.1-8B")
    for file in checkpoint.files:
        with checkpoint.open(file) as shard:
            tensor = shard.read(checkpoint.tensors["model.norm.weight"])

Writing is the other way round: ``plan_shards`` settles every byte of the files first, and a ``Staging`` folder
becomes the destination when all of them are written, or never.
"""

from __future__ import annotations

from tepatch.checkpoint.folder import open_checkpoint
from tepatch.checkpoint.interface import Checkpoint, ShardReader, TensorInfo
from tepatch.checkpoint.staging import Staging
from tepatch.checkpoint.writing import Shard, index_json, index_name, parse_size, plan_shards, tensor_bytes

__all__ = [
    "Checkpoint",
    "Shard",
    "ShardReader",
    "Staging",
    "TensorInfo",
    "index_json",
    "index_name",
    "open_checkpoint",
    "parse_size",
    "plan_shards",
    "tensor_bytes",
]
