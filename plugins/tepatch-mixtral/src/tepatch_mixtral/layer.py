"""Mixtral's decoder layer, made of Transformer Engine's modules (or of the reference ones)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as hf

from tepatch.te.attention import SelfAttention
from tepatch.te.backend import modules
from tepatch.te.decoder import DecoderLayer, attention_options
from tepatch.te.experts import mixture_of_experts
from tepatch.te.rope import Float32Rotary


class MixtralDecoderLayer(DecoderLayer, hf.MixtralDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + experts(norm(x))``; a window for all layers where the config has one."""

    post_attention_layernorm: Any

    def __init__(self, config: MixtralConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        # One window for all layers: Hugging Face's model does not look at layer_types.
        self.self_attn = SelfAttention(**attention_options(config, layer_idx), window=config.sliding_window)
        self.post_attention_layernorm = modules().RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mixture_of_experts(
            config,
            hf.MixtralTopKRouter(config),  # type: ignore[no-untyped-call]
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            jitter_noise=config.router_jitter_noise,
        )
        self.mark_as_initialized()

    def before_mlp(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.post_attention_layernorm(hidden_states)
        return normed


class MixtralRotaryEmbedding(Float32Rotary, hf.MixtralRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""
