"""The reference attention against Hugging Face's eager attention and against masks written out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import assert_close, scores
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from tepatch.errors import UnsupportedError
from tepatch.te.reference import DotProductAttention
from tepatch.te.reference.masks import MASK_TYPES, Window, full_mask

BATCH, HEADS, GROUPS, CHANNELS = 2, 4, 2, 8


def random_qkv(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = ((num_queries, HEADS), (num_keys, GROUPS), (num_keys, GROUPS))
    query, key, value = (
        torch.randn(BATCH, length, heads, CHANNELS, dtype=dtype, requires_grad=True) for length, heads in sizes
    )
    return query, key, value


def eager(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float = CHANNELS**-0.5) -> Tensor:
    """Hugging Face's eager attention under a boolean mask, True = masked out; in float64, but for its softmax."""
    out, _ = eager_attention_forward(
        SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False),
        *(x.double().transpose(1, 2) for x in (query, key, value)),
        torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")),
        scaling=scale,
    )
    return out.flatten(2)


def padding(*lengths: int, size: int) -> Tensor:
    return (torch.arange(size) >= torch.tensor(lengths).unsqueeze(1)).view(-1, 1, 1, size)


def brute_force(
    mask_type: str, window: Window, queries: list[int], keys: list[int], num_queries: int, num_keys: int
) -> Tensor:
    """The mask of each sequence, cell by cell; ``queries`` and ``keys`` are the sequences' real lengths."""
    hidden = torch.ones(len(queries), 1, num_queries, num_keys, dtype=torch.bool)
    for b, (real_queries, real_keys) in enumerate(zip(queries, keys, strict=True)):
        shift = 0 if mask_type in ("causal", "padding_causal") else real_keys - real_queries
        for i in range(real_queries):
            for j in range(real_keys):
                too_late = "causal" in mask_type and j > i + shift
                left = window[0] >= 0 and j < i + shift - window[0]
                right = window[1] >= 0 and j > i + shift + window[1]
                hidden[b, 0, i, j] = too_late or left or right
    return hidden


def bound(attention: DotProductAttention, query: Tensor, key: Tensor) -> dict[str, Any]:
    """For ``assert_close``: sums over the channels, and over the keys in softmax and of the values."""
    terms = CHANNELS + 2 * key.shape[1]
    return {"terms": terms, "condition": scores(query, key, attention.softmax_scale)}


WINDOWS = [(-1, -1), (0, 0), (2, 0), (3, 2)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(6, 6), (1, 7), (3, 7), (7, 3)])
@pytest.mark.parametrize("mask_type", ["no_mask", "causal", "causal_bottom_right"])
def test_masks_without_padding_are_those_written_out(mask_type: str, lengths: tuple[int, int], window: Window) -> None:
    num_queries, num_keys = lengths
    attention = DotProductAttention(
        HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type=mask_type, window_size=window
    )
    q, k, v = random_qkv(num_queries, num_keys)
    hidden = brute_force(mask_type, window, [num_queries] * BATCH, [num_keys] * BATCH, num_queries, num_keys)
    seeing = ~hidden.all(-1)[:, 0]
    out = attention(q, k, v)
    assert out.isfinite().all()
    assert not out[~seeing].any()
    assert_close(out[seeing], eager(q, k, v, hidden)[seeing], **bound(attention, q, k))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("attention_type", ["self", "cross"])
@pytest.mark.parametrize("mask_type", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_masks_with_padding_are_those_written_out(mask_type: str, attention_type: str, window: Window) -> None:
    attention = DotProductAttention(
        HEADS,
        CHANNELS,
        GROUPS,
        qkv_format="bshd",
        attn_mask_type=mask_type,
        window_size=window,
        attention_type=attention_type,
    )
    keys = [7, 4]
    queries, num_queries = (keys, 7) if attention_type == "self" else ([2, 3], 3)
    mask: Tensor | tuple[Tensor, Tensor] = padding(*keys, size=7)
    if attention_type == "cross":
        mask = (padding(*queries, size=num_queries), mask)
    q, k, v = random_qkv(num_queries, 7)
    hidden = brute_force(mask_type, window, queries, keys, num_queries, 7)
    seeing = ~hidden.all(-1)[:, 0]
    out = attention(q, k, v, mask)
    assert not out[~seeing].any()
    assert_close(out[seeing], eager(q, k, v, hidden)[seeing], **bound(attention, q, k))


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 5, 6), (BATCH, 1, 5, 6), (1, 1, 5, 6), (BATCH, 1, 1, 6)])
def test_an_arbitrary_mask_broadcasts_and_true_is_masked_out(shape: tuple[int, ...]) -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type="arbitrary")
    q, k, v = random_qkv(5, 6)
    hidden = torch.rand(shape) < 0.5
    hidden[..., 0] = False
    expected = eager(q, k, v, hidden.expand(BATCH, -1, 5, -1))
    assert_close(attention(q, k, v, hidden), expected, **bound(attention, q, k))


def test_a_window_also_narrows_an_arbitrary_mask() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type="arbitrary")
    q, k, v = random_qkv(5, 6)
    hidden = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    hidden[..., 3] = True
    expected = hidden | brute_force("no_mask", (2, 0), [5], [6], 5, 6)
    out = attention(q, k, v, hidden, window_size=(2, 0))
    assert_close(out, eager(q, k, v, expected), **bound(attention, q, k))


def test_the_mask_type_and_the_window_of_a_call_go_before_the_constructors() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", window_size=(2, 0))
    q, k, v = random_qkv(3, 7)
    near = bound(attention, q, k)
    constructor = brute_force("causal", (2, 0), [3] * BATCH, [7] * BATCH, 3, 7)
    assert_close(attention(q, k, v), eager(q, k, v, constructor), **near, name="constructor")
    call = brute_force("causal_bottom_right", (2, 0), [3] * BATCH, [7] * BATCH, 3, 7)
    out = attention(q, k, v, attn_mask_type="causal_bottom_right")
    assert_close(out, eager(q, k, v, call), **near, name="mask type")
    call = brute_force("causal", (1, 0), [3] * BATCH, [7] * BATCH, 3, 7)
    assert_close(attention(q, k, v, window_size=(1, 0)), eager(q, k, v, call), **near, name="window")


def test_a_causal_module_called_without_a_mask_looks_everywhere() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    q, k, v = random_qkv(3, 5)
    nothing = torch.zeros(BATCH, 1, 3, 5, dtype=torch.bool)
    assert_close(attention(q, k, v, attn_mask_type="no_mask"), eager(q, k, v, nothing), **bound(attention, q, k))


def test_a_causal_type_never_looks_ahead_whatever_its_window() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", window_size=(2, 3))
    assert attention.window_size == (2, 0)
    assert DotProductAttention(HEADS, CHANNELS, window_size=(-1, -1)).window_size == (-1, 0)


@pytest.mark.parametrize(("mask_type", "window"), [("causal", (-1, 4)), ("causal", (-2, 0)), ("no_mask", (3, -1))])
def test_a_window_that_te_refuses_is_refused(mask_type: str, window: Window) -> None:
    with pytest.raises(UnsupportedError, match="window_size"):
        DotProductAttention(HEADS, CHANNELS, attn_mask_type=mask_type, window_size=window)


def test_sbhd_is_bshd_with_the_first_two_dimensions_swapped() -> None:
    q, k, v = random_qkv(5, 5)
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    bshd = attention(q, k, v)
    sbhd = DotProductAttention(HEADS, CHANNELS, GROUPS)(*(x.transpose(0, 1) for x in (q, k, v)))
    assert bshd.shape == (BATCH, 5, HEADS * CHANNELS)
    assert_close(sbhd.transpose(0, 1), bshd, **bound(attention, q, k))  # other strides may be added otherwise


def test_values_may_be_wider_than_keys_and_the_scale_comes_from_the_keys() -> None:
    attention = DotProductAttention(HEADS, (CHANNELS, 12), GROUPS, qkv_format="bshd")
    q, k, _ = random_qkv(5, 5)
    v = torch.randn(BATCH, 5, GROUPS, 12)
    hidden = brute_force("causal", (-1, -1), [5] * BATCH, [5] * BATCH, 5, 5)
    assert_close(attention(q, k, v), eager(q, k, v, hidden), **bound(attention, q, k))


def test_a_softmax_scale_replaces_the_default() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", softmax_scale=0.7)
    q, k, v = random_qkv(5, 5)
    hidden = brute_force("causal", (-1, -1), [5] * BATCH, [5] * BATCH, 5, 5)
    assert_close(attention(q, k, v), eager(q, k, v, hidden, scale=0.7), **bound(attention, q, k))


@pytest.mark.parametrize("mask_type", ["causal", "no_mask"])
def test_a_softcap_bends_the_scaled_scores(mask_type: str) -> None:
    attention = DotProductAttention(
        HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type=mask_type, softcap=0.5, softmax_scale=0.3
    )
    q, k, v = random_qkv(5, 5)
    wide_k, wide_v = (x.double().repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
    capped = 0.5 * torch.tanh(q.double().transpose(1, 2) @ wide_k.transpose(2, 3) * 0.3 / 0.5)
    hidden = brute_force(mask_type, (-1, -1), [5] * BATCH, [5] * BATCH, 5, 5)
    expected = capped.masked_fill(hidden, float("-inf")).softmax(-1) @ wide_v
    assert_close(attention(q, k, v), expected.transpose(1, 2).flatten(2), **bound(attention, q, k))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradients_are_those_of_eager_attention_and_rows_without_keys_give_none(softcap: float) -> None:
    attention = DotProductAttention(
        HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type="arbitrary", softcap=softcap
    )
    q, k, v = random_qkv(4, 5)
    hidden = torch.rand(BATCH, 1, 4, 5) < 0.5
    hidden[..., 0] = False
    hidden[0, :, 2] = True  # a row that may look at nothing
    out = attention(q, k, v, hidden)
    assert out.isfinite().all()
    assert not out[0, 2].any()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, 2].any()
    if not softcap:
        seeing = ~hidden.all(-1)[:, 0]
        opened = hidden & ~hidden.all(-1, keepdim=True)
        expected = torch.autograd.grad(eager(q, k, v, opened)[seeing].square().sum(), (q, k, v))
        near = bound(attention, q, k)
        near["terms"] *= 3  # forth, and back through twice the products
        for name, ours, theirs in zip("qkv", gradients, expected, strict=True):
            assert_close(ours, theirs, **near, name=name)


@pytest.mark.parametrize("mask_type", ["causal", "no_mask", "causal_bottom_right", "arbitrary"])
def test_dropout_acts_in_training_only(mask_type: str) -> None:
    attention = DotProductAttention(
        HEADS, CHANNELS, GROUPS, qkv_format="bshd", attention_dropout=0.5, attn_mask_type=mask_type
    )
    q, k, v = random_qkv(4, 6)
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool) if mask_type == "arbitrary" else None
    assert not torch.equal(attention(q, k, v, mask), attention(q, k, v, mask))
    attention.eval()
    assert torch.equal(attention(q, k, v, mask), attention(q, k, v, mask))


def test_dropout_acts_under_a_softcap_in_training_only() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", attention_dropout=0.5, softcap=5.0)
    q, k, v = random_qkv(4, 4)
    assert not torch.equal(attention(q, k, v), attention(q, k, v))
    attention.eval()
    assert torch.equal(attention(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_queries_stays(dtype: torch.dtype, softcap: float) -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", softcap=softcap)
    out = attention(*random_qkv(4, 4, dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_attention_runs_on_meta() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type="padding_causal")
    q, k, v = (x.to("meta") for x in random_qkv(4, 4))
    assert attention(q, k, v, padding(4, 2, size=4).to("meta")).shape == (BATCH, 4, HEADS * CHANNELS)


def test_attention_with_padding_is_one_graph_for_a_compiler() -> None:
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type="padding_causal")
    traced = torch.compile(attention, backend="eager", fullgraph=True)
    q, k, v = random_qkv(4, 4)
    mask = padding(4, 2, size=4)
    assert torch.equal(traced(q, k, v, mask), attention(q, k, v, mask))


@pytest.mark.parametrize(
    ("mask_type", "attention_type", "mask", "reason"),
    [
        ("arbitrary", "self", None, "must be a bool tensor"),
        ("arbitrary", "self", torch.zeros(1, 1, 5, 5), "must be a bool tensor"),
        ("padding", "self", None, "needs one mask"),
        ("padding", "self", torch.zeros(2, 1, 1, 5), "must be a bool tensor"),
        ("padding", "self", padding(5, 3, size=5).squeeze(1), "wrong shape"),
        ("padding", "self", padding(5, 3, size=4), "wrong shape"),
        ("padding", "self", (padding(5, 3, size=5),) * 2, "needs one mask"),
        ("padding_causal", "cross", padding(5, 3, size=5), "needs a pair"),
        ("padding_causal", "cross", None, "needs a pair"),
        ("padding_causal", "self", padding(5, 3, size=5).flip(-1), "on the right only"),
        ("causal", "self", padding(5, 3, size=5), "ignores it"),
        ("no_mask", "self", padding(5, 3, size=5), "ignores it"),
    ],
)
def test_a_mask_that_te_would_read_otherwise_is_refused(
    mask_type: str, attention_type: str, mask: Tensor | tuple[Tensor, Tensor] | None, reason: str
) -> None:
    attention = DotProductAttention(
        HEADS, CHANNELS, GROUPS, qkv_format="bshd", attn_mask_type=mask_type, attention_type=attention_type
    )
    with pytest.raises(UnsupportedError, match=reason):
        attention(*random_qkv(5, 5), mask)


def test_what_the_reference_cannot_compute_is_refused_when_it_is_built_or_called() -> None:
    with pytest.raises(UnsupportedError, match="'bhsd'"):
        DotProductAttention(HEADS, CHANNELS, qkv_format="bhsd")
    with pytest.raises(UnsupportedError, match=r"(?s)causal_bottom_right.*'alibi'"):
        DotProductAttention(HEADS, CHANNELS, attn_mask_type="alibi")
    with pytest.raises(UnsupportedError, match="'both'"):
        DotProductAttention(HEADS, CHANNELS, attention_type="both")
    with pytest.raises(UnsupportedError, match="4 heads, 3 groups"):
        DotProductAttention(4, CHANNELS, 3)
    attention = DotProductAttention(HEADS, CHANNELS, GROUPS, qkv_format="bshd")
    q, k, v = random_qkv(4, 4)
    with pytest.raises(UnsupportedError, match="'alibi'"):
        attention(q, k, v, attn_mask_type="alibi")
    with pytest.raises(UnsupportedError, match="2 problems"):
        attention(q, q, q)
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    with pytest.raises(UnsupportedError, match="needs cu_seqlens_q and cu_seqlens_kv"):
        attention(*packed, qkv_format="thd", attn_mask_type="padding_causal")
    with pytest.raises(UnsupportedError, match=r"(?s)padding_causal_bottom_right.*'causal'"):
        attention(*packed, qkv_format="thd")
    with pytest.raises(UnsupportedError, match="thd with h = "):
        attention(q, k, v, qkv_format="thd", attn_mask_type="padding_causal")


def test_every_mask_type_has_a_full_mask() -> None:
    given = {"arbitrary": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}
    for mask_type in MASK_TYPES:
        mask = padding(4, 2, size=4) if "padding" in mask_type else given.get(mask_type)
        hidden = full_mask(
            mask_type,
            (-1, 0) if "causal" in mask_type else (-1, -1),
            num_queries=4,
            num_keys=4,
            attention_mask=mask,
            attention_type="self",
            device=torch.device("cpu"),
        )
        assert hidden.dtype == torch.bool
        assert hidden.expand(BATCH, HEADS, 4, 4).shape == (BATCH, HEADS, 4, 4)


def test_attention_says_what_it_is() -> None:
    expected = "DotProductAttention(heads=4, groups=2, sbhd, causal, window=(-1, 0), scale=0.3536)"
    assert repr(DotProductAttention(HEADS, CHANNELS, GROUPS)) == expected
