"""What a mask means: sequence numbers, padding masks and boolean masks, against a mask computed pair by pair."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from rounding import assert_close, scores
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tepatch.errors import UnsupportedError
from tepatch.te import resolve, rope
from tepatch.te.attention import attend
from tepatch.te.devices import brought
from tepatch.te.sequences import (
    EMPTY,
    PADDING,
    Dense,
    Masked,
    Varlen,
    is_plain,
    layout_of,
    layout_of_positions,
    packed_layout,
    plain_mask,
    plain_tokens,
    visible,
)

HEADS, GROUPS, CHANNELS = 4, 2, 8


def numbers(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)[:, None, None]


def pair_by_pair(mask: Tensor, num_queries: int, window: int | None) -> Tensor:
    """[b, 1, queries, keys]: whether a query sees a key, from the words of the module's documentation."""
    slots = mask[:, 0, 0].tolist()
    out = torch.zeros(len(slots), 1, num_queries, len(slots[0]), dtype=torch.bool)
    for row, each in enumerate(slots):
        written = sum(slot != EMPTY for slot in each)
        for query in range(num_queries):
            place = written - num_queries + query
            asking = next((number for number in reversed(each[: place + 1]) if number > PADDING), PADDING)
            for key in range(place + 1):
                same = each[key] == asking > PADDING
                out[row, 0, query, key] = same and (window is None or place - key < window)
    return out


def read(mask: Tensor, num_queries: int) -> Tensor:
    """[b, queries]: the queries that somebody reads, tokens and what stands before one of the sequence that it sees."""
    slots = mask[:, 0, 0].tolist()
    out = torch.zeros(len(slots), num_queries, dtype=torch.bool)
    for row, each in enumerate(slots):
        first = sum(slot != EMPTY for slot in each) - num_queries
        for query in range(num_queries):
            following = each[first + query + 1] if query + 1 < num_queries else PADDING
            asking = next((number for number in reversed(each[: first + query + 1]) if number > PADDING), PADDING)
            out[row, query] = each[first + query] > PADDING or following == asking > PADDING
    return out


LEFT = numbers([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1])
RIGHT = LEFT.flip(-1)
HOLES = numbers([0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 0, 1])
UNLIKE = numbers([1, 0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0])
BETWEEN = numbers([1, 1, 0, 2, 0, 2, 2, 0], [3, 0, 0, 3, 3, 0, 1, 1])
ANOTHER = numbers([7, 7, 7, 1, 1, 1, 3, 3], [1, 1, 1, 7, 7, 7, 3, 3], [9, 9, 9, 9, 9, 9, 9, 9])
HUGE = numbers([2**31 - 1] * 8, [2**31 - 2, 2**31 - 2, 2**31 - 1, 2**31 - 1, 2**31 - 1, 0, 2**31 - 10, 1])
WOVEN = numbers([1, 2, 1, 2, 1, 2, 1, 2], [3, 3, 3, 0, 5, 3, 5, 5])
PACKED = numbers([1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2, 2, 2])
STATIC = numbers([0, 1, 1, 1, 1, -1, -1, -1], [1, 1, 1, 1, 1, -1, -1, -1])
ROOM = numbers([1, 1, 1, 1, 1, -1, -1, -1], [1, 1, 1, 1, 1, -1, -1, -1])
NOTHING = numbers([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0])
FINISHED = numbers([1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1])

every_mask = pytest.mark.parametrize(
    "mask",
    [LEFT, RIGHT, HOLES, UNLIKE, BETWEEN, ANOTHER, HUGE, WOVEN, PACKED, STATIC, ROOM, NOTHING, FINISHED],
    ids=lambda mask: str(mask[0, 0, 0].tolist()),
)
every_window = pytest.mark.parametrize("window", [None, 1, 3])


@every_mask
@every_window
@pytest.mark.parametrize("num_queries", [1, 3, 5])
def test_sequence_numbers_stand_for_the_mask_that_their_documentation_says(
    mask: Tensor, num_queries: int, window: int | None
) -> None:
    assert torch.equal(visible(mask, num_queries, window), pair_by_pair(mask, num_queries, window))


@every_mask
@every_window
@pytest.mark.parametrize("num_queries", [1, 3, 5])
def test_attention_by_a_layout_is_attention_under_the_mask(mask: Tensor, num_queries: int, window: int | None) -> None:
    torch.manual_seed(0)
    batch, num_keys = mask.shape[0], mask.shape[-1]
    query = torch.randn(batch, num_queries, HEADS, CHANNELS, requires_grad=True)
    key, value = (torch.randn(batch, num_keys, GROUPS, CHANNELS, requires_grad=True) for _ in range(2))
    core = resolve("reference").DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    seen = pair_by_pair(mask, num_queries, window)

    inputs = (query, key, value)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)

    layout = layout_of(mask, num_queries, num_keys, window=window)
    out = attend(core, *inputs, layout, window)
    expected = attend(core, *exact, Masked(seen))

    rows = read(mask, num_queries)[:, :, None]  # what comes out at other padding is nobody's
    # Scores, softmax and values; back through weights and softmax to the queries that share a key.
    forth, back = CHANNELS + 2 * num_keys, CHANNELS + num_keys + max(num_keys, num_queries * HEADS // GROUPS)
    condition = scores(query, key, core.softmax_scale)
    assert_close(out * rows, expected * rows, terms=forth, condition=condition, name="out")
    assert isinstance(layout, Masked) or not (out * ~rows).any()
    upstream = torch.randn_like(out) * rows
    options = {"allow_unused": True, "materialize_grads": True}
    # As one vector: that of a query which sees one key is a difference of equal numbers.
    found, wanted = (
        torch.cat(
            [gradient.flatten() for gradient in torch.autograd.grad(result, given, upstream.to(result), **options)]
        )
        for result, given in ((out, inputs), (expected, exact))
    )
    assert_close(found, wanted, terms=forth + back, condition=condition, name="gradients")


@pytest.mark.parametrize(
    ("mask", "num_queries", "kind"),
    [
        (None, 8, Dense(8)),
        (None, 3, Dense(8)),
        (ROOM, 3, Dense(5)),
        (LEFT, 8, Varlen),
        (RIGHT, 8, Varlen),
        (PACKED, 8, Varlen),
        (HOLES, 8, Varlen),
        (STATIC, 1, Varlen),
        (LEFT[:, 0, 0] > 0, 8, Varlen),
        ((LEFT[:, 0, 0] > 0).long(), 8, Varlen),
    ],
)
def test_what_fused_kernels_can_compute_is_not_left_to_a_mask(mask: Any, num_queries: int, kind: Any) -> None:
    layout = layout_of(mask, num_queries, 8)
    assert layout == kind if isinstance(kind, Dense) else isinstance(layout, kind)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mask_means_the_same_however_it_is_numbered(dtype: torch.dtype) -> None:
    most = torch.iinfo(dtype).max
    query = torch.randn(2, 8, HEADS, CHANNELS)
    key, value = (torch.randn(2, 8, GROUPS, CHANNELS) for _ in range(2))
    core = resolve("reference").DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    is_causal = dtype == torch.int32

    def outs(*named: int) -> Tensor:
        rows = [[named[0]] * 3 + [named[1]] * 5, [0] + [named[2]] * 4 + [0] + [named[3]] * 2]
        mask = torch.tensor(rows, dtype=dtype)[:, None, None]
        return attend(core, query, key, value, layout_of(mask, 8, 8), is_causal=is_causal)

    expected = outs(1, 2, 1, 2)
    for named in ((2, 1, 2, 1), (10, 1, 1, 10), (9, 18, 1, 2), (most, most - 9, most - 9, most), (most - 1, 1, 7, 5)):
        assert torch.equal(outs(*named), expected), named


@pytest.mark.parametrize(
    "mask",
    [
        numbers([1, 1, 1, -2, 1, 1, 1, 1]),
        numbers([-5] * 8),
        numbers([1, -1, 1, 1, 1, 1, 1, 1]),
        numbers([1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, -1]),
        numbers([1, 1, 1, 1, 1, 1, 1, -1], [1, 1, 1, 1, 1, 1, 1, 1]),
        numbers([1, 1, 1, -1, -1, -1, -1, -1]),
        numbers([-(2**31)] + [1] * 7),
        numbers([1] * 7 + [-(2**63)], dtype=torch.int64),
    ],
    ids=lambda mask: str(mask[:, 0, 0].tolist()),
)
def test_numbers_that_stand_for_nothing_are_refused(mask: Tensor) -> None:
    with pytest.raises(UnsupportedError, match="no sequence numbers") as caught:
        layout_of(mask, 4, 8)
    assert "number padding 0, and sequences from 1 on" in str(caught.value)
    fixed = torch.where(mask < PADDING, PADDING, mask)
    assert isinstance(layout_of(fixed, 4, 8), Varlen)


def test_a_query_that_sees_nothing_gives_zeros_whatever_the_backend_makes_of_it() -> None:
    """Transformer Engine's unfused softmax adds the same number to all scores of such a query: it sees everything."""

    def core(query: Tensor, key: Tensor, value: Tensor, *, attention_mask: Tensor, **_: Any) -> Tensor:
        scores = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).masked_fill(attention_mask, -10_000.0)
        return (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)

    x = torch.randn(2, 8, HEADS, CHANNELS)
    for mask, window in ((HOLES, 1), (HOLES, 3), (WOVEN, None)):
        layout = layout_of(mask, 8, 8, window=window)
        assert isinstance(layout, Masked)
        blind = ~pair_by_pair(mask, 8, window).any(-1)[:, 0]
        out = attend(core, x, x, x, layout, window)  # type: ignore[arg-type]
        assert torch.equal((out == 0).all(-1), blind)
    some = torch.ones(2, HEADS, 8, 8, dtype=torch.bool)
    some[1, 2, 5] = False
    out = attend(core, x, x, x, Masked(some)).view(2, 8, HEADS, CHANNELS)  # type: ignore[arg-type]
    assert (out == 0).all(-1).nonzero().tolist() == [[1, 5, 2]]


@pytest.mark.parametrize("shape", [(2, 1), (4, HEADS), (3, 2), (1, HEADS + 1)])
def test_a_mask_for_another_batch_or_number_of_heads_is_refused(shape: tuple[int, int]) -> None:
    x = torch.randn(3, 4, HEADS, CHANNELS)
    core = resolve("reference").DotProductAttention(HEADS, CHANNELS, qkv_format="bshd")
    with pytest.raises(UnsupportedError, match="another batch or another number of heads"):
        attend(core, x, x, x, Masked(torch.ones(*shape, 4, 4, dtype=torch.bool)))


def test_attention_both_ways_without_a_mask_sees_what_comes_later() -> None:
    x = torch.randn(2, 4, HEADS, CHANNELS)
    core = resolve("reference").DotProductAttention(HEADS, CHANNELS, qkv_format="bshd")
    everything = Masked(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    out = attend(core, x, x, x, layout_of(None, 4, 4), is_causal=False)
    condition = scores(x, x, core.softmax_scale)
    assert_close(out, attend(core, x, x, x, everything), terms=CHANNELS + 8, condition=condition)


def test_a_window_is_left_to_lengths_only_where_no_padding_lies_between_tokens() -> None:
    assert isinstance(layout_of(LEFT, 8, 8, window=3), Varlen)
    assert isinstance(layout_of(HOLES, 8, 8, window=3), Masked)
    for rows in (HOLES[0, 0, 0].tolist(), [1] * 8), ([1] * 8, HOLES[0, 0, 0].tolist()):
        assert isinstance(layout_of(numbers(*rows), 8, 8, window=3), Masked), "in any row"


def test_packed_rows_without_padding_are_not_copied() -> None:
    layout = layout_of(PACKED, 8, 8)
    assert isinstance(layout, Varlen)
    assert layout.queries is None
    assert layout.keys is None
    assert layout.cu_queries.tolist() == [0, 3, 7, 8, 9, 16]
    assert (layout.max_queries, layout.max_keys) == (7, 7)


def test_a_mask_is_read_once_and_again_after_it_has_changed() -> None:
    mask = LEFT.clone()
    first = layout_of(mask, 8, 8)
    assert layout_of(mask, 8, 8) is first
    assert layout_of(mask, 8, 8, window=2) is not first
    mask[0, 0, 0, 0] = 1
    changed = layout_of(mask, 8, 8)
    assert isinstance(changed, Varlen)
    assert changed.cu_queries[1] == 7


def test_what_is_remembered_of_a_mask_does_not_keep_it_alive() -> None:
    for make in (lambda: torch.ones(2, 1, 4, 4, dtype=torch.bool), lambda: torch.zeros(2, 1, 4, 4), LEFT.clone):
        mask = make()
        layout_of(mask, 4, mask.shape[-1])
        gone = weakref.ref(mask)
        del mask
        assert gone() is None
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed_layout(starts, starts, 8, (5, 5))
    gone = weakref.ref(starts)
    del starts
    assert gone() is None


def test_a_mask_of_inference_mode_is_read_each_time_and_good_for_training_later() -> None:
    with torch.inference_mode():
        mask = LEFT.clone()
        first = layout_of(mask, 8, 8)
        mask[0, 0, 0, 0] = 1
        second = layout_of(mask, 8, 8)
        kept = LEFT[:1] + 0
    assert isinstance(first, Varlen)
    assert isinstance(second, Varlen)
    assert (int(first.cu_queries[1]), int(second.cu_queries[1])) == (6, 7)
    assert second.queries is not None
    assert not second.queries.is_inference()
    layout = layout_of(kept, 8, 8)
    x = torch.randn(1, 8, HEADS, CHANNELS, requires_grad=True)
    core = resolve("reference").DotProductAttention(HEADS, CHANNELS, qkv_format="bshd")
    attend(core, x, x, x, layout).sum().backward()
    assert x.grad is not None


def test_a_buffer_of_starts_is_read_again_after_it_has_changed() -> None:
    starts, key_starts = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    assert packed_layout(starts, key_starts, 4, (None, None)).max_queries == 2
    starts.copy_(torch.tensor([0, 1, 4]))
    with pytest.raises(UnsupportedError, match="the same in cu_seq_lens_k"):
        packed_layout(starts, key_starts, 4, (None, None))
    key_starts.copy_(starts)
    layout = packed_layout(starts, key_starts, 4, (None, None))
    assert (layout.max_queries, layout.cu_queries.tolist()) == (3, [0, 1, 4])
    with pytest.raises(UnsupportedError, match="longest packed sequence"):
        packed_layout(starts, key_starts, 4, (9, 9))


def test_a_plain_mask_is_known_without_a_look_also_where_tensors_are_only_imagined() -> None:
    device = torch.device("cpu")
    with FakeTensorMode():
        plain_tokens(3, 5, device)
    mask = plain_tokens(3, 5, device)
    assert type(mask) is Tensor
    assert mask is plain_tokens(3, 5, device)
    assert mask.all()
    assert is_plain(mask)
    assert not is_plain(mask.clone())
    assert layout_of(plain_mask(3, 5, device), 2, 5) == Dense(5)
    assert visible(plain_mask(3, 5, device), 5).sum() == 3 * 15


def test_a_mask_of_floats_is_taken_if_it_only_hides() -> None:
    seen = torch.rand(2, 1, 4, 4) < 0.5
    for lowest in (torch.finfo(torch.float32).min, float("-inf")):
        layout = layout_of(torch.zeros(2, 1, 4, 4).masked_fill(~seen, lowest), 4, 4)
        assert isinstance(layout, Masked)
        assert torch.equal(layout.visible, seen)
    with pytest.raises(UnsupportedError, match="float32 with values between zero and the minimum"):
        layout_of(torch.full((2, 1, 4, 4), -1.5), 4, 4)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (object(), "object"),
        (torch.ones(2, 5), r"float32 \[2, 5\]"),
        (torch.ones(2, 3, dtype=torch.long), r"int64 \[2, 3\]"),
        (torch.ones(2, 1, 3, 5, dtype=torch.bool), r"bool \[2, 1, 3, 5\]"),
        (torch.ones(2, 1, 4, 5, dtype=torch.int64), r"int64 \[2, 1, 4, 5\]"),
        (torch.ones(2, 4, 5, dtype=torch.bool), r"bool \[2, 4, 5\]"),
        (torch.ones(2, 1, 1, 4, 5, dtype=torch.bool), r"bool \[2, 1, 1, 4, 5\]"),
        (torch.ones(2, 1, 1, 5, 1, dtype=torch.int32), r"int32 \[2, 1, 1, 5, 1\]"),
    ],
)
def test_a_mask_of_another_form_is_named(mask: Any, found: str) -> None:
    with pytest.raises(UnsupportedError, match=found):
        layout_of(mask, 4, 5)


def test_positions_that_begin_again_are_packed_sequences() -> None:
    layout = layout_of_positions(torch.tensor([[0, 1, 2, 0, 1, 0]]), 2, 6)
    assert isinstance(layout, Varlen)
    assert layout.cu_queries.tolist() == [0, 3, 5, 6, 9, 11, 12]
    for row in ([3, 4, 5, 9, 10, 11], [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 2, 3], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]):
        assert layout_of_positions(torch.tensor([row]), 2, 6) == Dense(6), "not one that begins again at 0"


def test_packed_sequences_have_to_fit_the_tokens() -> None:
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    layout = packed_layout(starts, starts, 8, (5, 5))
    assert (layout.max_queries, layout.max_keys) == (5, 5)
    with pytest.raises(UnsupportedError, match="from 0 to 9"):
        packed_layout(starts.clone(), starts, 9, (5, 5))
    with pytest.raises(UnsupportedError, match="the same in cu_seq_lens_k"):
        packed_layout(starts.clone(), torch.tensor([0, 4, 8]), 8, (5, 5))
    with pytest.raises(UnsupportedError, match="growing numbers"):
        packed_layout(torch.tensor([0, 5, 5, 8]), torch.tensor([0, 5, 5, 8]), 8, (5, 5))
    with pytest.raises(UnsupportedError, match=r"(?s)longest packed sequence.*5.*4"):
        packed_layout(starts.clone(), starts, 8, (4, 4))


def test_a_mask_of_whole_rows_says_that_each_row_is_a_sequence() -> None:
    starts, whole = torch.tensor([0, 4, 8], dtype=torch.int32), numbers([1] * 4, [1] * 4)
    layout = packed_layout(starts, starts, 8, (4, 4), whole)
    assert layout.cu_queries.tolist() == [0, 4, 8]
    for other in ([0, 8], [0, 3, 8], [0, 2, 4, 6, 8]):
        starts = torch.tensor(other, dtype=torch.int32)
        with pytest.raises(UnsupportedError, match="say different things"):
            packed_layout(starts, starts, 8, (None, None), whole)


def test_what_is_known_of_a_mask_goes_along_to_another_device() -> None:
    there = torch.device("meta")
    plain = plain_mask(2, 5, torch.device("cpu"))
    moved = brought(plain, there)
    assert moved.device == there
    assert is_plain(moved)
    for make, value in ((plain_tokens, True), (plain_mask, 1)):
        back = brought(make(2, 7, there), torch.device("cpu"))
        assert is_plain(back)
        assert (back == value).all()
    mask = numbers([1, 1, 2, 2])
    assert brought(mask, there) is brought(mask, there)
    before = brought(mask, there)
    mask[..., 1] = 2
    assert brought(mask, there) is not before
    assert brought(mask, torch.device("cpu")) is mask
    cos, sin = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    rope._angles[cos] = None
    table, other = brought((cos, sin), there)
    assert table in rope._angles
    assert other not in rope._angles
    assert brought(None, there) is None
