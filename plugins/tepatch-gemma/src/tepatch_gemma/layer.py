"""Gemma's decoder layers, made of Transformer Engine's modules (or of the reference ones).

All norms multiply by 1 + w (``zero_centered_gamma``), the MLP is GeGLU. Gemma 2 and 3 norm what a branch gives too,
before it is added, have a scale of their own for the scores, and windows in some layers. What scales the embeddings
and caps the logits is the stock model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3

from tepatch.te import modules
from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp, window_of
from tepatch.te.rope import Float32Rotary


def _attention(config: Any, layer_idx: int, **more: Any) -> SelfAttention:
    bias = {"qkv_bias": config.attention_bias, "proj_bias": config.attention_bias}
    return SelfAttention(**attention_options(config, layer_idx), **bias, zero_centered_gamma=True, **more)


class GemmaDecoderLayer(DecoderLayer, gemma.GemmaDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: GemmaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        self.self_attn = _attention(config, layer_idx)
        self.mlp = gated_mlp(config, zero_centered_gamma=True)
        self.mark_as_initialized()


class SandwichLayer(DecoderLayer):
    """``x + norm(attention(norm(x)))``, then ``x + norm(mlp(norm(x)))``: what Gemma 2 and 3 have in common."""

    def _build(self, config: Gemma2Config | Gemma3TextConfig, layer_idx: int, **more: Any) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        scale, window = config.query_pre_attn_scalar**-0.5, window_of(config, layer_idx)
        self.self_attn = _attention(config, layer_idx, softmax_scale=scale, window=window, **more)
        self.mlp = gated_mlp(config, activation=config.hidden_activation, zero_centered_gamma=True)
        norm = {"eps": config.rms_norm_eps, "zero_centered_gamma": True}
        self.post_attention_layernorm = modules().RMSNorm(config.hidden_size, **norm)
        self.post_feedforward_layernorm = modules().RMSNorm(config.hidden_size, **norm)
        self.mark_as_initialized()

    def after_attention(self, out: Tensor) -> Tensor:
        normed: Tensor = self.post_attention_layernorm(out)
        return normed

    def after_mlp(self, out: Tensor) -> Tensor:
        normed: Tensor = self.post_feedforward_layernorm(out)
        return normed


class Gemma2DecoderLayer(SandwichLayer, gemma2.Gemma2DecoderLayer):  # type: ignore[misc, no-untyped-call]
    """Scores are capped."""

    def __init__(self, config: Gemma2Config, layer_idx: int) -> None:
        self._build(config, layer_idx, softcap=config.attn_logit_softcapping)


class Gemma3DecoderLayer(SandwichLayer, gemma3.Gemma3DecoderLayer):  # type: ignore[misc, no-untyped-call]
    """Queries and keys are normed; the model passes cos and sin of the rope that layers of this type have."""

    def __init__(self, config: Gemma3TextConfig, layer_idx: int) -> None:
        self._build(config, layer_idx, qk_norm=True)


class GemmaRotaryEmbedding(Float32Rotary, gemma.GemmaRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""


class Gemma2RotaryEmbedding(Float32Rotary, gemma2.Gemma2RotaryEmbedding):
    """The same for Gemma 2."""


class Gemma3RotaryEmbedding(Float32Rotary, gemma3.Gemma3RotaryEmbedding):
    """The same for Gemma 3: a table for each type of layer."""
