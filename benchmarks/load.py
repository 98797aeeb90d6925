"""Loading: tepatch beside its peers and beside the least that the same bytes can cost, in one run.

    python benchmarks/load.py [--output benchmarks/results/load_gpu.json]    # on a GPU: Llama-2-7B's shape, 13.5 GB
    python benchmarks/load.py --device cpu --output benchmarks/results/load_cpu.json    # Llama-3.2-1B's, 2.5 GB
    python benchmarks/load.py --device cpu --shape tiny --rounds 1    # the script itself: says nothing about speed

Makes a checkpoint (bfloat16, random weights, shards) and loads it again and again. Each contender has a process of its
own, which has imported everything and has a CUDA context before any clock starts, and in which all is released between
two loads (collected, the caches of torch's allocators emptied).

- *first*: the first load of the process. It is watched, which may take time: that is where memory is measured. Private
  memory is RssAnon at its highest, sampled every 5 ms, minus what the process had before. GPU memory is the allocator's
  highest, and what the driver says is used (of this GPU, by anybody), minus the same before. Afterwards, outside the
  clock, each tensor that was loaded is compared with the file's, bit for bit.
- *warm*: ``--rounds`` loads after it (``--other-rounds`` of those that no target is about), contenders taking turns, so
  that what else the machine does hits all of them; the files are in the page cache. Medians are of these.
- *fresh*: ``--fresh-rounds`` first loads that nobody watches, each in a process that is new for it, of a few
  contenders; the files are in the page cache.
- *cold*: ``--cold-rounds`` loads in turns, the files dropped from the page cache before each.

Limits, in which there is no model: ``read`` (the files' bytes, read by all cores and thrown away),
``read-direct`` (the same past the page cache, by twice as many threads), ``stream`` (tepatch's own reader into one
tensor on the device) and ``copy`` (as many bytes from pinned memory to the GPU). ``clone``: safetensors reading each
tensor into memory of its own on the device. ``te_llama`` is NVIDIA's example's way: a whole shard on the CPU, then
copied parameter by parameter into Transformer Engine's layers, which are built on the GPU beforehand (but inside the
clock, as everybody's model).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

COMMON = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "tie_word_embeddings": False,
    },
}
SHARD_BYTES = 5 * 10**9
SAMPLE_SECONDS = 0.005
ANSWER_SECONDS = 300
MIB = 1 << 20
LIMITS = ("read", "read-direct", "stream", "copy", "clone")
OURS = ("tepatch", "tepatch-bypass", "tepatch-safetensors", "tepatch-fp8")
PEERS = ("transformers", "accelerate", "te_llama")
CONTENDERS = (*LIMITS, *OURS, *PEERS)
MAIN = ("read", "stream", "clone", "tepatch", "tepatch-fp8", "transformers")
"""What targets are about."""
# Whose first loads are timed unwatched.
FRESH = ("stream", "tepatch", "tepatch-fp8", "transformers")
COLD = ("read", "read-direct", "tepatch", "tepatch-bypass", "transformers")

Load = Callable[[], tuple[Any, dict[str, float]]]
"""Loads, and returns what holds the weights and what it says about its time."""


class Skipped(Exception):
    """This machine can not run the contender; the message says why."""


def make(folder: Path, shape: str, *, layers: int | None = None, device: str = "cpu") -> None:
    """Writes a checkpoint of that shape; a shard has neighbouring tensors, as usual."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**COMMON, **SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    nbytes = {name: 2 * each.numel() for name, each in shapes.items()}
    count = max(2, -(-sum(nbytes.values()) // SHARD_BYTES))
    shards: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name in shapes:
        shards[before * count // sum(nbytes.values())].append(name)
        before += nbytes[name]
    weight_map = {}
    torch.manual_seed(0)
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        # As trained weights are, but for norms: of which no zero comes back as a zero by chance.
        made = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
            for name in names
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        with open(folder / file, "rb") as written:
            os.fsync(written)  # nothing is still to be written while others are timed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def prepare(contender: str, folder: Path, device: str) -> Load:
    """What loads the folder as ``contender`` does; everything that it needs is imported here, outside the clock."""
    from tepatch.te import probe

    status = probe()  # before torch uses cuDNN: Transformer Engine may need another one
    import torch

    if device == "cuda":
        torch.zeros(1, device=device)  # the context
    if contender in LIMITS:
        return _limit(contender, folder, device)
    if contender in ("tepatch-fp8", "te_llama") and not status.usable:
        raise Skipped(f"needs Transformer Engine: {status.reason}")
    if contender in OURS:
        return _tepatch(contender.removeprefix("tepatch").removeprefix("-"), folder, device, is_te=status.usable)
    return {"transformers": _transformers, "accelerate": _accelerate, "te_llama": _te_llama}[contender](folder, device)


def _limit(contender: str, folder: Path, device: str) -> Load:
    import torch
    from safetensors import safe_open

    from tepatch.checkpoint import open_checkpoint
    from tepatch.transfer.raw import copy_bytes, read_bytes, stream_bytes
    from tepatch.transfer.settings import Reading

    checkpoint, reading, on = open_checkpoint(folder), Reading(), torch.device(device)
    cores = len(os.sched_getaffinity(0))
    nbytes = size_of(folder)
    if contender == "copy" and device == "cpu":
        raise Skipped("needs a GPU")
    if contender == "read-direct":
        try:
            os.close(os.open(files_of(folder)[0], os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            raise Skipped(f"not on this file system: {error}") from None

    def clone() -> Any:
        kept = []
        for path in files_of(folder):
            with safe_open(path, framework="pt", device=device) as shard:
                tensors = [shard.get_tensor(name) for name in shard.keys()]  # noqa: SIM118 (not a dict)
            kept += [tensor.clone() for tensor in tensors] if device == "cpu" else tensors
        return kept

    run: dict[str, Callable[[], Any]] = {
        "read": lambda: read_bytes(checkpoint, Reading(threads=cores)),
        "read-direct": lambda: read_bytes(checkpoint, Reading(threads=2 * cores), is_direct=True),
        "stream": lambda: stream_bytes(checkpoint, reading, device=on),
        "copy": lambda: copy_bytes(nbytes, reading, device=on),
        "clone": clone,
    }
    return lambda: (run[contender](), {})


def _tepatch(kind: str, folder: Path, device: str, *, is_te: bool) -> Load:
    import tepatch
    import tepatch.loading
    import tepatch_llama.layer  # noqa: F401
    from tepatch.transfer.settings import Reading

    settings = {"bypass": {"cache": "bypass"}, "safetensors": {"source": "safetensors"}}
    given: dict[str, Any] = {"precision": "fp8-current", "weights": "quantized"} if kind == "fp8" else {}

    def load() -> tuple[Any, dict[str, float]]:
        model = tepatch.load(
            "llama",
            folder,
            backend="te" if is_te and device == "cuda" else "reference",
            device=device,
            reading=Reading(**settings.get(kind, {})),
            progress=False,
            **given,
        )
        return model, model.tepatch.seconds

    return load


def _transformers(folder: Path, device: str) -> Load:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    def load() -> tuple[Any, dict[str, float]]:
        placed = {} if device == "cpu" else {"device_map": device}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False, **placed)
        return owned(model, device), {}

    return load


def _accelerate(folder: Path, device: str) -> Load:
    if importlib.util.find_spec("accelerate") is None:
        raise Skipped("accelerate is not installed")
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    def load() -> tuple[Any, dict[str, float]]:
        with init_empty_weights():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.tie_weights()
        placed = {"": "cpu" if device == "cpu" else 0}
        return owned(load_checkpoint_and_dispatch(model, str(folder), device_map=placed), device), {}

    return load


def _te_llama(folder: Path, device: str) -> Load:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from train_gpu import te_llama

    block = re.compile(r"model\.layers\.(\d+)\.(.+)")
    qkv, mlp = "self_attention.layernorm_qkv.", "layernorm_mlp."
    whole = {
        "input_layernorm.weight": f"{qkv}layer_norm_weight",
        "self_attn.q_proj.weight": f"{qkv}query_weight",
        "self_attn.k_proj.weight": f"{qkv}key_weight",
        "self_attn.v_proj.weight": f"{qkv}value_weight",
        "self_attn.o_proj.weight": "self_attention.proj.weight",
        "post_attention_layernorm.weight": f"{mlp}layer_norm_weight",
        "mlp.down_proj.weight": f"{mlp}fc2_weight",
    }

    @torch.no_grad()
    def load() -> tuple[Any, dict[str, float]]:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        half = config.intermediate_size
        model, _ = te_llama(config, device, fp8=False)
        parameters = dict(model.named_parameters())
        for path in files_of(folder):
            for name, tensor in load_file(path).items():
                if (found := block.fullmatch(name)) is None:
                    parameters[name].copy_(tensor)
                    continue
                layer, rest = f"model.layers.{found[1]}.", found[2]
                if rest in whole:
                    parameters[layer + whole[rest]].copy_(tensor)
                else:
                    fc1 = parameters[f"{layer}{mlp}fc1_weight"]
                    (fc1[:half] if rest == "mlp.gate_proj.weight" else fc1[half:]).copy_(tensor)
        return model, {}

    return load


def owned(model: Any, device: str) -> Any:
    """On a CPU some leave the weights mapped to the file, where they are only read when they are touched."""
    for parameter in model.parameters() if device == "cpu" else ():
        parameter.data = parameter.data.clone()
    return model


def differing(contender: str, model: Any, folder: Path) -> list[str] | None:
    """The tensors of the files that the model does not hold bit for bit; None where that is not asked.

    Quantized weights are others on purpose, and te_llama's names are its own.
    """
    import torch
    from safetensors.torch import load_file

    from tepatch.transfer.fill import restore_tensors

    if contender not in OURS + PEERS or contender in ("tepatch-fp8", "te_llama"):
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    if contender in OURS:
        found: Iterator[tuple[str, Any]] = restore_tensors(model.tepatch.plan, named)
    else:
        found = iter(named.items())
    expected = {name: tensor for path in files_of(folder) for name, tensor in load_file(path).items()}
    out = []
    for name, tensor in found:
        # What was tied when it was saved has one name there.
        if (there := expected.pop(name, None)) is not None and not torch.equal(tensor, there.to(tensor.device)):
            out.append(name)
    return out + list(expected)


class Watch:
    """The most memory that this process had while the block ran, in bytes and beyond what it had before."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        self.before = self.most = self._now()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def result(self) -> dict[str, int]:
        names = ("private_bytes", "device_bytes")
        return {name: most - was for name, most, was in zip(names, self.most, self.before, strict=False)}

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.most = tuple(map(max, self.most, self._now()))

    def _now(self) -> tuple[int, ...]:
        import torch

        if not self.is_cuda:
            return (private_bytes(),)
        free, total = torch.cuda.mem_get_info()
        return private_bytes(), total - free


def private_bytes() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def timed(load: Load, contender: str, folder: Path, device: str, *, is_first: bool) -> dict[str, Any]:
    """One load in this process, with nothing left of it. The first is watched, and checked."""
    import torch

    is_cuda = device == "cuda"
    out: dict[str, Any] = {}
    before = 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Watch(device) if is_first else contextlib.nullcontext() as watch:
        started = time.perf_counter()
        held, stages = load()
        if is_cuda:
            torch.cuda.synchronize()
        out["seconds"] = time.perf_counter() - started
    if watch is not None:
        out |= watch.result
        if is_cuda:
            out["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            out["final_bytes"] = torch.cuda.memory_allocated() - before
        if contender in OURS:
            out["largest_target_bytes"] = largest_target(held.tepatch.plan)
        out["differing"] = differing(contender, held, folder)
    if stages:
        out["stages"] = dict(stages)
    del held
    release(device)
    return out


def largest_target(plan: Any) -> int:
    """Of the parameters inside layers, which are those that can be quantized."""
    from tepatch.transfer.pieces import item_size

    inside = [entry for name, entry in plan.targets.items() if ".layers." in name]
    return max(item_size(entry.dtype) * math.prod(entry.shape) for entry in inside)


def release(device: str) -> None:
    """Give all memory back that nothing uses, also what torch has pinned."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def serve(contender: str, folder: Path, device: str) -> None:
    """The contender's process: an order a line on stdin, an answer in JSON a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import torch

    try:
        load = prepare(contender, folder, device)
    except Skipped as reason:
        answer({"skipped": str(reason)})
        return
    answer({"card": torch.cuda.get_device_name() if device == "cuda" else processor()})
    for order in sys.stdin:
        answer(timed(load, contender, folder, device, is_first=order == "first\n"))


class Process:
    """A contender in a process of its own."""

    def __init__(self, contender: str, folder: Path, device: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--one", contender, "--folder", str(folder), "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, order: str = "") -> dict[str, Any]:
        """The answer to an order; without one what the process says when it is ready. Failures are answers too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if order:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(order + "\n")
                self._process.stdin.flush()
        # One answer for each order: nothing waits in the buffer of the pipe's text layer.
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            self._process.kill()
            return {"failed": f"no answer in {ANSWER_SECONDS} s"}
        if line := self._process.stdout.readline():
            out: dict[str, Any] = json.loads(line)
            return out
        self._process.wait()
        self._errors.seek(0)
        lines = (self._errors.read().strip() or f"exit status {self._process.returncode}, no message").splitlines()
        said = next((line for line in reversed(lines) if line and not line.startswith(" ")), lines[-1])
        return {"failed": said, "stderr": lines[-40:]}

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self._errors.close()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def drop(folder: Path) -> str:
    """Drop the files from the page cache; says how, or by how much that failed."""
    from tepatch.transfer.raw import cached_share, forget

    forget(files_of(folder))
    if (left := cached_share(files_of(folder))) is not None and left < 0.01:
        return "posix_fadvise"
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return "posix_fadvise, unproven" if left is None else f"failed: {left:.0%} stayed"
    return "drop_caches"


def run_all(arguments: argparse.Namespace, folder: Path, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Fills ``result["runs"]``, by the contenders."""
    runs: dict[str, dict[str, Any]] = result["runs"]
    processes = {name: Process(name, folder, arguments.device) for name in arguments.contenders}
    try:
        for name, process in processes.items():
            runs[name] = process.ask()  # all import at the same time
            result["machine"]["card"] = runs[name].pop("card", result["machine"]["card"])
        usable = [name for name in processes if not runs[name]]
        warm = [name for name in usable if name != "read-direct"]
        for name in warm:
            runs[name] |= {"first": processes[name].ask("first"), "warm": []}
            _settle(runs[name], runs[name]["first"])
            say(name, runs[name])
            save()
        for index in range(max(arguments.rounds, arguments.other_rounds)):
            for name in warm:
                if index < (arguments.rounds if name in MAIN else arguments.other_rounds):
                    runs[name]["warm"].append(processes[name].ask("again"))
                    _settle(runs[name], runs[name]["warm"][-1])
            save()
        for _ in range(arguments.fresh_rounds):
            run_fresh([name for name in warm if name in FRESH and "failed" not in runs[name]], arguments, folder, runs)
            save()
        for _ in range(arguments.cold_rounds):
            for name in usable:
                if name not in arguments.cold or "failed" in runs[name]:
                    continue
                dropped = drop(folder)
                cold = {**processes[name].ask("again"), "dropped": dropped}
                runs[name].setdefault("cold", []).append(cold)
                _settle(runs[name], cold)
            save()
    finally:
        for process in processes.values():
            process.close()


def run_fresh(
    contenders: Sequence[str], arguments: argparse.Namespace, folder: Path, runs: dict[str, dict[str, Any]]
) -> None:
    """One more load of each, the first of a new process."""
    processes = {name: Process(name, folder, arguments.device) for name in contenders}
    try:
        ready = {name: process.ask() for name, process in processes.items()}  # all import at the same time
        for name, process in processes.items():
            loaded = ready[name] if "failed" in ready[name] else process.ask("again")
            runs[name].setdefault("fresh", []).append(loaded)
            _settle(runs[name], loaded)
    finally:
        for process in processes.values():
            process.close()


def _settle(run: dict[str, Any], answer: dict[str, Any]) -> None:
    """What failed once, failed; the first reason is the one to read."""
    if "failed" in answer and "failed" not in run:
        run |= answer


def is_bad(run: dict[str, Any]) -> bool:
    return "failed" in run or bool(run.get("first", {}).get("differing"))


def say(name: str, run: dict[str, Any]) -> None:
    said = run.get("failed") or f"{run['first']['seconds']:.2f} s at first"
    print(f"{name}: {said}", file=sys.stderr, flush=True)


def median(run: dict[str, Any], kind: str = "warm") -> float:
    """Seconds; not a number where there are none."""
    seconds = [each["seconds"] for each in run.get(kind, ()) if "seconds" in each]
    return statistics.median(seconds) if seconds else float("nan")


def measure_quarter(arguments: argparse.Namespace, parent: Path) -> dict[str, Any]:
    """tepatch's memory for a checkpoint with a quarter of the layers."""
    folder = parent / "quarter"
    folder.mkdir()
    layers = arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"]
    make(folder, arguments.shape, layers=max(1, layers // 4), device=arguments.device)
    process = Process("tepatch", folder, arguments.device)
    try:
        ready = process.ask()
        return {"bytes": size_of(folder), **(ready if "failed" in ready else process.ask("first"))}
    finally:
        process.close()


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target that this run can tell about: what was claimed, found and allowed, and whether it holds."""
    runs, out = result["runs"], []
    ours, is_cuda = runs.get("tepatch", {}), result["device"] == "cuda"

    def claim(text: str, found: float, allowed: float, *, unit: str = "x") -> None:
        if found == found and allowed == allowed:  # both are numbers
            out.append({"claim": text, "found": found, "allowed": allowed, "unit": unit, "holds": found <= allowed})

    def ratio(name: str, peer: float, allowed: float, text: str, kind: str = "warm") -> None:
        if peer:
            claim(text, median(runs.get(name, {}), kind) / peer, allowed)

    def memory(name: str, key: str) -> float:
        return runs.get(name, {}).get("first", {}).get(key, float("nan"))

    raw = [m for m in (median(runs.get(name, {}), "cold") for name in ("read", "read-direct")) if m == m]
    if raw:
        ratio("tepatch", min(raw), 1.05, "cold: time to the fastest raw read of that disk", "cold")
    if not is_cuda:
        ratio("tepatch", median(runs.get("clone", {})), 1.1, "warm: time to read-and-clone by safetensors")
        over = memory("tepatch", "private_bytes") - result["bytes"]
        claim(
            "private memory beyond the model's", over, memory("tepatch", "largest_target_bytes") + 150 * 10**6, unit="B"
        )
    else:
        ratio("tepatch", median(runs.get("transformers", {})), 0.25, "warm: time to transformers'")
        ratio("tepatch", median(runs.get("stream", {})), 1.3, "warm: time to the same bytes streamed, with no model")
        ratio("tepatch-fp8", median(ours), 1.3, "FP8 weights, warm: time to that of bfloat16")
        over = memory("tepatch", "peak_bytes") - memory("tepatch", "final_bytes")
        claim("peak GPU memory beyond the final model's", over, 256 * MIB, unit="B")
        over = memory("tepatch-fp8", "peak_bytes") - memory("tepatch-fp8", "final_bytes")
        allowed = 2 * memory("tepatch-fp8", "largest_target_bytes") + 256 * MIB
        claim("FP8 weights: peak GPU memory beyond the final model's", over, allowed, unit="B")
        claim("private host memory", memory("tepatch", "private_bytes"), 1.5 * 1024 * MIB, unit="B")
        if "private_bytes" in (quarter := result.get("quarter") or {}):
            grown = memory("tepatch", "private_bytes") - quarter["private_bytes"]
            text = f"private host memory beyond that for a checkpoint of {quarter['bytes'] / 1e9:.1f} GB"
            claim(text, grown, 128 * MIB, unit="B")
    return out


def table(result: dict[str, Any]) -> list[str]:
    """The lines to print: all contenders, then the targets."""
    runs, nbytes = result["runs"], result["bytes"]
    ours = median(runs.get("tepatch", {}))
    lines = [f"{nbytes / 1e9:.2f} GB on {result['machine']['card']}: medians in s, GB/s, and the time to tepatch's"]
    for name, run in runs.items():
        line = f"  {name:24}"
        if said := run.get("failed") or run.get("skipped"):
            lines.append(f"{line} {'failed' if 'failed' in run else 'skipped'}: {said}")
            continue
        for kind in ("warm", "fresh", "cold"):
            if (seconds := median(run, kind)) == seconds:
                line += f"  {kind} {seconds:7.3f} ({nbytes / 1e9 / seconds:5.1f} GB/s)"
        if median(run) == median(run) and ours == ours:
            line += f" {median(run) / ours:6.2f} x"
        for key, text in (("private_bytes", "private"), ("peak_bytes", "on the GPU")):
            if key in run.get("first", {}):
                line += f"  {run['first'][key] / MIB:7,.0f} MiB {text}"
        if (wrong := run.get("first", {}).get("differing")) is not None:
            line += f"  {len(wrong)} tensors DIFFER" if wrong else "  equal"
        lines.append(line)
    dropped = {each["dropped"] for run in runs.values() for each in run.get("cold", ()) if "dropped" in each}
    if dropped:
        lines.append(f"  page cache dropped by: {', '.join(sorted(dropped))}")
    for each in result["verdicts"]:
        shown = [
            f"{v:.3f} x" if each["unit"] == "x" else f"{v / MIB:,.0f} MiB" for v in (each["found"], each["allowed"])
        ]
        lines.append(f"  {'ok  ' if each['holds'] else 'MISS'} {each['claim']}: {shown[0]} (allowed {shown[1]})")
    return lines


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    names = ("torch", "transformers", "safetensors", "accelerate", "transformer-engine", "tepatch")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver(device: str) -> str | None:
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: llama-2-7b on a GPU, llama-3.2-1b on a CPU")
    parser.add_argument("--layers", type=int, help="default: the shape's own number")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made (and removed); on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other-rounds", type=int, default=3, help="of contenders that no target is about")
    parser.add_argument("--fresh-rounds", type=int, default=3, help="of loads that are the first of their process")
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--cold", nargs="+", choices=CONTENDERS, default=list(COLD), metavar="CONTENDER")
    parser.add_argument("--four-times", action="store_true", help="also the memory for a checkpoint a quarter as large")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        serve(arguments.one, arguments.folder, arguments.device)
        return

    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.shape = arguments.shape or ("llama-2-7b" if arguments.device == "cuda" else "llama-3.2-1b")
    result: dict[str, Any] = {
        "benchmark": "load",
        "device": arguments.device,
        "shape": {**SHAPES[arguments.shape], "name": arguments.shape},
        "runs": {},
        "machine": {
            "card": None,
            "driver": driver(arguments.device),
            "processor": processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "load_average": os.getloadavg()[0],  # of others, before anything here has begun
        },
        "versions": versions(),
    }
    if arguments.layers:
        result["shape"]["num_hidden_layers"] = arguments.layers

    def save() -> None:  # after each contender: what was measured is kept whatever happens to the rest
        result["verdicts"] = verdicts(result)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        make(folder, arguments.shape, layers=arguments.layers, device=arguments.device)
        if arguments.device == "cuda":
            release(arguments.device)
        result["bytes"] = size_of(folder)
        print(f"made {result['bytes'] / 1e9:.2f} GB in {len(files_of(folder))} files", file=sys.stderr, flush=True)
        run_all(arguments, folder, result, save)
        if arguments.four_times:
            result["quarter"] = measure_quarter(arguments, Path(scratch))
    save()
    print("\n".join(table(result)))
    if bad := [name for name, run in result["runs"].items() if is_bad(run)]:
        for name in bad:
            print(f"\n{name}:", *result["runs"][name].get("stderr", ()), sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
