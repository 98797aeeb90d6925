"""Device maps, offloading, casts and FSDP2 with Transformer Engine's own modules, on one GPU and on two.

A kernel that gets the same numbers gives the same bits, wherever weights wait between two uses; so that is asked for.
What trains on two GPUs sums gradients in another order, in bfloat16: a rounding is 2^-9 of a number, and losses may
differ by 2^-7 of theirs.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tepatch
from tepatch.verify import compare_logits

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

Make = Callable[..., Any]
Save = Callable[..., Path]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 6}
IDS = torch.randint(1, 512, (2, 64), generator=torch.Generator().manual_seed(1))
NOISE = 1.25
"""Of one error beside another, over 128 tokens. What the test of positions looks for is ten times the error."""
LOSS_NOISE = 2**-7
STEPS = 3


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def folder(tiny_llama: Make, save_checkpoint: Save) -> Path:
    return save_checkpoint(tiny_llama(dtype=torch.bfloat16, **SIZES), shards=3)


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="te", **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS.to(model.get_input_embeddings().weight.device)).logits
    return out.cpu()


def tokens(model: Any) -> torch.Tensor:
    ids = IDS[:, :16].cuda()
    out: torch.Tensor = model.generate(ids, max_new_tokens=16, do_sample=False)
    return out.cpu()


def assert_saved(model: Any, folder: Path, out: Path) -> None:
    """``save_pretrained`` and ``tepatch.save`` write the checkpoint that was loaded, bit for bit."""
    expected = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(out / "theirs")
    tepatch.save(model, out / "ours")
    for name in ("theirs", "ours"):
        found = load_file(out / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


@pytest.mark.parametrize("device_map", [{"": 0}, "cuda:0", 0])
def test_a_map_of_one_gpu_is_that_gpu(device_map: Any, folder: Path) -> None:
    model = load(folder, device_map=device_map)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
    assert not hasattr(model, "hf_device_map")
    assert torch.equal(logits(model), logits(load(folder, device="cuda:0")))


def test_offloaded_layers_compute_on_the_gpu(folder: Path, tmp_path: Path) -> None:
    device_map: dict[str, Any] = {f"model.layers.{n}": "cpu" if n % 2 else "disk" for n in range(1, 6)}
    device_map |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.norm": 0}
    device_map["lm_head"] = "cpu"
    plain = load(folder)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    before = torch.cuda.memory_allocated()
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.cuda.memory_allocated() - before < size / 2, "what waits elsewhere takes no memory of the GPU"
    assert sum(parameter.is_meta for parameter in model.parameters()) == 5 * 6 + 1
    assert model.model.rotary_emb.inv_freq.device == torch.device("cuda", 0)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(tokens(model), tokens(plain))
    assert_saved(model, folder, tmp_path)


def test_a_map_that_leaves_nothing_to_compute_on_is_refused(folder: Path, tmp_path: Path) -> None:
    for device_map in ("cpu", {"": "cpu"}, {"": "disk"}):
        with pytest.raises(tepatch.TepatchError, match="names none to compute on"):
            load(folder, device_map=device_map, offload_folder=tmp_path / "offload")


def test_limits_of_memory_send_layers_to_the_cpu(folder: Path) -> None:
    plain = load(folder)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    model = load(folder, device_map="auto", max_memory={0: int(size * 0.7), "cpu": "4GB"})
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    assert torch.equal(logits(model), logits(plain))


def test_hooks_that_come_later_change_nothing(folder: Path, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = load(folder)
    expected = logits(model)
    cpu_offload(model, execution_device=0)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits.cpu(), expected)
    assert_saved(model, folder, tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_have_a_life_of_their_own(copied: Callable[[Any], Any], folder: Path) -> None:
    model = load(folder)
    other = copied(model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        other.model.layers[1].self_attn.qkv.weight.fill_(2)
    assert torch.equal(logits(model), expected)
    assert (other.state_dict()["model.layers.1.self_attn.k_proj.weight"] == 2).all()


@pytest.mark.filterwarnings("ignore")  # dynamo tells of each place where it leaves Transformer Engine alone
def test_a_compiled_model_computes_the_same(folder: Path) -> None:
    model = load(folder)
    expected = logits(model)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(IDS.cuda()).logits.cpu()
    assert compare_logits(found, expected).relative_error <= LOSS_NOISE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_angles_in_float32(dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save) -> None:
    sizes = {**SIZES, "hidden_size": 512, "max_position_embeddings": 8192, "num_hidden_layers": 2}
    stock = tiny_llama(**sizes)
    for layer in stock.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 0.7  # attention that is neither flat nor one-hot
    model = load(save_checkpoint(stock))
    model = model.bfloat16() if dtype == torch.bfloat16 else model.half()
    stock = stock.cuda()
    positions = torch.cat([torch.arange(32), torch.arange(8000, 8032)])[None].expand(2, -1).cuda()
    arguments = {"position_ids": positions, "attention_mask": torch.ones_like(IDS).cuda(), "use_cache": False}
    with torch.no_grad():
        reference = stock(IDS.cuda(), **arguments).logits
        ruined = copy.deepcopy(stock).to(dtype)(IDS.cuda(), **arguments).logits
        for parameter in stock.parameters():
            parameter.data = parameter.data.to(dtype)
        theirs = compare_logits(stock(IDS.cuda(), **arguments).logits, reference).relative_error
        ours = compare_logits(model(IDS.cuda(), **arguments).logits, reference).relative_error
    rounded = compare_logits(ruined, reference).relative_error
    print(f"\n{dtype}: HF {theirs:.2e}, HF with rounded frequencies {rounded:.2e}, ours {ours:.2e}")
    assert rounded > 5 * theirs, "the test would notice"
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert ours <= NOISE * theirs


# -- two GPUs --


@two_gpus
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_two_gpus_compute_what_one_does(device_map: str, folder: Path, tmp_path: Path) -> None:
    plain = load(folder)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    limits = {"max_memory": {0: int(size * 0.6), 1: "4GB"}} if device_map == "sequential" else {}
    model = load(folder, device_map=device_map, **limits)
    assert set(model.hf_device_map.values()) == {0, 1}
    for layer in model.model.layers:
        assert len({parameter.device for parameter in layer.parameters()}) == 1
    torch.cuda.set_device(0)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(tokens(model), tokens(plain))
    assert torch.cuda.current_device() == 0
    assert_saved(model, folder, tmp_path)


@two_gpus
def test_two_gpus_train_what_one_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # attention's backward pass sums in any order otherwise
    try:
        losses = []
        for device_map in ({"": 0}, "balanced"):
            model = load(folder, device_map=device_map).train()
            losses.append(train(model, IDS.cuda(), lambda loss: loss.backward()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1]


@two_gpus
def test_a_model_on_another_gpu_than_the_current_one_computes_the_same(folder: Path) -> None:
    plain = load(folder, device="cuda:0")
    torch.cuda.set_device(0)
    model = load(folder, device="cuda:1")
    assert torch.equal(logits(model), logits(plain))
    assert torch.cuda.current_device() == 0


@two_gpus
def test_a_map_that_comes_later_computes_the_same(folder: Path) -> None:
    from accelerate import dispatch_model

    model = load(folder)
    expected = logits(model)
    device_map: dict[str, Any] = {f"model.layers.{n}": (0, 1, "cpu")[n % 3] for n in range(6)}
    device_map |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    dispatch_model(model, device_map, skip_keys=["cache", "past_key_values"])
    assert torch.equal(logits(model), expected)


@two_gpus
@pytest.mark.parametrize("how", ["fully_shard", "parallelize", "accelerate", "accelerate, efficient"])
def test_fsdp2_trains_and_saves_what_one_gpu_does(how: str, folder: Path, tmp_path: Path) -> None:
    single = train(load(folder).train(), IDS.cuda(), lambda loss: loss.backward())
    assert single[0] - single[-1] > 2 * LOSS_NOISE * single[0], "training moves the loss by more than the noise"
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, how, str(folder), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        texts = [rank.communicate(timeout=180)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["losses"] == pytest.approx(single, rel=LOSS_NOISE)
    again = load(tmp_path / "saved")
    own = dict(again.named_parameters())
    assert own.keys() == found["full"].keys()
    assert [name for name, tensor in found["full"].items() if not torch.equal(own[name].cpu(), tensor.cpu())] == []


def train(model: Any, ids: torch.Tensor, backward: Callable[[torch.Tensor], Any], optimizer: Any = None) -> list[float]:
    """Losses of some steps of AdamW."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(how: str, folder: Path, out: Path) -> None:
    """One of two processes: trains on its row of the batch."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    ids = IDS[rank : rank + 1].cuda()

    def shard(model: Any) -> None:
        mesh = init_device_mesh("cuda", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if how in ("fully_shard", "parallelize"):
        dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=torch.device("cuda", rank))
        if how == "parallelize":
            model = load(folder, parallelize=shard).train()
            total_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            assert model.tepatch.bytes_read < 0.6 * total_bytes, "each reads its own slices"
        else:
            model = load(folder).train()
            shard(model)
        losses = train(model, ids, lambda loss: loss.backward())
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(out / "saved", state_dict=full)
    else:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=how.endswith("efficient"),
        )
        accelerator = Accelerator(fsdp_plugin=plugin)
        model = load(folder).train()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        losses = train(model, ids, accelerator.backward, optimizer)
        full = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            out / "saved", is_main_process=accelerator.is_main_process, state_dict=full
        )
    total = torch.tensor(losses, device="cuda")
    dist.all_reduce(total)
    if rank == 0:
        torch.save({"losses": (total / 2).tolist(), "full": full}, out / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
