"""The attention implementation "tepatch": which masks Hugging Face builds for a patched model's layers.

Hugging Face asks the implementation that ``config._attn_implementation`` names. For "sdpa" it builds a boolean mask of
queries times keys, from which no fused kernel could tell padding from anything else. Ours says the same in one
number a key: which sequence it belongs to (``tepatch.te.sequences``), or nothing where attention is plainly causal.

A stock attention module in the same model, such as that of a vision tower, computes with torch's SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.sequences import (
    BOTH_WAYS,
    CAUSAL,
    EMPTY,
    FIRST,
    PADDING,
    Dense,
    direction,
    is_plain,
    layout_of,
    plain_mask,
    plain_tokens,
    visible,
)
from tepatch.te.tracing import outside_graphs

NAME = "tepatch"
"""What ``config._attn_implementation`` of a patched model says."""


@outside_graphs
def mask_for_layers(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that layers get, for a batch of which Hugging Face tells the sizes and the rule.

    None if every token sees all before it and nobody has said so; sequence numbers ``[b, 1, 1, kv_length]``, if there
    is a mask, packing, or room left in a cache (int32), or every token sees all (int64); else (a rule that is not
    known) the boolean ``[b, 1, q_length, kv_length]`` of "sdpa". Raises ``UnsupportedError`` for an
    ``attention_mask`` that is not ``[b, tokens]``.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="no mask of layers can be made of this",
                expected="[batch, tokens], or [batch, 1 or heads, queries, keys]",
                found=str(list(attention_mask.shape)),
            )
        )
    if attention_mask is not None and attention_mask.shape[0] not in (1, batch_size):
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="the mask is for another batch",
                expected=f"{batch_size} rows",
                found=str(list(attention_mask.shape)),
            )
        )
    packed, is_causal = _packing(mask_function)
    start = int(kv_offset)
    written = int(q_offset) + q_length - start
    if packed is None or not q_length <= written <= kv_length:
        options: dict[str, Any] = {**kwargs, "q_offset": q_offset, "kv_offset": kv_offset}
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        out: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, **options
        )
        return out
    is_told = attention_mask is not None
    if attention_mask is not None and attention_mask.shape[1] < start + written:
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="the mask does not say which of all tokens so far are padding",
                expected=f"at least {start + written} columns: those of the cache, and the new ones",
                found=str(list(attention_mask.shape)),
            )
        )
    device = torch.device(kwargs.get("device", "cpu")) if attention_mask is None else attention_mask.device
    # What is made here is remembered as long as it is not written to, which tensors of inference mode do not tell.
    with torch.inference_mode(False), torch.no_grad():
        tokens = None
        if attention_mask is not None and not is_plain(attention_mask):
            tokens = attention_mask[:, start : start + written] != 0
            if bool(tokens.all()):
                tokens = None
        if tokens is None and not packed and written == kv_length:
            # Told that all are tokens, layers need not look at positions; and must not, as the stock model's do not.
            if is_causal and not is_told:
                return None
            return plain_mask(batch_size, kv_length, device, is_causal=is_causal)
        kind = CAUSAL if is_causal else BOTH_WAYS
        numbers = torch.full((batch_size, kv_length), EMPTY, dtype=kind, device=device)
        numbers[:, :written] = packed[0] + FIRST if packed else FIRST
        if tokens is not None:
            numbers[:, :written].masked_fill_(~tokens, PADDING)
        return numbers[:, None, None]


def spare_the_question(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of a base model: a plain batch is told to be one.

    Without a mask, positions and a cache Hugging Face looks for packed rows in the positions that it has just made
    itself. To read the answer from a GPU stops the host in every step until all work before is done.
    """
    is_plain = len(args) <= 1 and not any(kwargs.get(name) is not None for name in _NOT_PLAIN)
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((each for each in given if each is not None), None)
    if not is_plain or not isinstance(tokens, Tensor) or tokens.dim() < 2 or torch.compiler.is_compiling():
        return None
    config: Any = module.config
    if getattr(config, "is_causal", True) is False or config._attn_implementation != NAME:
        return None
    return args, {**kwargs, "attention_mask": plain_tokens(tokens.shape[0], tokens.shape[1], tokens.device)}


_NOT_PLAIN = ("attention_mask", "position_ids", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k")


def attention_of_stock_modules(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for modules that are not replaced: torch's SDPA, by the same masks.

    Shapes are Hugging Face's: query ``[b, h, q, d]``, key and value ``[b, kv heads, k, d]``; out ``[b, q, h, d]``.
    """
    window = kwargs.get("sliding_window")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and (told := direction(attention_mask)) is not None:
        if window is None and layout_of(attention_mask, query.shape[2], key.shape[2]) == Dense(key.shape[2]):
            attention_mask, is_causal = None, told
        else:
            attention_mask = visible(attention_mask, query.shape[2], window)
    num_queries, num_keys = query.shape[2], key.shape[2]
    has_window = window is not None and num_keys > window
    if attention_mask is None and is_causal and (has_window or 1 < num_queries < num_keys):
        # SDPA's own causal mask has no window and begins at the first key, our "no mask" ends at the last.
        numbers = torch.full((1, 1, 1, num_keys), FIRST, dtype=CAUSAL, device=query.device)
        attention_mask = visible(numbers, num_queries, window)
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **{**kwargs, "is_causal": is_causal}
    )
    return out


def _packing(rule: Callable[..., Any]) -> tuple[tuple[Tensor, ...] | None, bool]:
    """The sequence numbers ``[b, tokens]`` within which ``rule`` lets tokens see each other; () for one sequence.

    And whether it is causal. None for any other rule. Hugging Face composes rules of closures. Those that it makes for
    causal attention (also with a window, which a layer knows itself), for packed rows, and for attention both ways are
    recognised by name; nothing else is.
    """
    found: list[Tensor] = []
    leaves = list(_leaves(rule))
    names = [_name(leaf) for leaf in leaves]
    if names == ["bidirectional_mask_function"]:
        return (), False
    for name, leaf in zip(names, leaves, strict=True):
        if name == "packed_sequence_mask_function.<locals>.inner_mask":
            found.append(_captured(leaf, "packed_sequence_mask"))
        elif name not in ("causal_mask_function", "sliding_window_overlay.<locals>.inner_mask"):
            return None, False
    is_known = all(isinstance(numbers, Tensor) for numbers in found) and len(found) <= 1
    return (tuple(found) if is_known and "causal_mask_function" in names else None), True


def _leaves(rule: Any) -> Iterator[Any]:
    """The rules that ``rule`` is the intersection of."""
    name = _name(rule)
    if name == "and_masks.<locals>.and_mask":
        for each in _captured(rule, "mask_functions") or (None,):
            yield from _leaves(each)
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Within a packed sequence positions grow by one, so distances and order are those of the places.
        yield from _leaves(_captured(rule, "mask_function"))
    else:
        yield rule


def _name(function: Any) -> str:
    """The name of one of Hugging Face's mask functions; empty for a function of somebody else."""
    is_theirs = getattr(function, "__module__", None) == "transformers.masking_utils"
    return getattr(function, "__qualname__", "") if is_theirs else ""


def _captured(function: Callable[..., Any], name: str) -> Any:
    """What a closure holds under this name, None if it has none."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {key: cell.cell_contents for key, cell in zip(names, cells, strict=True)}.get(name)


AttentionInterface.register(NAME, attention_of_stock_modules)
AttentionMaskInterface.register(NAME, mask_for_layers)
