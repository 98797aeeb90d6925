"""Mistral and Ministral through the conformance kit."""

from __future__ import annotations

from transformers import MinistralConfig, MistralConfig

from tepatch.testing import Case, conformance_tests, refusals, small_sizes, wide_sizes

SLIDING, FULL = "sliding_attention", "full_attention"

WINDOW = Case(
    "window",
    MistralConfig(**small_sizes(head_dim=24, sliding_window=8)),
    refuse=refusals(window={"sliding_window": 1}, one_window={"layer_types": [FULL] * 3}),
    gpu=MistralConfig(**wide_sizes(head_dim=128, sliding_window=64)),
)
NO_WINDOW = Case("no-window", MistralConfig(**small_sizes(num_key_value_heads=1, sliding_window=None)))
ALTERNATING = Case(
    "alternating",
    MinistralConfig(**small_sizes(head_dim=16, sliding_window=8, layer_types=[SLIDING, FULL, SLIDING])),
    refuse=refusals(window={"sliding_window": 1}, no_window={"sliding_window": None}, head_dim={"head_dim": None}),
    gpu=MinistralConfig(**wide_sizes(head_dim=64, sliding_window=64, layer_types=[SLIDING, FULL] * 2)),
)

test_mistral = conformance_tests("mistral", [WINDOW, NO_WINDOW])
test_ministral = conformance_tests("ministral", [ALTERNATING])
