"""Llama for tepatch: Transformer Engine layers in Hugging Face's own ``LlamaForCausalLM``.

``tepatch.load("llama", path)`` finds this package by its entry point. The names of NVIDIA's te_llama example
(``TELlamaForCausalLM``, ``TELlamaDecoderLayer``, ``replace_decoder``) are offered too, over the same engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tepatch

if TYPE_CHECKING:
    from tepatch_llama.compat import TELlamaForCausalLM, replace_decoder
    from tepatch_llama.layer import LlamaDecoderLayer as TELlamaDecoderLayer

__all__ = ["TELlamaDecoderLayer", "TELlamaForCausalLM", "replace_decoder", "tepatch_patches"]

_HF = "transformers.models.llama.modeling_llama"


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="llama",
        model_types=("llama",),
        replace={
            f"{_HF}:LlamaDecoderLayer": "tepatch_llama.layer:LlamaDecoderLayer",
            f"{_HF}:LlamaRotaryEmbedding": "tepatch_llama.layer:LlamaRotaryEmbedding",
        },
        mapping="tepatch_llama:llama.tepatch.yaml",
        layouts={"te_llama": "tepatch_llama:te_llama.tepatch.yaml"},
        summary="Llama 2, 3, 3.x and look-alikes (SmolLM2, Vicuna, Yi, ...)",
    )


_HOMES = {
    "TELlamaDecoderLayer": ("tepatch_llama.layer", "LlamaDecoderLayer"),
    "TELlamaForCausalLM": ("tepatch_llama.compat", "TELlamaForCausalLM"),
    "replace_decoder": ("tepatch_llama.compat", "replace_decoder"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use: listing plugins must not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tepatch_llama' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
