"""Gemma, Gemma 2 and Gemma 3 through the conformance kit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma3TextConfig, GemmaConfig
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tepatch.testing import Case, conformance_tests, refusals, small_sizes, wide_sizes


def capped(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """Hugging Face's own eager attention: its SDPA caps no scores, and is what transformers 5.17 takes by itself.

    The softmax is in float32 also in a float64 model, whose masks are then minus infinity: padding would be NaN.
    """
    if attention_mask is not None and attention_mask.dtype == torch.float64:
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min)
    return eager_attention_forward(module, query, key, value, attention_mask, **more)


AttentionInterface.register("capped", capped)
AttentionMaskInterface.register("capped", eager_mask)

HEADS: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 32}  # not hidden_size / num_attention_heads
WIDE_HEADS: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 128}
# Far from 1 / head_dim, and a cap below the scores: without them the outputs are others.
SCORES: dict[str, Any] = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "sliding_window": 8}
CAPPED = {**SCORES, "attn_logit_softcapping": 2.0, "attn_implementation": "capped"}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
LATER: dict[str, Any] = {
    "one_way": {"use_bidirectional_attention": True},
    "activation": {"hidden_activation": "gelu"},
    "scale": {"query_pre_attn_scalar": 0},
    "window": {"sliding_window": 0},
}

test_gemma = conformance_tests(
    "gemma",
    [
        Case(
            "one key head",
            GemmaConfig(**small_sizes(**HEADS, num_hidden_layers=2, num_key_value_heads=1)),
            refuse=refusals(one_way={"use_bidirectional_attention": True}),
            gpu=GemmaConfig(**wide_sizes(**WIDE_HEADS)),
        )
    ],
)
test_gemma2 = conformance_tests(
    "gemma2",
    [
        Case(
            "biases",
            Gemma2Config(**small_sizes(**HEADS, **CAPPED, attention_bias=True)),
            refuse=refusals(**LATER, cap={"attn_logit_softcapping": 0.0}),
            gpu=Gemma2Config(**wide_sizes(**WIDE_HEADS, **{**CAPPED, "sliding_window": 64})),
        )
    ],
)
test_gemma3 = conformance_tests(
    "gemma3",
    [
        Case(
            "two ropes",
            Gemma3TextConfig(
                **small_sizes(
                    **HEADS, **SCORES, layer_types=TYPES, rope_parameters=TWO_ROPES, tie_word_embeddings=False
                )
            ),
            refuse=refusals(
                **LATER,
                cap={"attn_logit_softcapping": 50.0},
                rope={"rope_parameters.full_attention.rope_type": "longrope"},
                rope_of_windows={"rope_parameters.sliding_attention.rope_type": "longrope"},
            ),
            invisible={
                "model.layers.{layer}.self_attn.qkv.layernorm_weight scaled and offset": (
                    "1 + w becomes 1.5 times that: queries and keys are normed, and what values give is too"
                )
            },
            gpu=Gemma3TextConfig(
                **wide_sizes(
                    **WIDE_HEADS,
                    **{**SCORES, "sliding_window": 64},
                    num_hidden_layers=3,
                    layer_types=TYPES,
                    rope_parameters=TWO_ROPES,
                )
            ),
        )
    ],
)
