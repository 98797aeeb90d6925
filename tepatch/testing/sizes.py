"""Sizes of configs: what cases of decoders have in common, for a CPU and a GPU, and any model's config made small."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tepatch.testing.cases import rope_tables

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_WIDE: dict[str, Any] = {
    **_SMALL,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
_REFUSED: dict[str, dict[str, Any]] = {
    "activation": {"hidden_act": "gelu"},
    "rope": {"rope_parameters.rope_type": "proportional"},
    "layers": {"num_hidden_layers": 0},
    "groups": {"num_key_value_heads": 3},
    "even_heads": {"head_dim": 15},
    "causal": {"is_causal": False},
    "unquantized": {"quantization_config": {"quant_method": "fp8"}},
}


def small_sizes(**fields: Any) -> dict[str, Any]:
    """Fields of a config for a ``Case``: three layers, 64 wide, heads in groups; with ``fields`` in their place."""
    return {**_SMALL, **fields}


def wide_sizes(**fields: Any) -> dict[str, Any]:
    """The same for ``Case.gpu``: four layers, 512 wide, so that the errors of bfloat16 average out."""
    return {**_WIDE, **fields}


def refusals(*, inside: str = "", **changes: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Entries for ``Case.refuse``: for each requirement of ``tepatch.te:decoder.tepatch.yaml``, by its name, a change.

    ``changes`` are for requirements of the patch's own, in the place of one of these, or None for one that the patch
    drops. ``inside`` is the field that holds the config, such as ``"text_config"``.
    """
    prefix = f"{inside}." if inside else ""
    chosen = [change for change in {**_REFUSED, **changes}.values() if change is not None]
    return [{f"{prefix}{field}": value for field, value in change.items()} for change in chosen]


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a model's config that keeps what is computed and is small: each kind of layer once, 64 wide.

    Heads stay in groups as they were (all alike, all sharing one, or in groups), a window stays one, rope keeps its
    type and factors. ``config`` is that of a model without others inside. One with other fields may stay large.
    """
    out: Any = copy.deepcopy(config)
    layers = _layers_of_each_kind(out)
    heads, shared = out.num_attention_heads, getattr(out, "num_key_value_heads", None)
    width = getattr(out, "head_dim", None)
    is_square = width is None or width * heads == out.hidden_size
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": None if shared is None else 1 if shared == 1 else 4 if shared == heads else 2,
        "head_dim": None if width is None else 16 if is_square else 32,
        "num_hidden_layers": len(layers),
        "sliding_window": 7,
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 96),
        **{name: min(getattr(out, name, None) or 4, 4) for name in _EXPERTS},
        **{name: min(getattr(out, name, None) or 2, 2) for name in ("num_experts_per_tok", "top_k_experts")},
        "vocab_size": 128,
        "pad_token_id": 0,
    }
    head_dim = sizes["head_dim"] or 16
    for name, value in sizes.items():
        if isinstance(getattr(out, name, None), int) and value is not None:
            setattr(out, name, value)
    if hasattr(out, "head_dim") and out.head_dim is None:  # some classes compute it, others fail without
        out.head_dim = head_dim
    for name, ids in vars(out).copy().items():
        if name.endswith("token_id") and ids is not None:
            setattr(out, name, [each % 128 for each in ids] if isinstance(ids, list) else ids % 128)
    _shorten(out, head_dim)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(out, name, [value[index] for index in layers])
    if getattr(out, "mlp_only_layers", None) is not None:
        step, dense = out.decoder_sparse_step, config.mlp_only_layers
        out.mlp_only_layers = [n for n, i in enumerate(layers) if i in dense or (i + 1) % step]
        out.decoder_sparse_step = 1
    if getattr(out, "first_k_dense_replace", None) is not None:
        out.first_k_dense_replace = sum(index < out.first_k_dense_replace for index in layers)
    small: PreTrainedConfig = out
    return small


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _layers_of_each_kind(config: Any) -> list[int]:
    """The first layer of each kind, as far as fields tell them apart; two layers at least."""
    lists = [
        value for value in vars(config).values() if isinstance(value, list) and len(value) == config.num_hidden_layers
    ]
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", None) or 1
    first: dict[Any, int] = {}
    for index in range(config.num_hidden_layers):
        is_dense = (
            index in dense or bool((index + 1) % step) or index < (getattr(config, "first_k_dense_replace", 0) or 0)
        )
        first.setdefault((*(str(value[index]) for value in lists), is_dense), index)
    layers = sorted(first.values())
    return layers if len(layers) > 1 else list(range(min(2, config.num_hidden_layers)))


def _shorten(config: Any, head_dim: int) -> None:
    """Give a config room for few positions, and rope tables for heads of this size."""
    longest = getattr(config, "max_position_embeddings", None)
    original = getattr(config, "original_max_position_embeddings", None)
    tables = [table for table in rope_tables(config).values() if isinstance(table, dict)]
    starts = [start for table in tables if (start := table.get("original_max_position_embeddings"))]
    start = original or (starts[0] if starts else None)
    if longest is not None:
        is_dynamic = any(table.get("rope_type") == "dynamic" for table in tables)
        config.max_position_embeddings = max(round(32 * longest / start), 64) if start else 64 if is_dynamic else 256
    if original is not None:
        config.original_max_position_embeddings = 32
    for table in tables:
        half = (
            int(head_dim * table.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)) // 2
        )
        if table.get("original_max_position_embeddings"):
            table["original_max_position_embeddings"] = 32
        for name in ("short_factor", "long_factor"):
            if (factors := table.get(name)) is not None:
                table[name] = [factors[index * len(factors) // half] for index in range(half)]
        if (sections := table.get("mrope_section")) is not None:
            parts = [max(1, part * half // sum(sections)) for part in sections]
            table["mrope_section"] = [parts[0] + half - sum(parts), *parts[1:]]
