"""One process of ``test_distributed.py``: ``python ranks.py RANK FOLDER``. Trains and saves over gloo, on the CPU.

What a scenario finds is written to ``FOLDER/SCENARIO.pt`` by rank 0. An error ends the process, with its traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import tepatch
from tepatch.errors import PlanError
from tepatch.hf.state import patched_names

RANKS = 2
STEPS = 3
EPSILON = 0.1
FULL = StateDictOptions(full_state_dict=True)


def batch() -> torch.Tensor:
    """Four rows: two for each process."""
    return torch.randint(1, 128, (4, 16), generator=torch.Generator().manual_seed(3))


def train(model: Any, ids: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Losses of some steps of AdamW.

    Its epsilon is as large as gradients are: a step is then off by lr / eps = 1 times the error of a gradient, at the
    most. With a small one, an element whose gradient is nothing but rounding errors would take a whole step in one
    direction here and in the other there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=EPSILON, eps=EPSILON)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def load(folder: Path, name: str = "checkpoint") -> Any:
    return tepatch.load("llama", folder / name, backend="reference").train()


def sharded(model: Any) -> Any:
    """FSDP2, a group for each decoder layer and one for the rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, rank: int) -> torch.Tensor:
    """Train on this process's rows; the losses are those of all rows."""
    rows = batch().chunk(RANKS)[rank]
    losses = train(model, rows)
    dist.all_reduce(losses)
    return losses / RANKS


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in state_dict.items()}


def ddp(rank: int, folder: Path) -> dict[str, Any]:
    model = DistributedDataParallel(load(folder))
    losses = trained(model, rank)
    own = get_model_state_dict(model)  # looks up each name in the model
    if rank == 0:
        model.module.save_pretrained(folder / "ddp")
    return {"losses": losses, "state": copied(model.module.state_dict()), "own": copied(own)}


def fsdp2(rank: int, folder: Path, name: str = "checkpoint") -> dict[str, Any]:
    model = sharded(load(folder, name))
    before = list(model.state_dict())
    losses = trained(model, rank)
    full = get_model_state_dict(model, options=FULL)
    as_accelerate = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    on_rank_0 = get_model_state_dict(model, options=as_accelerate)
    refusal = ""
    try:
        model.save_pretrained(folder / "never-written")
    except PlanError as error:
        refusal = str(error)
    if rank == 0:
        model.save_pretrained(folder / f"fsdp2-{name}", state_dict=full)
    # As Accelerator.get_state_dict and save_model have it: all processes call, one writes.
    model.save_pretrained(folder / f"fsdp2-accelerate-{name}", is_main_process=rank == 0, state_dict=on_rank_0)
    return {"losses": losses, "full": copied(full), "names": before, "refusal": refusal}


def fsdp2_checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    """Sharded checkpoints of torch's own kind, into another model with another sharding of its groups."""
    model = sharded(load(folder))
    trained(model, rank)
    full = get_model_state_dict(model, options=FULL)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    mesh = init_device_mesh("cpu", (RANKS,))
    other = fully_shard(load(folder), mesh=mesh)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    by_dcp = get_model_state_dict(other, options=FULL)
    third = sharded(load(folder))
    with patched_names():
        third.load_state_dict(model.state_dict())
    by_names = get_model_state_dict(third, options=FULL)
    return {"full": copied(full), "by dcp": copied(by_dcp), "by names": copied(by_names)}


def fsdp1(rank: int, folder: Path, use_orig_params: bool = True) -> dict[str, Any]:
    stock = [cls for cls in _classes(load(folder)) if cls.__name__ == "LlamaDecoderLayer"]
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=set(stock))
    model = FullyShardedDataParallel(
        load(folder), auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    wrapped = sum(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    losses = trained(model, rank)
    own = get_model_state_dict(model, options=FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older functions, which accelerate calls
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            theirs = model.state_dict()
    if rank == 0:
        model.module.save_pretrained(folder / f"fsdp1-own-{use_orig_params}", state_dict=own)
        model.module.save_pretrained(folder / f"fsdp1-{use_orig_params}", state_dict=theirs)
    return {"losses": losses, "own": copied(own), "state": copied(theirs), "wrapped": wrapped}


def _classes(model: Any) -> list[type]:
    """The classes that accelerate finds by name (``fsdp_transformer_layer_cls_to_wrap``)."""
    return list(dict.fromkeys(type(module) for module in model.modules()))


SCENARIOS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 tied": partial(fsdp2, name="tied"),
    "fsdp2 checkpoints": fsdp2_checkpoints,
    "fsdp1": fsdp1,
    "fsdp1 flat": partial(fsdp1, use_orig_params=False),
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    for name, scenario in SCENARIOS.items():
        found = scenario(rank, folder)
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
