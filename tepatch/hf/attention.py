"""The attention implementation "tepatch": which masks Hugging Face builds for a patched model's layers.

Hugging Face asks the implementation that ``config._attn_implementation`` names. For "sdpa" it builds a boolean mask of
queries times keys, from which no fused kernel could tell padding from anything else. Ours says the same in one
number a key: which sequence it belongs to (``tepatch.te.sequences``), or nothing where attention is plainly causal.

A stock attention module in the same model, such as that of a vision tower, computes with torch's SDPA. What SDPA can
not compute goes to the eager attention that transformers has in the module's own file, or is refused: never dropped.

All functions here are called by transformers, by keyword. A keyword that they do not know is an error
(``tepatch.contract``): it may be one that they know by another name.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tepatch.contract import HARMLESS, unknown_keyword
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
    packed_layout,
    plain_mask,
    plain_tokens,
    visible,
)
from tepatch.te.tracing import outside_graphs

NAME = "tepatch"
"""What ``config._attn_implementation`` of a patched model says."""

_LIBRARY = f"transformers {transformers.__version__}"
_MASK_OPTIONS = (
    *("allow_is_causal_skip", "allow_is_bidirectional_skip"),  # whether "sdpa" may give None: ours decides by itself
    *("local_size", "config", "dtype", "use_vmap", "device"),
)
"""Keywords of mask functions that say nothing of the rule. The window in ``local_size`` is one that layers know."""
_PLAIN = ("input_ids", "inputs_embeds", *HARMLESS)
"""Arguments of a base model with which a batch is rows of tokens and nothing else."""
_TOLD = ("position_ids", *HARMLESS)
"""Keywords of attention functions that say nothing which the mask does not say."""
_STARTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

_logger = logging.getLogger("tepatch")


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
    known, which is told once) the boolean ``[b, 1, q_length, kv_length]`` of "sdpa". Raises ``UnsupportedError`` for
    an ``attention_mask`` that is not ``[b, tokens]``, and for a keyword that is not known.
    """
    _refuse_unknown(kwargs, _MASK_OPTIONS, "the mask function of tepatch")
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
    if packed is None:
        _tell_unknown(mask_function)
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
        # Of the rule's own numbers only counts which are equal.
        numbers[:, :written] = torch.unique(packed[0], return_inverse=True)[1] + FIRST if packed else FIRST
        if tokens is not None:
            numbers[:, :written].masked_fill_(~tokens, PADDING)
        return numbers[:, None, None]


def spare_the_question(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of a base model: a plain batch is told to be one.

    With nothing but tokens Hugging Face looks for packed rows in the positions that it has just made
    itself. To read the answer from a GPU stops the host in every step until all work before is done.
    """
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((each for each in given if each is not None), None)
    if len(args) > 1 or any(value is not None and name not in _PLAIN for name, value in kwargs.items()):
        return None
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or torch.compiler.is_compiling():
        return None
    config: Any = module.config
    if getattr(config, "is_causal", True) is False or config._attn_implementation != NAME:
        return None
    return args, {**kwargs, "attention_mask": plain_tokens(tokens.shape[0], tokens.shape[1], tokens.device)}


def mark_eager(model: torch.nn.Module) -> None:
    """Have stock attention modules compute eagerly where their model's class says that it has no SDPA."""
    for each in model.modules():
        if isinstance(each, transformers.PreTrainedModel):  # inner models come later, and decide for themselves
            for module in each.modules():
                if each._supports_sdpa:
                    module.__dict__.pop(_EAGER, None)
                else:
                    module.__dict__[_EAGER] = True


_EAGER = "computes_eagerly"


def attention_of_stock_modules(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention for modules that are not replaced: torch's SDPA, by the same masks.

    Shapes are Hugging Face's: query ``[b, h, q, d]``, key and value ``[b, kv heads, k, d]``; out ``[b, q, h, d]``. What
    SDPA does not take (a cap on scores, sinks), and a class that has no SDPA, goes to the eager attention of the
    module's own file. Raises ``UnsupportedError`` for a keyword that neither takes.
    """
    eager = _eager_attention(module)
    is_eager = module.__dict__.get(_EAGER, False)
    beyond = [name for name in _unknown(kwargs, _OF_SDPA) if not _is_of_module(module, name, kwargs[name])]
    if beyond or is_eager:
        named = inspect.signature(eager).parameters if eager is not None else {}
        if eager is None or not set(beyond) <= set(named):
            raise unknown_keyword(
                ", ".join(name for name in beyond if name not in named) or "attn_implementation",
                f"the attention of {type(module).__name__}, which the patch leaves to transformers,",
                _LIBRARY,
            )
        is_eager = True
    window, is_causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    num_queries, num_keys = query.shape[2], key.shape[2]
    if any(kwargs.get(name) is not None for name in _STARTS):
        attention_mask = _packed_numbers(query, key, attention_mask, kwargs, is_causal=is_causal)
    if attention_mask is not None and (told := direction(attention_mask)) is not None:
        if layout_of(attention_mask, num_queries, num_keys) == Dense(num_keys) and window is None:
            attention_mask, is_causal = None, told
        else:
            attention_mask = visible(attention_mask, num_queries, window)
    has_window = window is not None and num_keys > window
    if attention_mask is None and is_causal and (is_eager or has_window or 1 < num_queries < num_keys):
        # SDPA's own causal mask has no window and begins at the first key, our "no mask" ends at the last.
        numbers = torch.full((1, 1, 1, num_keys), FIRST, dtype=CAUSAL, device=query.device)
        attention_mask = visible(numbers, num_queries, window)
    rest = {name: value for name, value in kwargs.items() if name not in _STARTS}
    if eager is not None and is_eager:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            hidden = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, hidden)
        weighted: tuple[Tensor, Tensor | None] = eager(module, query, key, value, attention_mask, **rest)
        return weighted
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **{**rest, "is_causal": is_causal}
    )
    return out


_NAMED = inspect.signature(sdpa_attention_forward).parameters.values()
_OF_SDPA = (
    *(each.name for each in _NAMED if each.kind == each.POSITIONAL_OR_KEYWORD),
    *("sliding_window", *_TOLD, *_STARTS),
)
"""What SDPA computes, in this version of transformers, and what is said by the mask."""


def _eager_attention(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The function with which transformers computes this module eagerly: every modelling file has one of its own."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _is_of_module(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Whether the eager function reads this from the module itself: its sinks, where the class has them."""
    return name == "s_aux" and module.__dict__.get(_EAGER, False) and value is getattr(module, "sinks", None)


def _packed_numbers(
    query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, is_causal: bool
) -> Tensor:
    """The sequence numbers of packed rows that are told by their starts; with an error if the mask says otherwise."""
    starts, key_starts, *lengths = (kwargs.get(name) for name in _STARTS)
    batch, tokens = query.shape[0], query.shape[2]
    if key.shape[2] != tokens:
        raise UnsupportedError(
            Problem(
                where="cu_seq_lens_q",
                what="packed sequences can not continue from a cache",
                fix="pass no cache, and use_cache=False",
            )
        )
    key_starts = starts if key_starts is None else key_starts
    layout = packed_layout(starts, key_starts, batch * tokens, (lengths[0], lengths[1]), mask)
    sizes = layout.cu_queries.diff()
    numbers = torch.arange(sizes.numel(), device=query.device).repeat_interleave(sizes.to(query.device)) + FIRST
    return numbers.view(batch, 1, 1, tokens).to(CAUSAL if is_causal else BOTH_WAYS)


def _unknown(kwargs: dict[str, Any], known: Iterable[str]) -> list[str]:
    return [name for name, value in kwargs.items() if value is not None and name not in known]


def _refuse_unknown(kwargs: dict[str, Any], known: Iterable[str], called: str) -> None:
    if unknown := _unknown(kwargs, known):
        raise unknown_keyword(unknown[0], called, _LIBRARY)


@functools.cache
def _tell_once(rule: str) -> None:
    _logger.warning(
        "attention is computed with a boolean mask of queries times keys, which is slow: the layers know no other form "
        "of this rule: %s",
        rule,
    )


def _tell_unknown(rule: Callable[..., Any]) -> None:
    """Say once which rule has no fast path: it may be one of transformers' own that has another name by now."""
    names = [
        f"{getattr(leaf, '__module__', '?')}.{getattr(leaf, '__qualname__', repr(leaf))}" for leaf in _leaves(rule)
    ]
    _tell_once(", ".join(names))


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
