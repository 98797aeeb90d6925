"""Models that several processes hold together: what of each parameter is this process's own.

A model is sharded while it is on the meta device, by whatever makes DTensors of its parameters (``fully_shard``,
``parallelize_module``). Then each process knows its slices before a byte is read, and reads no others.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tepatch.errors import PlanError, Problem
from tepatch.hf.named import named_tensors
from tepatch.transfer.shards import Cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parallelize = Callable[[Any], Any]
"""Shards the model that it is given, in place."""


def shard(model: PreTrainedModel, parallelize: Parallelize) -> dict[str, list[Cut]]:
    """Have ``parallelize`` shard a model on the meta device; gives the cuts of each parameter that it made a DTensor.

    Raises ``PlanError`` if it fails, leaves the meta device, does more than shard, or places a parameter in a way that
    is no slice of it.
    """
    before = _forms(model)
    try:
        answer = parallelize(model)
    except Exception as error:  # the caller's own code
        raise _problem("parallelize failed", found=f"{type(error).__name__}: {error}") from error
    if inspect.iscoroutine(answer):
        answer.close()
        raise _problem("parallelize is asynchronous, and nobody would wait for it", fix="pass an ordinary function")
    after = named_tensors(model)
    now = _forms(model)
    if changed := [name for name in before | now if before.get(name) != now.get(name)]:
        raise _problem("parallelize changed parameters in another way than by sharding them", details=changed)
    if filled := [name for name, tensor in after.items() if name in before and not tensor.is_meta]:
        raise _problem(
            "parallelize gave values to parameters, which have to come from the checkpoint",
            details=filled,
            fix="only shard the model, and leave it on the meta device: weights are loaded afterwards",
        )
    return {name: cuts for name, tensor in after.items() if (cuts := cuts_of(name, tensor)) is not None}


def check_mesh(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ``PlanError`` if a model is sharded over another kind of device than its weights go to."""
    for name, tensor in named_tensors(model).items():
        if not _is_dtensor(tensor):
            continue
        sharded: Any = tensor
        if (kind := sharded.device_mesh.device_type) != device.type:
            raise _problem(
                "the model is sharded over another kind of device than its weights go to",
                details=[name],
                expected=str(device.type),
                found=kind,
                fix="shard over a mesh of that kind, or pass the device of this process",
            )


def _forms(model: PreTrainedModel) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(model).items()}


def cuts_of(name: str, tensor: torch.Tensor) -> list[Cut] | None:
    """Where this process's part of a DTensor is in the whole; None for a tensor that is not sharded.

    Raises ``PlanError`` for a part that is no slice.
    """
    if not _is_dtensor(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    mesh, coordinate = sharded.device_mesh, sharded.device_mesh.get_coordinate()
    if coordinate is None:
        raise _problem("this process is not in the mesh that a parameter is sharded over", details=[name])
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for axis, placement in enumerate(sharded.placements):
        if isinstance(placement, Replicate):
            continue
        # What fully_shard makes of a dimension that is sharded already: the shards of the axes after it, cut again.
        is_strided = type(placement).__name__ == "_StridedShard"
        if not is_strided and type(placement) is not Shard:
            raise _problem("a parameter is placed in a way that is no slice of it", details=[f"{name}: {placement}"])
        (strided if is_strided else plain).append((axis, placement.dim))
    cuts, left = [], list(sharded.shape)
    for axis, dim in [*plain, *strided]:
        each = -(-left[dim] // mesh.size(axis))  # as torch.chunk: the last are shorter, or empty
        start = min(each * coordinate[axis], left[dim])
        size = min(each, left[dim] - start)
        cuts.append(Cut(dim, start, size))
        left[dim] = size
    if (expected := tuple(sharded.to_local().shape)) != tuple(left):
        raise _problem(
            "a parameter's shard has another shape than its placements say",
            details=[f"{name}: {list(sharded.placements)}"],
            expected=str(left),
            found=str(list(expected)),
        )
    return cuts


def like_sharded(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``local`` as this process's part of a DTensor that is placed as ``like``; itself if that is not one."""
    if not _is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    out: torch.Tensor = DTensor.from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
    return out


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # nobody can have made one without it
    return module is not None and isinstance(tensor, module.DTensor)


def _problem(what: str, *, details: list[str] | None = None, **more: str) -> PlanError:
    return PlanError(Problem(where="parallelize", what=what, details=tuple((details or [])[:8]), **more))
