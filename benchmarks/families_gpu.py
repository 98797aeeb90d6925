"""Logits of every family in bfloat16 on one GPU, beside Hugging Face's own bfloat16: errors against float32.

    python benchmarks/families_gpu.py [--only mistral gemma2] [--output benchmarks/results/families_gpu.json]
    python benchmarks/families_gpu.py --tiny    # the script itself, on any machine: says nothing about a GPU

Real widths, four layers, random weights (of every parameter: no norm at one, no bias at zero), 2,048 tokens: in one
row, and in two rows of which one is padded on the left. The three models have the same weights, rounded to bfloat16.
An error is ``||x - ref|| / ||ref||``, ``ref`` being Hugging Face's model in float32; ours may be 1.05 times theirs.

Where tokens are routed to experts, one that is routed otherwise in bfloat16 than in float32 says nothing about
arithmetic: errors are of the tokens whose routing is the same in all layers of all three. How many these are is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tepatch
from tepatch.proven import installed_versions
from tepatch.te import probe

ALLOWED = 1.05
LAYERS, TOKENS, PADDED = 4, 2048, 500
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 0.5 * i for i in range(48)],
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
}


def sizes(hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


# What the models of these names have; a window is one that 2,048 tokens notice.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", sizes(4096, 14336, 32, 8, 128256, rope_parameters=LLAMA3)),
    "Mistral-7B": ("mistral", sizes(4096, 14336, 32, 8, 32000, head_dim=128, sliding_window=1024)),
    "Ministral-8B": ("ministral", sizes(4096, 12288, 32, 8, 131072, head_dim=128, sliding_window=1024)),
    "Qwen2-7B": ("qwen2", sizes(3584, 18944, 28, 4, 152064)),
    "Qwen3-8B": ("qwen3", sizes(4096, 12288, 32, 8, 151936, head_dim=128)),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        sizes(2048, 6144, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128)
        | {"num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "Gemma-7B": ("gemma", sizes(3072, 24576, 16, 16, 256000, head_dim=256)),
    "Gemma-2-9B": ("gemma2", sizes(3584, 14336, 16, 8, 256000, head_dim=256, sliding_window=1024)),
    "Gemma-3-4B": ("gemma3_text", sizes(2560, 10240, 8, 4, 262208, head_dim=256, sliding_window=512)),
    "Phi-3-mini-128k": (
        "phi3",
        sizes(3072, 8192, 32, 32, 32064, max_position_embeddings=131072, rope_parameters=LONGROPE),
    ),
    "Phi-4-mini": (
        "phi3",
        sizes(3072, 8192, 24, 8, 200064)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    ),
    "Mixtral-8x7B": ("mixtral", sizes(4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)),
    "BERT-large": ("bert", sizes(1024, 4096, 16, 16, 30522, max_position_embeddings=2048)),
    "RoBERTa-large": ("roberta", sizes(1024, 4096, 16, 16, 50265, max_position_embeddings=2050)),
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
}
ENCODERS = ("bert", "roberta")


def config_of(kind: str, fields: dict[str, Any], tiny: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    fields = {**fields, "num_hidden_layers": LAYERS, "pad_token_id": 0}
    if tiny:
        fields |= {name: value for name, value in SMALL.items() if name in fields or name == "head_dim"}
        fields.pop("num_key_value_heads" if kind in ENCODERS else "", None)
        if "rope_parameters" in fields and "short_factor" in fields["rope_parameters"]:
            rope = fields["rope_parameters"]
            fields["rope_parameters"] = rope | {key: rope[key][:8] for key in ("short_factor", "long_factor")}
        fields |= {"moe_intermediate_size": 32, "num_experts": 8} if "num_experts" in fields else {}
    config = AutoConfig.for_model(kind, **fields)
    auto = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    cls = auto._model_mapping[type(config)]
    config.architectures = [cls.__name__]
    return config, cls


def fill(model: Any, seed: int) -> None:
    """Random values in every parameter; norms around what they are, matrices as they were drawn."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))


def results(model: Any, batches: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Logits of the real tokens of each batch, float32 ``[tokens, vocab]``, and which experts each goes to."""
    logits, routes = [], []
    has_router = hasattr(model.config, "num_experts_per_tok")
    for batch in batches:
        extra = {"output_router_logits": True} if has_router else {}
        with torch.no_grad():
            out = model(**batch, use_cache=False, **extra)
        kept = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]) == 1
        logits.append(out.logits[kept].float())
        if has_router:
            count = model.config.num_experts_per_tok
            chosen = [
                layer.view(*kept.shape, -1)[kept].topk(count).indices.sort().values for layer in out.router_logits
            ]
            routes.append(torch.stack(chosen, dim=1))
    return logits, routes


def batches_of(config: Any, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    one = torch.randint(3, config.vocab_size, (1, tokens), generator=generator).to(device)
    two = torch.randint(3, config.vocab_size, (2, tokens // 2), generator=generator).to(device)
    mask = torch.ones_like(two)
    mask[1, : tokens * PADDED // TOKENS] = 0
    batch = {"input_ids": two * mask, "attention_mask": mask}
    if config.model_type not in ENCODERS:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return [{"input_ids": one}, batch]


def relative(found: Any, truth: Any) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def measure(name: str, kind: str, fields: dict[str, Any], tiny: bool) -> list[dict[str, Any]]:
    device = torch.device("cpu" if tiny else "cuda")
    config, cls = config_of(kind, fields, tiny)
    torch.manual_seed(0)
    with device:
        # transformers 5.17 computes a Gemma 2 by SDPA without its cap, if not told otherwise.
        how = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        stock = cls._from_config(config, dtype=torch.bfloat16, **how).eval()
    fill(stock, seed=1)
    batches = batches_of(config, 128 if tiny else TOKENS, device)
    usual, usual_routes = results(stock, batches)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        ours = tepatch.load("auto", folder, dtype=torch.bfloat16, backend="reference" if tiny else "te")
        found, found_routes = results(ours, batches)
    del ours
    gc.collect()
    truth, routes = results(stock.float(), batches)
    del stock
    gc.collect()
    rows = []
    for index, what in enumerate(("one row", "two rows, one padded on the left")):
        keep = torch.ones(truth[index].shape[0], dtype=torch.bool, device=device)
        for other in (usual_routes, found_routes):
            if routes:
                keep &= (other[index] == routes[index]).flatten(1).all(1)
        theirs, mine = (relative(each[index][keep], truth[index][keep]) for each in (usual, found))
        row = {"model": name, "model_type": kind, "batch": what, "hugging_face_bf16": theirs, "tepatch_bf16": mine}
        row["ratio"] = mine / theirs
        row["routed_alike"] = float(keep.float().mean()) if routes else None
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="model types, or parts of models' names")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    probe()  # Transformer Engine first: where there are two cuDNNs, torch must not have loaded the other one's half
    rows: list[dict[str, Any]] = []
    failed = []
    for name, (kind, fields) in FAMILIES.items():
        if arguments.only and not any(part == kind or part in name for part in arguments.only):
            continue
        started = time.perf_counter()
        try:
            new = measure(name, kind, fields, arguments.tiny)
        except Exception as error:  # the others are measured all the same, and the run fails
            failed.append(name)
            print(f"{name:18s} {type(error).__name__}: {error}", flush=True)
            continue
        rows += new
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        for row in new:
            alike = "" if row["routed_alike"] is None else f"  {row['routed_alike']:.1%} routed alike"
            verdict = "" if row["ratio"] <= ALLOWED else "  ABOVE"
            errors = f"HF {row['hugging_face_bf16']:.3e}  tepatch {row['tepatch_bf16']:.3e}"
            print(f"{name:16s} {row['batch']:33s} {errors}  {row['ratio']:.3f}{alike}{verdict}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result = {
        "benchmark": "families_gpu",
        "layers": LAYERS,
        "tokens": TOKENS,
        "allowed": ALLOWED,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "versions": installed_versions(),
        "rows": rows,
        "failed": failed,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(failed) or (any(row["ratio"] > ALLOWED for row in rows) and not arguments.tiny))


if __name__ == "__main__":
    sys.exit(main())
