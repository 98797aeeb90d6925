"""Decoder layers of the common form, from a Hugging Face config: what most families share.

A plugin's layer derives from ``DecoderLayer`` first and from Hugging Face's layer second, and makes two modules: what
it has in common with others is in the two functions here, and what it has not is what one reads in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.attention import gated_activation, normal_init
from tepatch.te.backend import modules
from tepatch.te.layer import AcceleratedLayer

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class DecoderLayer(AcceleratedLayer):
    """``x + attention(x)``, then ``x + mlp(x)``; norms are in the two modules (``self_attn`` and ``mlp``).

    A family that changes what a branch gives before it is added (norms after it, a factor) overrides
    ``after_attention`` and ``after_mlp``.
    """

    self_attn: Any
    mlp: Any

    def after_attention(self, out: Tensor) -> Tensor:
        """What is added for attention's output ``[b, s, hidden]``."""
        return out

    def before_mlp(self, hidden_states: Tensor) -> Tensor:
        """What the MLP is given, ``[b, s, hidden]``: a norm belongs here where ``mlp`` has none inside."""
        return hidden_states

    def after_mlp(self, out: Tensor) -> Tensor:
        """What is added for the MLP's output ``[b, s, hidden]``."""
        return out

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states ``[b, s, hidden]`` to the same; arguments as Hugging Face's models pass them.

        ``cache`` was called ``past_key_values`` before transformers 5.24. Of ``kwargs`` nothing is used: what may be
        in there is what concerns others (``tepatch.contract``).
        """
        attended = self.self_attn(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        hidden_states = hidden_states + self.after_attention(attended)
        return hidden_states + self.after_mlp(self.mlp(self.before_mlp(hidden_states)))


def attention_options(config: Any, layer_idx: int) -> dict[str, Any]:
    """Arguments of ``SelfAttention`` from the fields that most configs have; what differs is replaced in the dict."""
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "layer_idx": layer_idx,
        "norm_eps": config.rms_norm_eps,
        "dropout": config.attention_dropout or 0.0,
        "init_std": config.initializer_range,
    }


def window_of(config: Any, layer_idx: int) -> int | None:
    """How many keys a query of this layer sees, itself counted; None for all.

    For families whose layers have windows one by one: ``config.layer_types`` says which have the one of
    ``config.sliding_window``; without it all have. Raises ``UnsupportedError`` for another type.
    """
    types = getattr(config, "layer_types", None)
    window: int | None = config.sliding_window
    kind = "sliding_attention" if types is None else types[layer_idx]
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedError(
            Problem(
                where=f"config.layer_types[{layer_idx}]",
                what="this layer knows attention to everything before a token, or to a window of it",
                expected="'full_attention' or 'sliding_attention'",
                found=repr(kind),
            )
        )
    return window if kind == "sliding_attention" else None


def gated_mlp(
    config: Any, *, activation: str | None = None, bias: bool = False, zero_centered_gamma: bool = False
) -> nn.Module:
    """An RMSNorm and a gated MLP in one module; ``activation`` is Hugging Face's name (default: ``hidden_act``)."""
    init_method = normal_init(config.initializer_range)
    return modules().LayerNormMLP(
        config.hidden_size,
        config.intermediate_size,
        eps=config.rms_norm_eps,
        bias=bias,
        normalization="RMSNorm",
        zero_centered_gamma=zero_centered_gamma,
        activation=gated_activation(config.hidden_act if activation is None else activation),
        init_method=init_method,
        output_layer_init_method=init_method,
    )
