"""Loading on a CPU: tepatch beside its peers and beside the least that reading can cost, in one run.

    python benchmarks/load_cpu.py [--layers 16] [--rounds 5] [--output benchmarks/results/load_cpu.json]

Makes a checkpoint of Llama-3.2-1B's shape (2.5 GB in bfloat16, four shards, random weights), brings it into the
page cache, and then times each contender in turn, in processes of their own, ``rounds`` times. The floor is
safetensors reading every tensor and cloning it. Private memory is RssAnon at its highest, sampled every 5 ms,
minus what the process had before loading (mapped files do not count).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
CONTENDERS = ("safetensors", "tepatch", "transformers")


def make(folder: Path, layers: int) -> None:
    """Writes the checkpoint; q, k, v, gate and up of a layer are in one shard, as usual."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    weight_map = {}
    for position, (name, shape) in enumerate(shapes.items()):
        shard = position * 4 // len(shapes)
        shards[shard][name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        weight_map[name] = f"model-{shard + 1:05}-of-00004.safetensors"
    for shard, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{shard + 1:05}-of-00004.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def private_bytes() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def run_one(contender: str, folder: Path) -> dict[str, float]:
    """Loads once in this process; every weight is in memory of its own afterwards."""
    import torch
    from transformers import AutoModelForCausalLM

    import tepatch
    import tepatch.api
    import tepatch_llama.layer  # noqa: F401  (imports are not what is timed)

    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], private_bytes())

    before = private_bytes()
    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    details: dict[str, float] = {}
    if contender == "safetensors":
        from safetensors import safe_open

        kept = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                kept += [shard.get_tensor(name).clone() for name in shard.keys()]  # noqa: SIM118 (not a dict)
    elif contender == "tepatch":
        model = tepatch.load("llama", folder, backend="reference", progress=False)
        details = {f"seconds_{stage}": seconds for stage, seconds in model.tepatch.seconds.items()}
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        # transformers leaves the weights mapped to the file: they are only read when they are touched.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    return {"seconds": seconds, "private_bytes": max(peak[0], private_bytes()) - before, **details}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, arguments.folder)))
        return

    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, arguments.layers)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        for path in files:
            path.read_bytes()  # into the page cache
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        command = [sys.executable, __file__, "--folder", str(folder), "--one"]
        for _ in range(arguments.rounds):
            for name in CONTENDERS:
                environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
                done = subprocess.run([*command, name], capture_output=True, text=True, check=True, env=environment)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2  # type: ignore[operator]
    floor = statistics.median(run["seconds"] for run in runs["safetensors"])
    print(f"{size / 1e9:.2f} GB, {arguments.rounds} rounds, largest tensor {largest / 1e6:.0f} MB")
    medians = {}
    for name, each in runs.items():
        seconds = statistics.median(run["seconds"] for run in each)
        private = max(run["private_bytes"] for run in each)
        medians[name] = {"seconds": seconds, "ratio": seconds / floor, "private_bytes": private}
        print(f"  {name:13} {seconds:6.2f} s  {seconds / floor:5.2f} x the floor  {private / 1e6:7.0f} MB private")
    over = medians["tepatch"]["private_bytes"] - size - largest
    print(f"  tepatch's private memory over model + largest tensor: {over / 1e6:+.0f} MB (allowed: +150 MB)")
    if arguments.output:
        result = {
            "benchmark": "load_cpu",
            "bytes": size,
            "largest_tensor_bytes": largest,
            "medians": medians,
            "runs": runs,
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
