"""What cases of decoders have in common: small sizes, sizes for a GPU, and what their shared mapping refuses."""

from __future__ import annotations

from typing import Any

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
