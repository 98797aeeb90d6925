"""Llama's decoder layer, made of Transformer Engine's modules (or of the reference ones).

The class is a real ``LlamaDecoderLayer`` by name and by inheritance: output recording, gradient checkpointing,
device maps and FSDP wrapping look for exactly that. Its parameters are its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as hf

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import DecoderLayer, attention_options, gated_mlp
from tepatch.te.rope import Float32Rotary

standalone: ContextVar[bool] = ContextVar("standalone", default=False)
"""Whether layers are built outside tepatch's loader, by ``replace_decoder``."""


class LlamaDecoderLayer(DecoderLayer, hf.LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with norms fused into the matrix products."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        if standalone.get() and torch.get_default_device().type == "meta":
            raise UnsupportedError(
                Problem(
                    where="replace_decoder",
                    what="from_pretrained can not fill these layers: it would leave them without values",
                    fix="use TELlamaForCausalLM.from_pretrained_local(path), or tepatch.load('llama', path)",
                )
            )
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        bias: dict[str, Any] = {"qkv_bias": config.attention_bias, "proj_bias": config.attention_bias}
        self.self_attn = SelfAttention(**attention_options(config, layer_idx), **bias)
        self.mlp = gated_mlp(config, bias=config.mlp_bias)
        self.mark_as_initialized()


class LlamaRotaryEmbedding(Float32Rotary, hf.LlamaRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""
