"""Training in FP8 beside bfloat16 on one GPU: where the loss is after the same steps from the same weights.

    python benchmarks/fp8_loss.py [--steps 200] [--layers 4] [--output benchmarks/results/fp8_loss.json]
    python benchmarks/fp8_loss.py --tiny    # the script itself, on any machine: bf16 only, says nothing about FP8

Four layers of Llama-2-7B's shape (hidden 4096, FFN 11008, 32 heads) learn bytes of real text: the sources of Python's
own standard library, in a seeded order. Every precision starts from the same weights and sees the same batches, each
once, with AdamW; what is compared is the mean loss of the last steps. How much of a difference is chance shows one run
more, in bfloat16, from weights that differ by one unit in the last place here and there.

Parameters are float32, under ``torch.autocast(bfloat16)``. In bfloat16 (``--parameters bfloat16``) most updates of this
size are lost to rounding, and other ones in each precision, so that the runs do not compare.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tepatch
from tepatch.proven import installed_versions

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
BASE, NUDGED = "bf16", "bf16 nudged"
PRECISIONS = (BASE, "fp8", "fp8-current", "fp8-block")
LAST = 20
ALLOWED = 0.01
"""How far from bfloat16's final loss FP8's may be, relative to it."""


def text(size: int, seed: int) -> torch.Tensor:
    """``size`` bytes of Python sources as token ids."""
    root = Path(os.__file__).parent
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(seed).shuffle(paths)
    out = bytearray()
    for path in paths:
        out += path.read_bytes()
        if len(out) >= size:
            return torch.frombuffer(out, dtype=torch.uint8)[:size].long()
    raise SystemExit(f"only {len(out)} bytes of sources in {root}, {size} are needed: pass fewer --steps")


def train(precision: str, config: Any, batches: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; ``batches`` is [steps, rows, tokens]."""
    torch.manual_seed(arguments.seed)
    backend = "reference" if arguments.tiny else "te"
    name = BASE if precision == NUDGED else precision
    model = tepatch.build("llama", config, dtype=getattr(torch, arguments.parameters), backend=backend, precision=name)
    device = next(model.parameters()).device
    checksum = float(sum(parameter.detach().float().sum() for parameter in model.parameters()))
    if precision == NUDGED:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2**-9 * (torch.rand_like(parameter, dtype=torch.float32) < 0.01))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    warm_up = max(1, len(batches) // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    losses = []
    started = time.perf_counter()
    for batch in batches:
        ids = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.parameters == "float32"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    return {
        "precision": model.tepatch.precision,
        "final": statistics.mean(values[-LAST:]),
        "first": values[0],
        "seconds": seconds,
        "checksum": checksum,
        "losses": [round(value, 5) for value in values],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--parameters", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tiny", action="store_true", help="a small model on the reference backend, bf16 only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    import transformers
    from transformers import LlamaConfig

    shape = {**SHAPE, **(TINY if arguments.tiny else {}), "num_hidden_layers": arguments.layers}
    config = LlamaConfig(**shape)
    batches = text(arguments.steps * arguments.rows * arguments.tokens, arguments.seed)
    batches = batches.view(arguments.steps, arguments.rows, arguments.tokens)
    others = [] if arguments.tiny else [name for name in arguments.precisions if name != BASE]
    names = [BASE, NUDGED, *others]
    card = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    print(f"{card}: {arguments.layers} layers, {arguments.steps} steps of {arguments.rows} x {arguments.tokens} bytes")
    runs: dict[str, dict[str, Any]] = {}
    for name in names:
        run = runs[name] = train(name, config, batches, arguments)
        run["ratio"] = run["final"] / runs[BASE]["final"]
        print(
            f"  {name:12} {run['first']:.4f} -> {run['final']:.4f}  {run['ratio']:.4f} of bf16's"
            f"  {run['seconds'] / arguments.steps * 1e3:6.1f} ms a step"
        )
        gc.collect()
        if not arguments.tiny:
            torch.cuda.empty_cache()
    alike = len({run["checksum"] for run in runs.values()}) == 1
    within = all(abs(runs[name]["ratio"] - 1) <= ALLOWED for name in others)
    print(f"  same initial weights: {alike}; every final loss within {ALLOWED:.0%} of bf16's: {within}")
    if arguments.output:
        result = {
            "benchmark": "fp8_loss",
            "shape": shape,
            "arguments": {key: value for key, value in vars(arguments).items() if key != "output"},
            "last": LAST,
            "allowed": ALLOWED,
            "same_initial_weights": alike,
            "within": within,
            "runs": runs,
            "card": card,
            "versions": {
                **installed_versions(),
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if alike and within else 1


if __name__ == "__main__":
    sys.exit(main())
