"""The decoder layers of Qwen 2 and 3, made of Transformer Engine's modules (or of the reference ones)."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2Config, Qwen3Config
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp, window_of
from tepatch.te.rope import Float32Rotary


class Qwen2DecoderLayer(DecoderLayer, modeling_qwen2.Qwen2DecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; biases in Q, K and V, and nowhere else."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        self.self_attn = SelfAttention(
            **attention_options(config, layer_idx), qkv_bias=True, window=window_of(config, layer_idx)
        )
        self.mlp = gated_mlp(config)
        self.mark_as_initialized()


class Qwen3DecoderLayer(DecoderLayer, modeling_qwen3.Qwen3DecoderLayer):  # type: ignore[no-untyped-call]
    """The same with queries and keys normed over each head, and biases only if the config asks for them."""

    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = SelfAttention(
            **attention_options(config, layer_idx),
            qkv_bias=config.attention_bias,
            proj_bias=config.attention_bias,
            qk_norm=True,
            window=window_of(config, layer_idx),
        )
        self.mlp = gated_mlp(config)
        self.mark_as_initialized()


class Qwen2RotaryEmbedding(Float32Rotary, modeling_qwen2.Qwen2RotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""


class Qwen3RotaryEmbedding(Float32Rotary, modeling_qwen3.Qwen3RotaryEmbedding):
    """The same for Qwen 3."""
