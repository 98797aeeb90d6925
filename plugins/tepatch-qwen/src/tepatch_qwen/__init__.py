"""Qwen for tepatch: Transformer Engine layers in Hugging Face's own ``Qwen2ForCausalLM`` and its successors."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch

__all__ = ["tepatch_patches"]

_HF = "transformers.models"
_VL = f"{_HF}.qwen3_vl.modeling_qwen3_vl"


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="qwen2",
        model_types=("qwen2",),
        replace={
            f"{_HF}.qwen2.modeling_qwen2:Qwen2DecoderLayer": "tepatch_qwen.layer:Qwen2DecoderLayer",
            f"{_HF}.qwen2.modeling_qwen2:Qwen2RotaryEmbedding": "tepatch_qwen.layer:Qwen2RotaryEmbedding",
        },
        mapping="tepatch_qwen:qwen2.tepatch.yaml",
        summary="Qwen 1.5, 2, 2.5, QwQ and models made of them, dense",
    )
    yield tepatch.Patch(
        name="qwen3",
        model_types=("qwen3",),
        replace={
            f"{_HF}.qwen3.modeling_qwen3:Qwen3DecoderLayer": "tepatch_qwen.layer:Qwen3DecoderLayer",
            f"{_HF}.qwen3.modeling_qwen3:Qwen3RotaryEmbedding": "tepatch_qwen.layer:Qwen3RotaryEmbedding",
        },
        mapping="tepatch_qwen:qwen3.tepatch.yaml",
        summary="Qwen 3, dense",
    )
    yield tepatch.Patch(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        replace={
            f"{_HF}.qwen3_moe.modeling_qwen3_moe:Qwen3MoeDecoderLayer": "tepatch_qwen.moe:Qwen3MoeDecoderLayer",
            f"{_HF}.qwen3_moe.modeling_qwen3_moe:Qwen3MoeRotaryEmbedding": "tepatch_qwen.moe:Qwen3MoeRotaryEmbedding",
        },
        mapping="tepatch_qwen:qwen3_moe.tepatch.yaml",
        summary="Qwen 3 with experts (30B-A3B, 235B-A22B, ...)",
    )
    yield tepatch.Patch(
        name="qwen3_vl",
        model_types=("qwen3_vl_text",),
        replace={
            f"{_VL}:Qwen3VLTextDecoderLayer": "tepatch_qwen.vl:Qwen3VLTextDecoderLayer",
            f"{_VL}:Qwen3VLTextRotaryEmbedding": "tepatch_qwen.vl:Qwen3VLTextRotaryEmbedding",
        },
        mapping="tepatch_qwen:qwen3_vl.tepatch.yaml",
        summary="Qwen 3 VL: the text part",
    )
