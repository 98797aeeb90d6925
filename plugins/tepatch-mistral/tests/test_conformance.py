"""Mistral and Ministral through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import MinistralConfig, MistralConfig

from tepatch.testing import Case, conformance_tests

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
GPU: dict[str, Any] = {
    **SIZES,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
REFUSE: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"rope_parameters.rope_type": "proportional"},
    {"sliding_window": 1},
    {"num_hidden_layers": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 15},
    {"is_causal": False},
    {"quantization_config": {"quant_method": "fp8"}},
]

WINDOW = Case(
    "window",
    MistralConfig(**SIZES, head_dim=24, sliding_window=8),
    refuse=[*REFUSE, {"layer_types": ["full_attention"] * 3}],
    gpu=MistralConfig(**GPU, head_dim=128, sliding_window=64),
)
NO_WINDOW = Case("no-window", MistralConfig(**{**SIZES, "num_key_value_heads": 1}, sliding_window=None))
ALTERNATING = Case(
    "alternating",
    MinistralConfig(
        **SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    refuse=[*REFUSE, {"sliding_window": None}, {"head_dim": None}],
    gpu=MinistralConfig(**GPU, head_dim=64, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 2),
)

test_mistral = conformance_tests("mistral", [WINDOW, NO_WINDOW])
test_ministral = conformance_tests("ministral", [ALTERNATING])
