"""Mixtral through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig

from tepatch.testing import Case, conformance_tests


def config(layers: int = 2, size: int = 64, **fields: Any) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=size,
        intermediate_size=size // 4 * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 4,  # transformers' own Mixtral needs it for scaled rope types
        num_local_experts=4,
        vocab_size=128,
        max_position_embeddings=256,
        pad_token_id=0,
        **fields,
    )


CASES = [
    Case(
        "experts",
        config(),
        refuse={
            "hidden_act": "gelu",
            "rope_parameters.rope_type": "proportional",
            "sliding_window": 1,
            "num_hidden_layers": 0,
            "num_key_value_heads": 3,
            "head_dim": 15,
            "num_experts_per_tok": 5,
            "is_causal": False,
            "quantization_config": {"quant_method": "fp8"},
        },
        gpu=config(4, 512),
    ),
    Case("window", config(sliding_window=8, tie_word_embeddings=True)),
]
test_conformance = conformance_tests("mixtral", CASES)
