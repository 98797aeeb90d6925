"""Gemma, Gemma 2 and Gemma 3 (text) for tepatch: Transformer Engine layers in Hugging Face's own models."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    for name, model_type, prefix, summary in (
        ("gemma", "gemma", "Gemma", "Gemma and CodeGemma: norms of 1 + w, GeGLU"),
        ("gemma2", "gemma2", "Gemma2", "Gemma 2: four norms a layer, capped scores, alternating windows"),
        (
            "gemma3",
            "gemma3_text",
            "Gemma3",
            "Gemma 3 (text): normed queries and keys, two ropes, windows in most layers",
        ),
    ):
        hf = f"transformers.models.{name}.modeling_{name}"
        yield tepatch.Patch(
            name=name,
            model_types=(model_type,),
            replace={
                f"{hf}:{prefix}DecoderLayer": f"tepatch_gemma.layer:{prefix}DecoderLayer",
                f"{hf}:{prefix}RotaryEmbedding": f"tepatch_gemma.layer:{prefix}RotaryEmbedding",
            },
            mapping=f"tepatch_gemma:{name}.tepatch.yaml",
            summary=summary,
        )
