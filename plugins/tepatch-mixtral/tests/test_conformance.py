"""Mixtral through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig

from tepatch.testing import Case, conformance_tests, refusals, small_sizes


def config(layers: int = 2, size: int = 64, **fields: Any) -> MixtralConfig:
    sizes = {"hidden_size": size, "intermediate_size": size // 4 * 3, "num_hidden_layers": layers}
    # transformers' own Mixtral needs head_dim for scaled rope types
    return MixtralConfig(**small_sizes(**sizes, head_dim=size // 4, num_local_experts=4, **fields))


CASES = [
    Case(
        "experts",
        config(),
        refuse=refusals(window={"sliding_window": 1}, experts={"num_experts_per_tok": 5}),
        gpu=config(4, 512),
    ),
    Case("window", config(sliding_window=8, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")),
]
test_conformance = conformance_tests("mixtral", CASES)
