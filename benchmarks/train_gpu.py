"""Training steps on one GPU: tepatch beside te_llama's layer and Hugging Face's own, in one run.

    python benchmarks/train_gpu.py [--output benchmarks/results/train_gpu.json]
    python benchmarks/train_gpu.py --layers 8 --batches 8x256 --peers te_llama-bf16 tepatch-bf16   # a quick look
    python benchmarks/train_gpu.py --tiny    # the script itself, on any machine: says nothing about speed

Llama-2-7B's shape, bfloat16 parameters, fused AdamW, random tokens that are their own labels, no padding, no
checkpointing. Each peer has a process of its own, so that it finds the memory empty and no profiler was there before
it; the first peer runs once more at the end, which shows how far the machine drifted.

What is measured of each batch shape, after warm-up:

- *step*: CUDA events at the starts of consecutive steps, nothing waiting in between. Median and quartiles.
- *host*: how long the host takes to issue a step on an idle GPU. An upper bound: a full launch queue makes it wait.
- *kernels*: what the GPU spends in kernels, copies and fills, from torch.profiler on steps after the timed ones. A
  step that is much longer than its kernels is bound by launches.
- *peak*: the allocator's highest, of the warm-up and the timed steps.

transformers looks at the positions of every batch for packed sequences, and so makes the host wait for the GPU at the
start of each step, for every peer: issuing a step does not overlap with the optimizer's long kernels of the last one.
``--no-packing-check`` shows what that costs, by a patch of transformers inside the benchmark.

Nothing here is a test of what is computed, but a loss that is not finite fails the peer.
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
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": False,  # te_llama's layer has none, and Hugging Face would fill one in every step
}
TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
BASE = "te_llama-bf16"
PEERS = (BASE, "te_llama-fp8", "hf-sdpa", "tepatch-bf16", "tepatch-fp8", "tepatch-fp8-current", "hf-liger")
TOP = 15
MILLI = 1e3

Loss = Callable[[Any], Any]
"""Token ids -> loss."""


class Skipped(Exception):
    """This machine can not run the peer; the message says why."""


def make_config(layers: int, *, tiny: bool) -> Any:
    from transformers import LlamaConfig

    shape = {**SHAPE, **TINY, "num_key_value_heads": TINY["num_attention_heads"]} if tiny else SHAPE
    return LlamaConfig(**shape, num_hidden_layers=layers)


def hugging_face(config: Any, device: str) -> tuple[Any, Loss]:
    """transformers as it comes, with torch's attention."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False
        )
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def liger(config: Any, device: str) -> tuple[Any, Loss]:
    """The same with Liger's kernels. It patches transformers for the whole process, which nobody else shares."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skipped("liger_kernel is not installed")
    if device == "cpu":
        raise Skipped("Liger's kernels need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return hugging_face(config, device)


def te_llama(config: Any, device: str, *, fp8: bool) -> tuple[Any, Loss]:
    """Transformer Engine's own layer, set up as in NVIDIA's example te_llama, in transformers' model.

    Separate Q, K and V, the default causal mask, Transformer Engine's table of angles (one for all layers instead of
    one each), and FP8 as the example has it: an autocast with delayed scaling around the whole forward.
    """
    require_transformer_engine()
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    table = te.RotaryPositionEmbedding(config.hidden_size // config.num_attention_heads)(
        max_seq_len=config.max_position_embeddings
    ).cuda()

    class Layer(te.TransformerLayer):  # type: ignore[misc]
        def forward(self, hidden_states: Any, attention_mask: Any = None, **_: Any) -> Any:
            return super().forward(hidden_states, attention_mask=attention_mask, rotary_pos_emb=table)

    count = config.num_hidden_layers
    config.num_hidden_layers = 0  # transformers' layers would only be thrown away
    model, _ = hugging_face(config, device)
    layers = [
        Layer(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            num_gqa_groups=config.num_key_value_heads,
            layernorm_epsilon=config.rms_norm_eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias=False,
            fuse_qkv_params=False,
            normalization="RMSNorm",
            activation="swiglu",
            attn_input_format="bshd",
            params_dtype=torch.bfloat16,
        )
        for _ in range(count)
    ]
    fill(model, layers)

    def loss(ids: Any) -> Any:
        with te.autocast(enabled=True, recipe=DelayedScaling()) if fp8 else contextlib.nullcontext():
            return model(input_ids=ids, labels=ids).loss

    return model, loss


def fill(model: Any, layers: Sequence[Any]) -> None:
    """Give a transformers model without decoder layers these."""
    model.model.layers.extend(layers)
    model.config.num_hidden_layers = len(layers)


def ours(config: Any, device: str, *, precision: str) -> tuple[Any, Loss]:
    """tepatch; on a CPU with the reference modules, which have no FP8."""
    import torch

    import tepatch

    if device == "cpu" and precision != "bf16":
        require_transformer_engine()
    model = tepatch.build(
        "llama",
        config,
        dtype=torch.bfloat16,
        backend="reference" if device == "cpu" else "te",
        device=device,
        precision=precision,
    )
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def require_transformer_engine() -> None:
    from tepatch.te import probe

    status = probe()
    if not status.usable:
        raise Skipped(f"needs Transformer Engine: {status.reason}")


def make(peer: str, config: Any, device: str) -> tuple[Any, Loss]:
    """The model of a peer, in training mode, and how its loss is computed."""
    family, _, kind = peer.partition("-")
    if family == "te_llama":
        return te_llama(config, device, fp8=kind == "fp8")
    if family == "tepatch":
        return ours(config, device, precision=kind)
    return liger(config, device) if kind == "liger" else hugging_face(config, device)


class Clock:
    """Marks in time on the device's own clock (CUDA events), or on the host's where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        import torch

        if self.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def wait(self) -> None:
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def milliseconds(self) -> list[float]:
        """From each mark to the next."""
        self.wait()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [start.elapsed_time(end) if self.is_cuda else (end - start) * MILLI for start, end in pairs]


def kernel_times(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """What a GPU does in a step, by kernel: milliseconds and launches, and the ``TOP`` kernels by time."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    # A range that somebody named ("Optimizer.step") has a device time too, the sum of the kernels in it.
    found = [
        event
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    found.sort(key=lambda event: -event.self_device_time_total)
    return {
        "ms": sum(event.self_device_time_total for event in found) / MILLI / steps,
        "launches": sum(event.count for event in found) / steps,
        "top": [
            {
                "name": event.key[:200],  # templates go on for pages
                "ms": event.self_device_time_total / MILLI / steps,
                "launches": event.count / steps,
            }
            for event in found[:TOP]
        ],
    }


def run_one(
    peer: str,
    *,
    batches: Sequence[str],
    layers: int,
    tiny: bool,
    device: str,
    warm_up: int,
    steps: int,
    host_steps: int,
    profile_steps: int,
    packing_check: bool = True,
) -> dict[str, Any]:
    """Builds the peer and trains it on each batch shape, in this process."""
    import torch
    from transformers import masking_utils

    torch.manual_seed(0)
    if not packing_check:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    config = make_config(layers, tiny=tiny)
    started = time.perf_counter()
    model, loss_of = make(peer, config, device)
    clock = Clock(device)
    clock.wait()
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "build_seconds": time.perf_counter() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batches": {},
    }
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(1)

    def tokens(batch: str) -> Any:
        rows, length = map(int, batch.split("x"))
        return torch.randint(config.vocab_size, (rows, length), generator=generator).to(device)

    def step(ids: Any) -> Any:
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # The optimizer's states come first, into empty memory; among activations they would leave holes.
    step(tokens("1x64"))
    release(device)
    pending = []
    for batch in batches:
        ids = [tokens(batch) for _ in range(warm_up + steps)]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses = [step(each) for each in ids[:warm_up]]
        clock.wait()
        clock.marks.clear()
        for each in ids[warm_up:]:
            clock.mark()
            losses.append(step(each))
        clock.mark()
        times = clock.milliseconds()
        first, last = float(losses[0]), float(losses[-1])
        if not (math.isfinite(first) and math.isfinite(last)):
            raise SystemExit(f"{batch}: the loss is {first} at first and {last} at last")
        measured: dict[str, Any] = {"step_ms": times, "loss": [first, last]}
        if device == "cuda":
            measured["peak_bytes"] = torch.cuda.max_memory_allocated()
            measured["reserved_bytes"] = torch.cuda.max_memory_reserved()
        measured["host_ms"] = []
        for each in ids[:host_steps]:
            clock.wait()
            before = time.perf_counter()
            step(each)
            measured["host_ms"].append((time.perf_counter() - before) * MILLI)
        clock.wait()
        result["batches"][batch] = measured
        pending.append((measured, ids[0]))
        release(device)
    # Last of all: a profiler that has been there once may slow down every later launch.
    for measured, ids in pending if device == "cuda" and profile_steps else []:
        step(ids)  # the profiled steps shall find memory as the timed ones did
        measured["kernels"] = kernel_times(lambda ids=ids: step(ids), profile_steps)
        release(device)
    return result


def release(device: str) -> None:
    """Give unused memory back, so that the next shape of batch does not find the holes that the last one left."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run_apart(peer: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """``run_one`` in a process of its own; a peer that cannot run, or fails, is a result that says so."""
    command = [sys.executable, __file__, "--one", peer, "--device", device, "--layers", str(arguments.layers)]
    command += ["--batches", *arguments.batches, *(["--tiny"] if arguments.tiny else [])]
    command += [] if arguments.packing_check else ["--no-packing-check"]
    for name in ("warm_up", "steps", "host_steps", "profile_steps"):
        command += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = (done.stderr.strip() or f"exit status {done.returncode}, no message").splitlines()
        return {"failed": lines[-1], "stderr": lines[-40:]}
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**out, "process_seconds": time.perf_counter() - started}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; all the same of a single value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def table(runs: Sequence[tuple[str, dict[str, Any]]], batches: Sequence[str]) -> list[str]:
    """The lines to print: of each batch shape every run, with its ratio to the first run of ``BASE``."""
    lines = []
    for batch in batches:
        base = next((run["batches"][batch] for peer, run in runs if peer == BASE and "batches" in run), None)
        floor = statistics.median(base["step_ms"]) if base else math.nan
        lines.append(f"{batch}: ms a step (quartiles), ratio to {BASE}, ms of host and kernels, launches, peak memory")
        seen: set[str] = set()
        for peer, run in runs:
            name = f"{peer} again" if peer in seen else peer
            seen.add(peer)
            if "batches" not in run:
                reason = f"failed: {run['failed']}" if "failed" in run else f"skipped: {run['skipped']}"
                lines.append(f"  {name:20} {reason}")
                continue
            measured = run["batches"][batch]
            first, median, third = quartiles(measured["step_ms"])
            host = statistics.median(measured["host_ms"]) if measured["host_ms"] else math.nan
            line = f"  {name:20} {median:7.1f} ({first:.1f} to {third:.1f})  {median / floor:5.2f}  host {host:6.1f}"
            if "kernels" in measured:
                line += f"  kernels {measured['kernels']['ms']:6.1f} in {measured['kernels']['launches']:5.0f}"
            if "peak_bytes" in measured:
                line += f"  {measured['peak_bytes'] / 2**30:5.1f} GiB"
            lines.append(line)
    return lines


def machine(device: str) -> dict[str, Any]:
    """What the runs were on; they say themselves which card it was, and this process needs no memory of it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = None
    if device == "cuda" and shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return {"card": None, "driver": driver, "cpus": os.cpu_count(), "python": platform.python_version()}


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for name in ("torch", "transformer-engine", "transformers", "tepatch", "tepatch-llama", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--batches", nargs="+", default=["8x256", "2x2048"], metavar="ROWSxLENGTH")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--host-steps", type=int, default=3)
    parser.add_argument("--profile-steps", type=int, default=2, help="0: no profile")
    parser.add_argument(
        "--no-packing-check", dest="packing_check", action="store_false", help="see the top of the file"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama, to see the script work")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        try:
            result = run_one(
                arguments.one,
                batches=arguments.batches,
                layers=arguments.layers,
                tiny=arguments.tiny,
                device=arguments.device,
                warm_up=arguments.warm_up,
                steps=arguments.steps,
                host_steps=arguments.host_steps,
                profile_steps=arguments.profile_steps,
                packing_check=arguments.packing_check,
            )
        except Skipped as reason:
            result = {"skipped": str(reason)}
        print(json.dumps(result))
        return

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not arguments.tiny:
        parser.error("torch finds no GPU here: only --tiny runs without one")
    runs: list[tuple[str, dict[str, Any]]] = []
    on = machine(device)
    # The first once more, unless there is nothing to compare it with.
    for peer in [*arguments.peers, *arguments.peers[:1]] if len(arguments.peers) > 1 else arguments.peers:
        run = run_apart(peer, arguments, device)
        runs.append((peer, run))
        on["card"] = run.pop("card", on["card"])
        said = run.get("failed") or run.get("skipped") or f"{run['process_seconds']:.0f} s"
        print(f"{peer}: {said}", file=sys.stderr, flush=True)
        if arguments.output:  # after each: what was measured is kept whatever happens to the rest
            result = {
                "benchmark": "train_gpu",
                "shape": {**SHAPE, "num_hidden_layers": arguments.layers} if not arguments.tiny else "tiny",
                "dtype": "bfloat16",
                "optimizer": "AdamW(fused=True)",
                "warm_up": arguments.warm_up,
                "packing_check": arguments.packing_check,
                "base": BASE,
                "runs": [{"peer": name, **each} for name, each in runs],
                "machine": on,
                "versions": versions(),
            }
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{on['card'] or device}, {arguments.layers} layers"
        + (", tiny (no measure of speed)" if arguments.tiny else "")
    )
    print("\n".join(table(runs, arguments.batches)))
    if any("failed" in run for _, run in runs):
        for peer, run in runs:
            if "failed" in run:
                print(f"\n{peer}:", *run["stderr"], sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
