"""Qwen 2 and 3, dense and with experts, through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

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
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
REFUSE: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"rope_parameters.rope_type": "proportional"},
    {"num_hidden_layers": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 15},
    {"is_causal": False},
    {"quantization_config": {"quant_method": "fp8"}},
]

QWEN2 = Case(
    "tied-yarn-windows",
    Qwen2Config(**SIZES, **WINDOW, rope_parameters=YARN, tie_word_embeddings=True),
    refuse=[*REFUSE, {"sliding_window": None}],
    gpu=Qwen2Config(**GPU),
)
QWEN3 = Case(
    "biases-windows",
    Qwen3Config(**SIZES, **WINDOW, head_dim=24, attention_bias=True),
    refuse=[*REFUSE, {"sliding_window": None}],
    gpu=Qwen3Config(**GPU, head_dim=128),
)
QWEN3_MOE = Case(
    "dense-and-experts",
    Qwen3MoeConfig(
        **SIZES, head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[1]
    ),
    refuse=[*REFUSE, {"num_experts_per_tok": 5}],
    gpu=Qwen3MoeConfig(**GPU, head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512),
)

QWEN3_VL = Case(
    "text-of-a-larger-model",
    Qwen3VLConfig(
        text_config={
            **SIZES,
            "head_dim": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": SIZES["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=SIZES["vocab_size"] - 2,
        vision_start_token_id=SIZES["vocab_size"] - 3,
        video_token_id=SIZES["vocab_size"] - 1,
    ),
    auto_class="AutoModelForImageTextToText",
    refuse=[{f"text_config.{name}": value for name, value in change.items()} for change in REFUSE],
)

test_qwen2 = conformance_tests("qwen2", [QWEN2])
test_qwen3 = conformance_tests("qwen3", [QWEN3])
test_qwen3_moe = conformance_tests("qwen3_moe", [QWEN3_MOE])
test_qwen3_vl = conformance_tests("qwen3_vl", [QWEN3_VL])
