"""Llama through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from tepatch.testing import Case, conformance_tests

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE = LlamaConfig(
    **{**TINY, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
)

CASES = [
    Case(
        "grouped",
        LlamaConfig(**TINY),
        gpu=WIDE,
        refuse=[
            {"hidden_act": "tanh"},
            {"rope_parameters.rope_type": "mine"},
            {"num_hidden_layers": 0},
            {"num_key_value_heads": 3},
            {"head_dim": 15},
            {"is_causal": False},
            {"quantization_config": {"quant_method": "fp8"}},
        ],
    ),
    Case(
        "biases-and-ties",
        LlamaConfig(
            **{**TINY, "num_key_value_heads": 4, "tie_word_embeddings": True},
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=LLAMA3,
        ),
        skip={"gpu": "measured with the case grouped"},
    ),
]

test_conformance = conformance_tests("llama", CASES)
