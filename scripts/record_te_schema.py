"""Record the parameters of Transformer Engine's real modules, for a grid of constructor arguments.

    python scripts/record_te_schema.py tests/te/te_schema.json

runs on a GPU machine with Transformer Engine. ``tests/te/test_schema.py`` builds the reference module for
every entry and compares names, order, shapes, dtypes and requires_grad, so that a machine without a GPU still
tests against what Transformer Engine really has. Importing this file needs neither torch nor Transformer
Engine.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
GATED = ("geglu", "qgeglu", "reglu", "sreglu", "swiglu", "glu")
UNGATED = ("gelu", "qgelu", "relu", "srelu", "silu")


def grid() -> list[dict[str, Any]]:
    """List what is recorded: {"module": class name, "args": constructor arguments as JSON values}."""
    entries: list[dict[str, Any]] = []

    def add(module: str, **args: Any) -> None:
        entries.append({"module": module, "args": args})

    booleans = (False, True)
    for bias, dtype in product(booleans, DTYPES):
        add("Linear", in_features=64, out_features=96, bias=bias, params_dtype=dtype)
    norms = tuple(product(("LayerNorm", "RMSNorm"), booleans, booleans, DTYPES))
    for normalization, zero_centered, bias, dtype in norms:
        norm = {"normalization": normalization, "zero_centered_gamma": zero_centered}
        common = {**norm, "eps": 1e-6, "bias": bias, "params_dtype": dtype}
        add("LayerNormLinear", in_features=64, out_features=96, **common)
        add("LayerNormMLP", hidden_size=64, ffn_hidden_size=80, activation="swiglu", **common)
    for activation, bias in product((*GATED, *UNGATED), booleans):
        add("LayerNormMLP", hidden_size=64, ffn_hidden_size=80, activation=activation, bias=bias)
    add("LayerNormLinear", in_features=64, out_features=96, return_layernorm_output=True)
    for module, zero_centered, dtype in product(("RMSNorm", "LayerNorm"), booleans, DTYPES):
        add(module, normalized_shape=64, eps=1e-6, zero_centered_gamma=zero_centered, dtype=dtype)
    heads = {"num_attention_heads": 4, "layer_number": 1, "qkv_format": "bshd"}
    add("DotProductAttention", kv_channels=16, **heads)
    add("DotProductAttention", kv_channels=16, num_gqa_groups=2, softmax_scale=0.5, **heads)
    add("DotProductAttention", kv_channels=[16, 32], window_size=[7, 0], **heads)
    return entries


def constructor_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """Turn the JSON values of an entry into Python's: dtype names into dtypes, lists into tuples."""
    import torch

    def value(name: str, given: Any) -> Any:
        if name.endswith("dtype"):
            return getattr(torch, given)
        return tuple(given) if isinstance(given, list) else given

    return {name: value(name, given) for name, given in args.items()}


def describe(module: Any) -> list[dict[str, Any]]:
    """List a module's parameters in its own order, as JSON values."""
    return [
        {
            "name": name,
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "requires_grad": parameter.requires_grad,
        }
        for name, parameter in module.named_parameters()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the JSON file to write")
    output = parser.parse_args().output

    # torch first: it loads the NCCL that Transformer Engine links against.
    import torch
    import transformer_engine
    import transformer_engine.pytorch as te

    entries = [
        {
            **entry,
            "parameters": describe(getattr(te, entry["module"])(**constructor_arguments(entry["args"]))),
        }
        for entry in grid()
    ]
    recorded = {
        "transformer_engine": transformer_engine.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
    }
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    header = json.dumps(recorded, indent=2).removesuffix("\n}")
    output.write_text(f'{header},\n  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    print(f"{len(entries)} modules recorded in {output}")


if __name__ == "__main__":
    main()
