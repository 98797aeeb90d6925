"""Phi-3 through the conformance kit: heads, windows and rope as the published models have them, a few tokens long."""

from __future__ import annotations

from typing import Any

from transformers import Phi3Config

from tepatch.testing import Case, conformance_tests

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPU = {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}


def longrope(factors: int) -> dict[str, Any]:
    """Three quarters of each head are rotated, by frequencies of which each has two factors."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.6 * i / factors for i in range(factors)],
        "long_factor": [1.0 + 3.0 * i / factors for i in range(factors)],
    }


CASES = [
    Case(
        "window",  # Phi-3-mini-4k
        Phi3Config(**SIZES, sliding_window=8),
        gpu=Phi3Config(**GPU, sliding_window=32),
        refuse=[
            {"hidden_act": "gelu"},
            {"rope_parameters.rope_type": "yarn"},
            {"num_hidden_layers": 0},
            {"num_attention_heads": 6},
            {"head_dim": 15},
            {"sliding_window": 0},
            {"is_causal": False},
            {"quantization_config": {"quant_method": "fp8"}},
        ],
    ),
    Case(
        "longrope",  # Phi-4-mini
        Phi3Config(**SIZES, num_key_value_heads=2, rope_parameters=longrope(6), tie_word_embeddings=True),
        gpu=Phi3Config(**GPU, num_key_value_heads=2, rope_parameters=longrope(24), tie_word_embeddings=True),
    ),
]

test_conformance = conformance_tests("phi3", CASES)
