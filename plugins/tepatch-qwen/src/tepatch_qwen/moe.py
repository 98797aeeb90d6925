"""Qwen 3's decoder layer with experts, made of Transformer Engine's modules (or of the reference ones)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from tepatch.te.attention import SelfAttention
from tepatch.te.backend import modules
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp
from tepatch.te.experts import MixtureOfExperts, mixture_of_experts
from tepatch.te.rope import Float32Rotary


class Qwen3MoeDecoderLayer(DecoderLayer, hf.Qwen3MoeDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + experts(norm(x))``; the config makes some layers dense."""

    post_attention_layernorm: Any

    def __init__(self, config: Qwen3MoeConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        # One window for all layers: Hugging Face's model does not look at layer_types.
        self.self_attn = SelfAttention(
            **attention_options(config, layer_idx),
            qkv_bias=config.attention_bias,
            proj_bias=config.attention_bias,
            window=config.sliding_window,
            qk_norm=True,
        )
        is_turn = config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
        if is_turn and layer_idx not in (config.mlp_only_layers or ()):
            self.post_attention_layernorm = modules().RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = mixture_of_experts(
                config,
                hf.Qwen3MoeTopKRouter(config),  # type: ignore[no-untyped-call]
                num_experts=config.num_experts,
                intermediate_size=config.moe_intermediate_size,
            )
        else:
            self.mlp = gated_mlp(config)
        self.mark_as_initialized()

    def before_mlp(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self.mlp, MixtureOfExperts):
            return hidden_states  # a dense layer's MLP has its norm inside
        normed: Tensor = self.post_attention_layernorm(hidden_states)
        return normed


class Qwen3MoeRotaryEmbedding(Float32Rotary, hf.Qwen3MoeRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""
