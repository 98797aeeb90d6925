"""One process of ``test_shards_of_ranks.py``: ``python loading_ranks.py RANK RANKS FOLDER``. Over gloo, on the CPU.

What each scenario finds is written to ``FOLDER/SCENARIO-RANK.pt``. An error ends the process, with its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tepatch
from tepatch.checkpoint import open_checkpoint
from tepatch.errors import PlanError
from tepatch.hf.sharding import cuts_of
from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.settings import Reading

sys.path.insert(0, str(Path(__file__).parent))
from streaming_sample import TARGETS, plan_for

FULL = StateDictOptions(full_state_dict=True)
READING = Reading(threads=2, piece_bytes=1024)


def fsdp2(model: Any, mesh: Any = None) -> None:
    """A group for each decoder layer and one for the rest."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def locals_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.to_local().clone() if isinstance(p, DTensor) else p.clone() for name, p in model.named_parameters()}


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss of one step of training on this process's rows, and the parameters after it."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach(), **{n: t.clone() for n, t in get_model_state_dict(model, options=FULL).items()}}


def llama(rank: int, ranks: int, folder: Path, name: str = "checkpoint") -> dict[str, Any]:
    """Loaded in shards, beside what is loaded whole and sharded then."""
    model = tepatch.load("llama", folder / name, backend="reference", parallelize=fsdp2, reading=READING)
    whole = tepatch.load("llama", folder / name, backend="reference")
    fsdp2(whole)
    ids = torch.randint(1, 128, (ranks, 16), generator=torch.Generator().manual_seed(3))[rank : rank + 1]
    return {
        "local": locals_of(model),
        "expected": locals_of(whole),
        "bytes": model.tepatch.bytes_read,
        "names": list(model.state_dict()),
        "trained": step(model, ids),
        "expected trained": step(whole, ids),
    }


def two_axes(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Tensor parallelism of the embedding and the head, and FSDP2 over it: shards of shards."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))

    def parallelize(model: Any) -> None:
        plans = {"lm_head": ColwiseParallel(), "model.embed_tokens": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plans)
        fsdp2(model, mesh["dp"])

    model = tepatch.load("llama", folder / "checkpoint", backend="reference", parallelize=parallelize, reading=READING)
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.full_tensor()
    return {"full": found, "bytes": model.tepatch.bytes_read}


def every_rule(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Parameters by every rule that moves elements (fused, interleaved by groups, transposed, ...), cut by rows."""
    with torch.device("meta"):
        module = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(torch.empty(shape)) for name, shape in TARGETS.items()}
        )
    fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
    shards = {name: cuts_of(name, module[name.replace(".", "_")]) or [] for name in TARGETS}
    to = Destination(device=torch.device("cpu"), shards=shards)
    checkpoint = open_checkpoint(folder / "rules")
    loaded, timing = load_tensors(plan_for(folder / "rules"), checkpoint, to=to, reading=READING, progress=False)
    return {"local": loaded, "bytes": timing.bytes_read}


def refusals(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    def fails(model: Any) -> None:
        raise ValueError("no such mesh")

    def fills(model: Any) -> None:
        model.to_empty(device="cpu")

    def grows(model: Any) -> None:
        model.lm_head = nn.Linear(64, 200, bias=False, device="meta")

    def adds(model: Any) -> None:
        model.extra = nn.Parameter(torch.empty(3, device="meta"))

    async def waits(model: Any) -> None:
        fsdp2(model)

    def elsewhere(model: Any) -> None:
        mesh = DeviceMesh("cuda", [rank], _init_backend=False)
        weight = DTensor.from_local(model.lm_head.weight, mesh, [Replicate()])
        model.lm_head.weight = nn.Parameter(weight)

    out = {}
    given: dict[str, dict[str, Any]] = {
        "fails": {"parallelize": fails},
        "fills": {"parallelize": fills},
        "grows": {"parallelize": grows},
        "halves": {"parallelize": lambda model: model.half()},
        "adds": {"parallelize": adds},
        "waits": {"parallelize": waits},
        "elsewhere": {"parallelize": elsewhere},
        "device map": {"parallelize": fsdp2, "device_map": {"": "cpu"}},
    }
    for name, arguments in given.items():
        try:
            tepatch.load("llama", folder / "checkpoint", backend="reference", **arguments)
        except PlanError as error:
            out[name] = str(error)
    return out


SCENARIOS: dict[str, Callable[[int, int, Path], dict[str, Any]]] = {
    "llama": llama,
    "tied": partial(llama, name="tied"),
    "two axes": two_axes,
    "every rule": every_rule,
    "refusals": refusals,
}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(rank, ranks, folder), folder / f"{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
