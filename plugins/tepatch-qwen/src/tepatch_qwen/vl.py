"""The text layers of Qwen 3 VL, made of Transformer Engine's modules (or of the reference ones).

They are Qwen 3's. That positions have three axes is the rotary module's affair, and pictures are the model's around it.
"""

from __future__ import annotations

from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp
from tepatch.te.rope import Float32Rotary


class Qwen3VLTextDecoderLayer(DecoderLayer, hf.Qwen3VLTextDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; queries and keys are normed over each head."""

    def __init__(self, config: Qwen3VLTextConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        self.self_attn = SelfAttention(
            **attention_options(config, layer_idx),
            qkv_bias=config.attention_bias,
            proj_bias=config.attention_bias,
            qk_norm=True,
        )
        self.mlp = gated_mlp(config)
        self.mark_as_initialized()


class Qwen3VLTextRotaryEmbedding(Float32Rotary, hf.Qwen3VLTextRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""
