"""Phi-3 and Phi-4 for tepatch: Transformer Engine layers in Hugging Face's own ``Phi3ForCausalLM``."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch

__all__ = ["tepatch_patches"]

_HF = "transformers.models.phi3.modeling_phi3"


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="phi3",
        model_types=("phi3",),
        replace={
            f"{_HF}:Phi3DecoderLayer": "tepatch_phi.layer:Phi3DecoderLayer",
            f"{_HF}:Phi3RotaryEmbedding": "tepatch_phi.layer:Phi3RotaryEmbedding",
        },
        mapping="tepatch_phi:phi3.tepatch.yaml",
        summary="Phi-3, Phi-3.5, Phi-4 and Phi-4-mini",
    )
