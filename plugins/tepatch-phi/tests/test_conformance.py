"""Phi-3 through the conformance kit: heads, windows and rope as the published models have them, a few tokens long."""

from __future__ import annotations

from typing import Any

from transformers import Phi3Config

from tepatch.testing import Case, conformance_tests, refusals, small_sizes, wide_sizes

SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def small(**fields: Any) -> Phi3Config:
    return Phi3Config(**small_sizes(**{**SIZES, "num_hidden_layers": 2, **fields}))


def wide(**fields: Any) -> Phi3Config:
    return Phi3Config(**wide_sizes(**{**SIZES, "num_key_value_heads": 8, "vocab_size": 128, **fields}))


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
        small(sliding_window=8),
        gpu=wide(sliding_window=32),
        refuse=refusals(rope={"rope_parameters.rope_type": "yarn"}, window={"sliding_window": 0}),
    ),
    Case(
        "longrope",  # Phi-4-mini
        small(num_key_value_heads=2, rope_parameters=longrope(6), tie_word_embeddings=True),
        gpu=wide(num_key_value_heads=2, rope_parameters=longrope(24), tie_word_embeddings=True),
    ),
]

test_conformance = conformance_tests("phi3", CASES)
