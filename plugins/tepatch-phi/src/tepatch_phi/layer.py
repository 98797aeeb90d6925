"""Phi-3's decoder layer, made of Transformer Engine's modules (or of the reference ones)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Phi3Config
from transformers.models.phi3 import modeling_phi3 as hf

from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp
from tepatch.te.rope import Float32Rotary


class Phi3DecoderLayer(DecoderLayer, hf.Phi3DecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with dropout of what is added."""

    def __init__(self, config: Phi3Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        # One window for all layers: Hugging Face's model does not look at layer_types.
        self.self_attn = SelfAttention(**attention_options(config, layer_idx), window=config.sliding_window)
        self.mlp = gated_mlp(config)
        self.resid_attn_dropout = nn.Dropout(config.resid_pdrop)
        self.resid_mlp_dropout = nn.Dropout(config.resid_pdrop)
        self.mark_as_initialized()

    def after_attention(self, out: Tensor) -> Tensor:
        dropped: Tensor = self.resid_attn_dropout(out)
        return dropped

    def after_mlp(self, out: Tensor) -> Tensor:
        dropped: Tensor = self.resid_mlp_dropout(out)
        return dropped


class Phi3RotaryEmbedding(Float32Rotary, hf.Phi3RotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32; it also changes longrope's factors by length."""
