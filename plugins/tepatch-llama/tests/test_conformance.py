"""Llama through the conformance kit."""

from __future__ import annotations

from transformers import LlamaConfig

from tepatch.testing import Case, conformance_tests, refusals, small_sizes, wide_sizes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EVERYTHING = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3, "tie_word_embeddings": True}

CASES = [
    Case(
        "grouped",
        LlamaConfig(**small_sizes()),
        gpu=LlamaConfig(**wide_sizes(vocab_size=128, max_position_embeddings=256)),
        refuse=refusals(),
    ),
    Case(
        "biases-and-ties",
        LlamaConfig(**small_sizes(num_key_value_heads=4, **EVERYTHING)),
        skip={"gpu": "measured with the case grouped"},
    ),
]

test_conformance = conformance_tests("llama", CASES)
