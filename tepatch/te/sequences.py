"""Which tokens of a batch belong together: what a mask means, found once and told in the terms of the backend.

A mask reaches every layer of a model as the same tensor. Here it is looked at once, and the answer kept as long as
the tensor lives: fused attention takes lengths instead of masks, and to read them from a GPU stops the host.

The masks of ``tepatch.hf.attention`` are sequence numbers ``[b, 1, 1, keys]``: tokens with the same number in the same
row belong together; ``PADDING`` is a token that nothing belongs to, ``EMPTY`` a slot of a cache that has not been
written. The queries are the last of the slots that have been written. Within a sequence attention is causal if the
numbers are int32, and goes both ways if they are int64.

Nothing sees padding, but padding sees the tokens before it, of the sequence that the last of them is in. That is read
where a token follows, which is predicted there: such padding is computed. What comes out for other padding is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.tracing import outside_graphs

T = TypeVar("T")

MOST_MADE = 8
"""Shapes of plain masks that are kept."""

EMPTY, PADDING, FIRST = -1, 0, 1
"""Numbers in a mask of sequence numbers: an unwritten slot, padding, the first sequence of a row."""


CAUSAL, BOTH_WAYS = torch.int32, torch.int64
"""The dtype of sequence numbers says whether a token sees those before it, or all of its sequence."""


@dataclass(frozen=True, slots=True)
class Dense:
    """The queries are the last of the first ``num_keys`` keys of their row, and see all before them."""

    num_keys: int


@dataclass(frozen=True, slots=True)
class Varlen:
    """Sequences of different lengths, one behind the other; in each the queries are the last of its keys."""

    queries: Tensor | None
    """Which rows of ``[b * queries]`` are in a sequence, int64; None: all, in this order."""
    keys: Tensor | None
    """Which rows of ``[b * keys]`` are in a sequence, int64; None: all, in this order."""
    cu_queries: Tensor
    """int32 ``[n + 1]``: sequence i has the query rows from ``cu_queries[i]`` to ``cu_queries[i + 1]``."""
    cu_keys: Tensor
    """The same of the keys; the same tensor where every sequence has as many queries as keys."""
    max_queries: int
    max_keys: int
    holes: Holes | None = None
    """Padding that sees tokens and that a token of theirs follows."""

    @property
    def can_be_packed(self) -> bool:
        """Whether nothing but tokens has to be computed, of a batch that has padding."""
        return self.queries is not None and self.max_queries > 0 and self.holes is None


@dataclass(frozen=True, slots=True)
class Holes:
    """Queries at padding, which are in no sequence: as many for each row, and some of them to be thrown away."""

    queries: Tensor
    """Their places in their rows, int64 ``[b, n]``."""
    visible: Tensor
    """boolean ``[b, 1, n, keys]``, True where to attend."""
    kept: Tensor
    """Which of the ``b * n`` to keep, int64."""
    rows: Tensor
    """Which rows of ``[b * queries]`` those are, int64."""


@dataclass(frozen=True, slots=True)
class Masked:
    """Anything else: boolean ``[b, 1 or heads, queries, keys]``, True where to attend."""

    visible: Tensor


Layout = Dense | Varlen | Masked

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By a mask (or what else tells sequences): its version, and what it was found to mean. No answer holds the mask."""
_plain: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The masks that ``plain_mask`` and ``plain_tokens`` have made."""
_made: dict[Any, Tensor] = {}


@outside_graphs
def layout_of(mask: Tensor | None, num_queries: int, num_keys: int, *, window: int | None = None) -> Layout:
    """Say what a mask means for ``num_queries`` queries and ``num_keys`` keys (a cache's empty slots counted).

    ``mask`` is one of:

    - None: the queries are the last of the keys;
    - int32 or int64 ``[b, 1, 1, num_keys]``: sequence numbers (see the module), any that are larger than 0;
    - boolean or integer ``[b, num_keys]``: which keys are tokens (the rest is padding), as for flash attention;
    - boolean ``[b, 1 or heads, queries, keys or 1]``: True where to attend;
    - float of that shape with nothing but zero (attend) and minus infinity or the dtype's minimum (do not).

    ``window`` is how many keys a query sees, itself counted; it is applied to all but the last two.

    Raises ``UnsupportedError`` for a mask of another kind.
    """
    if mask is None:
        return Dense(num_keys)
    if not isinstance(mask, Tensor):
        raise _unknown(type(mask).__name__, num_keys)
    if is_plain(mask):
        return Dense(num_keys)
    if mask.dim() == 4 and mask.dtype == torch.bool:
        return _masked(mask, num_queries, num_keys)
    key = (num_queries, num_keys, window)
    return remembered(mask, key, lambda: _read(mask, num_queries, num_keys, window))


def plain_tokens(batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """A mask ``[batch, num_tokens]`` of nothing but tokens: True everywhere, and known to be without a look at it.

    It is shared, and must not be written to; the same holds for ``plain_mask``.
    """
    return _make_plain((batch, num_tokens), True, torch.bool, device)


def plain_mask(batch: int, num_tokens: int, device: torch.device, *, is_causal: bool = True) -> Tensor:
    """The sequence numbers ``[batch, 1, 1, num_tokens]`` of rows that are one sequence each, known in the same way."""
    return _make_plain((batch, 1, 1, num_tokens), FIRST, CAUSAL if is_causal else BOTH_WAYS, device)


def direction(mask: Tensor | None) -> bool | None:
    """Whether sequence numbers are for causal attention; None for a mask that does not tell."""
    if mask is None or mask.dim() != 4 or mask.dtype not in (CAUSAL, BOTH_WAYS):
        return None
    return mask.dtype == CAUSAL


def plain_on(mask: Tensor, device: torch.device) -> Tensor:
    """What a plain mask is on another device."""
    value = True if mask.dtype == torch.bool else FIRST
    return _make_plain(tuple(mask.shape), value, mask.dtype, device)


def is_plain(mask: Tensor) -> bool:
    """Whether a mask is one of ``plain_tokens`` or ``plain_mask``."""
    return mask in _plain


@outside_graphs
def packed_layout(
    cu_queries: Any, cu_keys: Any, num_tokens: int, lengths: tuple[Any, Any], mask: Tensor | None = None
) -> Varlen:
    """The layout of ``num_tokens`` packed tokens whose sequences begin at ``cu_queries``, one behind the other.

    ``cu_queries`` and ``cu_keys`` are int32 ``[n + 1]`` as Hugging Face's flattening collator makes them, with the
    length of the longest sequence (``lengths``; None: looked up). ``mask`` is what the layer was given besides. Raises
    ``UnsupportedError`` if they do not fit, or if the mask says anything else.
    """
    for name, starts in (("cu_seq_lens_q", cu_queries), ("cu_seq_lens_k", cu_keys)):
        is_known = isinstance(starts, Tensor) and starts.dim() == 1 and not starts.is_floating_point()
        if not is_known:
            found = f"{_named(starts.dtype)} {list(starts.shape)}" if isinstance(starts, Tensor) else repr(starts)[:60]
            raise UnsupportedError(
                Problem(where=name, what="this can not be where sequences begin", expected="int32 [n + 1]", found=found)
            )
    ends: list[int] = remembered(cu_queries, "ends", cu_queries.tolist)
    key_ends: list[int] = remembered(cu_keys, "ends", cu_keys.tolist)
    steps = [end - start for start, end in pairwise(ends)]
    if not steps or ends[0] != 0 or ends[-1] != num_tokens or min(steps) < 1 or key_ends != ends:
        raise UnsupportedError(
            Problem(
                where="cu_seq_lens_q",
                what="these are not the places where the packed sequences begin and end",
                expected=f"growing numbers from 0 to {num_tokens} (all tokens of the batch), the same in cu_seq_lens_k",
                found=f"{ends[:8]} and {key_ends[:8]}",
                fix="pack with transformers' DataCollatorWithFlattening(return_flash_attn_kwargs=True)",
            )
        )
    longest = max(steps)
    if wrong := {length for length in lengths if length is not None and length != longest}:
        raise UnsupportedError(
            Problem(
                where="max_length_q",
                what="this is not the length of the longest packed sequence",
                expected=str(longest),
                found=", ".join(map(str, sorted(wrong))),
            )
        )
    if mask is not None and not remembered(mask, ("says", tuple(ends)), lambda: _says(mask, ends, num_tokens)):
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="the mask and cu_seq_lens_q say different things",
                fix="pass one of them: packed sequences need no mask",
            )
        )
    own: Tensor = remembered(cu_queries, "starts", lambda: cu_queries.to(torch.int32, copy=True))
    return Varlen(None, None, own, own, longest, longest)


@outside_graphs
def layout_of_positions(position_ids: Tensor, batch: int, num_tokens: int) -> Layout:
    """The layout that positions ``[b or 1, num_tokens]`` tell where no mask does.

    Positions that grow by one and begin again at 0 are packed sequences, as in Hugging Face's own detection; which
    does not look at all when there is a cache, even a new one, and lets packed sequences see each other.
    """

    def read() -> Layout:
        restarts = position_ids[:, 1:] == 0
        if not bool(((position_ids.diff(dim=-1) == 1) | restarts).all() & restarts.any()):
            return Dense(num_tokens)
        numbers = torch.nn.functional.pad(restarts.cumsum(-1), (1, 0)) + FIRST
        return _read_numbers(numbers.to(torch.int32).expand(batch, -1)[:, None, None], num_tokens, None)

    return remembered(position_ids, (batch, num_tokens), read)


def visible(numbers: Tensor, num_queries: int, window: int | None = None) -> Tensor:
    """The boolean mask ``[b, 1, num_queries, keys]`` (True where to attend) that sequence numbers stand for."""
    slots = numbers[:, 0, 0]
    written = (slots[:1] != EMPTY).sum()  # of every row the same
    places = torch.arange(num_queries, device=slots.device) + (written - num_queries)
    return _visible_at(places.expand(slots.shape[0], -1), numbers, window)


def _visible_at(places: Tensor, numbers: Tensor, window: int | None = None) -> Tensor:
    """``[b, 1, n, keys]``: what the queries at ``places`` ``[b, n]`` see."""
    slots = numbers[:, 0, 0]
    keys = torch.arange(slots.shape[1], device=slots.device)
    asking = _asking(slots).gather(1, places.clamp(min=0))
    distance = places[:, :, None] - keys
    near = distance >= 0 if direction(numbers) else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        near &= distance < window
    return ((asking[:, :, None] == slots[:, None, :]) & (slots[:, None, :] > PADDING) & near)[:, None]


def _asking(slots: Tensor) -> Tensor:
    """``[b, keys]``: the number of the sequence that a query at each place sees; PADDING for one that sees none."""
    places = torch.arange(slots.shape[1], device=slots.device)
    last = torch.where(slots > PADDING, places, -1).cummax(1).values
    return torch.where(last < 0, PADDING, slots.gather(1, last.clamp(min=0)))


def _read(mask: Tensor, num_queries: int, num_keys: int, window: int | None) -> Layout:
    if mask.dim() == 2 and mask.shape[1] == num_keys and not mask.is_floating_point():
        mask = (mask != 0).to(torch.int32)[:, None, None]
    if mask.dim() != 4:
        raise _unknown(f"{_named(mask.dtype)} {list(mask.shape)}", num_keys)
    if mask.dtype in (CAUSAL, BOTH_WAYS) and mask.shape[1:3] == (1, 1) and mask.shape[3] == num_keys:
        return _read_numbers(mask, num_queries, window)
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min
        if bool((hidden | (mask == 0)).all()):
            return _masked(~hidden, num_queries, num_keys)
        raise _unknown(f"{_named(mask.dtype)} with values between zero and the minimum", num_keys)
    raise _unknown(f"{_named(mask.dtype)} {list(mask.shape)}", num_keys)


def _read_numbers(mask: Tensor, num_queries: int, window: int | None) -> Layout:
    slots = mask[:, 0, 0]
    batch, num_keys = slots.shape
    written = _written(slots, num_queries)
    if not bool((slots == PADDING).any() | (slots > FIRST).any()):
        return Dense(written)
    # A number of its own for every sequence of the batch. Theirs may be any: only which are equal counts.
    row = torch.arange(batch, device=slots.device)[:, None]
    ranks = torch.unique(slots, return_inverse=True)[1]
    numbers = torch.where(slots > PADDING, ranks + row * slots.numel(), -1)
    asking = numbers[:, written - num_queries : written].flatten()
    queries = (asking >= 0).nonzero().flatten()
    asking = asking[queries]
    numbers = numbers.flatten()
    keys = (numbers >= 0).nonzero().flatten()
    # Sequences that a cache holds and that nothing asks about any more are left out.
    keys = keys[torch.isin(numbers[keys], asking)]
    held = numbers[keys]
    if window is not None and bool(((keys[1:] - keys[:-1] != 1) & (held[1:] == held[:-1])).any()):
        return Masked(visible(mask, num_queries, window))  # a window counts the padding between tokens, lengths do not
    query_lengths, key_lengths = (torch.unique_consecutive(each, return_counts=True)[1] for each in (asking, held))
    if torch.unique(held).numel() != key_lengths.numel():
        return Masked(visible(mask, num_queries, window))  # a sequence goes on behind another one
    cu_queries = _cumulated(query_lengths)
    is_square = query_lengths.equal(key_lengths)
    return Varlen(
        queries=None if queries.numel() == batch * num_queries else queries,
        keys=None if keys.numel() == batch * num_keys else keys,
        cu_queries=cu_queries,
        cu_keys=cu_queries if is_square else _cumulated(key_lengths),
        max_queries=int(query_lengths.max()) if query_lengths.numel() else 0,
        max_keys=int(key_lengths.max()) if key_lengths.numel() else 0,
        holes=_holes(mask, written - num_queries, written) if direction(mask) else None,
    )


def _written(slots: Tensor, num_queries: int) -> int:
    """How many of the slots ``[b, keys]`` have been written; raises if that, or a number, makes no sense."""
    empty = slots == EMPTY
    written = int((~empty[:1]).sum()) if slots.shape[0] else num_queries
    behind = torch.arange(slots.shape[1], device=slots.device) >= written
    if bool(((slots < EMPTY) | (empty != behind)).any()) or written < num_queries:
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="these are no sequence numbers",
                expected=f"{FIRST} or more at tokens, {PADDING} at padding, and {EMPTY} at the empty slots of a cache: "
                f"the last ones, as many in every row, and behind all {num_queries} queries",
                found=f"{torch.unique(slots).tolist()[:8]}, with {written} slots that are not {EMPTY} in the first row",
                fix=f"number padding {PADDING}, and sequences from {FIRST} on",
            )
        )
    return written


def _holes(mask: Tensor, first: int, written: int) -> Holes | None:
    """The padding from ``first`` on that tokens stand before, and the next of their sequence directly behind."""
    slots = mask[:, 0, 0]
    asking, following = _asking(slots)[:, first : written - 1], slots[:, first + 1 : written]
    found = (slots[:, first : written - 1] == PADDING) & (following > PADDING) & (asking == following)
    kept = found.nonzero()
    if not kept.numel():
        return None
    # Those of a row come first; rows with fewer of them have other queries behind.
    most = int(found.sum(1).max())
    queries = found.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    order = found.gather(1, queries).flatten().nonzero().flatten()
    return Holes(
        queries=queries,
        visible=_visible_at(queries + first, mask),
        kept=order,
        rows=kept[:, 0] * (written - first) + kept[:, 1],
    )


def _says(mask: Tensor, ends: list[int], num_tokens: int) -> bool:
    """Whether a mask tells the packed sequences that end there, or nothing."""
    if is_plain(mask):
        return True
    if mask.dtype != torch.int32 or mask.dim() != 4:
        return False
    layout = _read_numbers(mask, mask.shape[-1], None)
    if isinstance(layout, Varlen):
        return layout.queries is None and layout.cu_queries.tolist() == ends
    return ends == list(range(0, num_tokens + 1, mask.shape[-1]))


def _masked(mask: Tensor, num_queries: int, num_keys: int) -> Masked:
    if mask.shape[2] not in (1, num_queries) or mask.shape[3] not in (1, num_keys):
        raise _unknown(f"{_named(mask.dtype)} {list(mask.shape)}", num_keys)
    return Masked(mask)


def remembered(tensor: Tensor, key: Any, compute: Callable[[], T]) -> T:
    """``compute()``, once for as long as ``tensor`` lives and is not written to.

    A tensor of inference mode does not tell when it is written to, and is looked at again. Nothing that is kept is
    of inference mode itself: a later training step may need it.
    """
    with torch.inference_mode(False), torch.no_grad():
        if tensor.is_inference():
            return compute()
        version, answers = _known.get(tensor, (None, {}))  # type: ignore[no-untyped-call]
        if version != tensor._version:
            answers = {}
            _known[tensor] = (tensor._version, answers)
        if key not in answers:
            answers[key] = compute()
        out: T = answers[key]
        return out


def _make_plain(shape: tuple[int, ...], value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (shape, dtype, device)
    mask = _made.get(key)
    if mask is None:
        with torch.inference_mode(False):
            mask = torch.full(shape, value, dtype=dtype, device=device)
        _plain[mask] = True
        if type(mask) is Tensor:  # not one that only stands for a tensor while a graph is traced
            while len(_made) >= MOST_MADE:
                del _made[next(iter(_made))]
            _made[key] = mask
    return mask


def _cumulated(lengths: Tensor) -> Tensor:
    out = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=out[1:])
    return out


def _unknown(found: str, num_keys: int) -> UnsupportedError:
    return UnsupportedError(
        Problem(
            where="attention_mask",
            what="the layer does not know this form of mask",
            expected=f"[batch, {num_keys} keys], True at tokens; or [batch, 1 or heads, queries, {num_keys} keys], "
            "boolean with True where to attend, or float with 0 where to attend and the dtype's minimum elsewhere",
            found=found,
            fix="leave attn_implementation as tepatch sets it, and pass masks of these forms",
        )
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
