"""Mistral's and Ministral's decoder layers, made of Transformer Engine's modules (or of the reference ones).

They compute the same. They differ in where the window comes from: Mistral has one for all layers, Ministral's config
says which layers have it.
"""

from __future__ import annotations

from torch import nn
from transformers import MinistralConfig, MistralConfig
from transformers.models.ministral import modeling_ministral
from transformers.models.mistral import modeling_mistral

from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp, window_of
from tepatch.te.rope import Float32Rotary


class _DecoderLayer(DecoderLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; attention within a window if the layer has one."""

    def __init__(self, config: MistralConfig | MinistralConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        self.self_attn = SelfAttention(**attention_options(config, layer_idx), window=window_of(config, layer_idx))
        self.mlp = gated_mlp(config)
        self.mark_as_initialized()


class MistralDecoderLayer(_DecoderLayer, modeling_mistral.MistralDecoderLayer):  # type: ignore[no-untyped-call]
    """A layer of Mistral: the window is ``sliding_window``, None for no window."""


class MinistralDecoderLayer(_DecoderLayer, modeling_ministral.MinistralDecoderLayer):  # type: ignore[no-untyped-call]
    """A layer of Ministral: the window is for layers that ``layer_types`` calls "sliding_attention"."""


class MistralRotaryEmbedding(Float32Rotary, modeling_mistral.MistralRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""


class MinistralRotaryEmbedding(Float32Rotary, modeling_ministral.MinistralRotaryEmbedding):
    """The same for Ministral."""
