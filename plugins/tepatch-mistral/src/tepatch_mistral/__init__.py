"""Mistral and Ministral for tepatch: Transformer Engine layers in Hugging Face's own ``MistralForCausalLM``."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch

__all__ = ["tepatch_patches"]

_HF = "transformers.models"


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="mistral",
        model_types=("mistral",),
        replace={
            f"{_HF}.mistral.modeling_mistral:MistralDecoderLayer": "tepatch_mistral.layer:MistralDecoderLayer",
            f"{_HF}.mistral.modeling_mistral:MistralRotaryEmbedding": "tepatch_mistral.layer:MistralRotaryEmbedding",
        },
        mapping="tepatch_mistral:mistral.tepatch.yaml",
        summary="Mistral 7B, Nemo, Small and look-alikes (Zephyr, ...): one window for all layers, or none",
    )
    yield tepatch.Patch(
        name="ministral",
        model_types=("ministral",),
        replace={
            f"{_HF}.ministral.modeling_ministral:MinistralDecoderLayer": "tepatch_mistral.layer:MinistralDecoderLayer",
            f"{_HF}.ministral.modeling_ministral:MinistralRotaryEmbedding": (
                "tepatch_mistral.layer:MinistralRotaryEmbedding"
            ),
        },
        mapping="tepatch_mistral:ministral.tepatch.yaml",
        summary="Ministral 8B: windows for some of the layers",
    )
