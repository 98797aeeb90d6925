"""Mixtral for tepatch: Transformer Engine layers in Hugging Face's own ``MixtralForCausalLM``."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch

__all__ = ["tepatch_patches"]

_HF = "transformers.models.mixtral.modeling_mixtral"


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="mixtral",
        model_types=("mixtral",),
        replace={
            f"{_HF}:MixtralDecoderLayer": "tepatch_mixtral.layer:MixtralDecoderLayer",
            f"{_HF}:MixtralRotaryEmbedding": "tepatch_mixtral.layer:MixtralRotaryEmbedding",
        },
        mapping="tepatch_mixtral:mixtral.tepatch.yaml",
        summary="Mixtral 8x7B, 8x22B and models made of them",
    )
