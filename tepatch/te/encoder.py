"""Encoder layers that norm after they have added (post-norm), from a Hugging Face config: what BERT's relatives share.

No norm stands before a matrix product here, so that none can be fused with one: the layer is made of ``Linear``
modules, with Q, K and V as one parameter. The activation of the MLP is Hugging Face's own, since Transformer Engine's
GELU is the tanh approximation and BERT's is exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.attention import SelfAttention, normal_init
from tepatch.te.backend import modules
from tepatch.te.layer import AcceleratedLayer


class EncoderLayer(AcceleratedLayer):
    """``y = norm(x + dropout(attention(x)))``, then ``norm(y + dropout(mlp(y)))``; attention goes both ways.

    A plugin's layer derives from it first and from Hugging Face's layer second, and calls ``compose``. Parameters are
    those of ``attention`` (``qkv``, ``proj``), ``fc1`` and ``fc2``; the norms are at BERT's own names for them.
    """

    attention: Any
    output: Any

    def compose(self, config: Any, layer_idx: int) -> None:
        """Make the modules, from the fields that BERT's config has; ``layer_idx`` counts from 0."""
        from transformers.activations import ACT2FN

        te, init_method = modules(), normal_init(config.initializer_range)
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention = SelfAttention(
            hidden_size=hidden,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=hidden // config.num_attention_heads,
            layer_idx=layer_idx,
            norm_eps=config.layer_norm_eps,
            normalization=None,
            qkv_bias=True,
            proj_bias=True,
            dropout=config.attention_probs_dropout_prob,
            is_causal=False,
            init_std=config.initializer_range,
        )
        self.attention.output = nn.Module()
        self.attention.output.LayerNorm = te.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.fc1 = te.Linear(hidden, inner, bias=True, init_method=init_method)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = te.Linear(inner, hidden, bias=True, init_method=init_method)
        self.output = nn.Module()
        self.output.LayerNorm = te.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.mark_as_initialized()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states ``[b, s, hidden]`` to the same; arguments as Hugging Face's models pass them.

        Raises ``UnsupportedError`` for what a decoder has: a cache, or another encoder's hidden states.
        """
        decoders = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "cache": cache,
            "past_key_values": past_key_values,
        }
        if given := [name for name, value in decoders.items() if value is not None]:
            raise UnsupportedError(
                Problem(
                    where=", ".join(given),
                    what="these layers are an encoder's: they have no cache and attend to nothing but their own tokens",
                    fix="leave it out, or load this model with transformers",
                )
            )
        attended = self.attention(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=None,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        hidden_states = self.attention.output.LayerNorm(hidden_states + self.dropout(attended))
        added = self.dropout(self.fc2(self.activation(self.fc1(hidden_states))))
        out: Tensor = self.output.LayerNorm(hidden_states + added)
        return out
