"""Qwen 2 and 3, dense and with experts, through the conformance kit."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

from tepatch.testing import Case, conformance_tests, refusals, small_sizes, wide_sizes

WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


def vl(sizes: dict[str, Any], mrope: list[int]) -> Qwen3VLConfig:
    """A model of these sizes around its text part, with as small an eye as there can be."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": mrope}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": sizes["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    names = ("video_token_id", "image_token_id", "vision_start_token_id")
    tokens = {name: sizes["vocab_size"] - 1 - index for index, name in enumerate(names)}
    return Qwen3VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=vision, **tokens)


QWEN2 = Case(
    "tied-yarn-windows",
    Qwen2Config(**small_sizes(**WINDOW, rope_parameters=YARN, tie_word_embeddings=True)),
    refuse=refusals(window={"sliding_window": None}),
    gpu=Qwen2Config(**wide_sizes()),
)
QWEN3 = Case(
    "biases-windows",
    Qwen3Config(**small_sizes(**WINDOW, head_dim=24, attention_bias=True)),
    refuse=refusals(window={"sliding_window": None}),
    gpu=Qwen3Config(**wide_sizes(head_dim=128)),
)
QWEN3_MOE = Case(
    "dense-and-experts",
    Qwen3MoeConfig(
        **small_sizes(head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[1])
    ),
    refuse=refusals(window={"sliding_window": 1}, experts={"num_experts_per_tok": 5}),
    gpu=Qwen3MoeConfig(**wide_sizes(head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512)),
)
QWEN3_VL = Case(
    "text-of-a-larger-model",
    vl(small_sizes(head_dim=24), [6, 3, 3]),
    auto_class="AutoModelForImageTextToText",
    refuse=refusals(inside="text_config", rope={"rope_parameters.rope_type": "yarn"}),
    gpu=vl(wide_sizes(head_dim=128), [24, 20, 20]),
)

test_qwen2 = conformance_tests("qwen2", [QWEN2])
test_qwen3 = conformance_tests("qwen3", [QWEN3])
test_qwen3_moe = conformance_tests("qwen3_moe", [QWEN3_MOE])
test_qwen3_vl = conformance_tests("qwen3_vl", [QWEN3_VL])
