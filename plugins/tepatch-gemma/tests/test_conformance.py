"""Gemma, Gemma 2 and Gemma 3 through the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma3TextConfig, GemmaConfig
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tepatch.testing import Case, check_patch, conformance_tests


def capped(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """Hugging Face's own eager attention: its SDPA caps no scores, and is what transformers 5.17 takes by itself.

    The softmax is in float32 also in a float64 model, whose masks are then minus infinity: padding would be NaN.
    """
    if attention_mask is not None and attention_mask.dtype == torch.float64:
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min)
    return eager_attention_forward(module, query, key, value, attention_mask, **more)


AttentionInterface.register("capped", capped)
AttentionMaskInterface.register("capped", eager_mask)

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / num_attention_heads
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
GPU = {**TINY, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 1000}
# Far from 1 / head_dim, and a cap below the scores: without them the outputs are others.
SCORES: dict[str, Any] = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "sliding_window": 8}
CAPPED = {**SCORES, "attn_logit_softcapping": 2.0, "attn_implementation": "capped"}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
REFUSED = {
    "use_bidirectional_attention": True,
    "is_causal": False,
    "quantization_config": {"quant_method": "fp8"},
    "num_hidden_layers": 0,
    "num_key_value_heads": 3,
    "head_dim": 33,
}
REFUSED_LATER = {**REFUSED, "hidden_activation": "gelu", "query_pre_attn_scalar": 0, "sliding_window": 0}
LONG = {f"rope_parameters.{kind}.rope_type": "longrope" for kind in TWO_ROPES}


def gemma(**fields: Any) -> GemmaConfig:
    return GemmaConfig(**{**TINY, "num_hidden_layers": 2, **fields})


def gemma2(**fields: Any) -> Gemma2Config:
    return Gemma2Config(**{**TINY, **CAPPED, "num_hidden_layers": 3, **fields})


def gemma3(**fields: Any) -> Gemma3TextConfig:
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3TextConfig(**{**TINY, **SCORES, "num_hidden_layers": 3, "layer_types": types, **fields})


test_gemma = conformance_tests(
    "gemma",
    [
        Case(
            "one key head",
            gemma(num_key_value_heads=1),
            refuse={**REFUSED, "hidden_act": "gelu", "rope_parameters.rope_type": "?"},
            gpu=gemma(**GPU, num_hidden_layers=4),
        )
    ],
)
test_gemma2 = conformance_tests(
    "gemma2",
    [
        Case(
            "biases",
            gemma2(attention_bias=True),
            refuse={**REFUSED_LATER, "attn_logit_softcapping": 0.0, "rope_parameters.rope_type": "?"},
            gpu=gemma2(**GPU, num_hidden_layers=4, sliding_window=64),
        )
    ],
)
test_gemma3 = conformance_tests(
    "gemma3",
    [
        Case(
            "two ropes",
            gemma3(rope_parameters=TWO_ROPES, tie_word_embeddings=False),
            refuse={**REFUSED_LATER, **LONG, "attn_logit_softcapping": 50.0},
            invisible={
                "model.layers.{layer}.self_attn.qkv.layernorm_weight scaled and offset": (
                    "1 + w becomes 1.5 times that: queries and keys are normed, and what values give is too"
                )
            },
            gpu=gemma3(**GPU, rope_parameters=TWO_ROPES, sliding_window=64),
        )
    ],
)

ROPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": 16},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [2.0 + 0.3 * i for i in range(16)],
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize(
    ("patch", "kind"), [("gemma", kind) for kind in ROPES] + [("gemma3", kind) for kind in ROPES if kind != "longrope"]
)
def test_a_rope_type_that_is_not_refused_is_computed(patch: str, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **ROPES[kind]}
    limit = {"max_position_embeddings": 16} if kind == "dynamic" else {}
    if patch == "gemma":
        config: Any = gemma(rope_parameters=rope, **limit)
    else:
        ropes = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 100.0}}
        config = gemma3(rope_parameters=ropes, **limit)
    check_patch(patch, [Case(kind, config)], checks=["lengths"]).raise_for_failures()
