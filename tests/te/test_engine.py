"""What tepatch adds to Transformer Engine's attention, on a stand-in for it: copies, pickles, and decoding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from rounding import assert_close, scores
from torch import Tensor, nn

from tepatch.te import reference
from tepatch.te.nvidia import engine


class Theirs(nn.Module):
    """As Transformer Engine's class: local functions inside, which pickle can not name."""

    def __init__(
        self,
        heads: int,
        channels: int,
        *,
        softmax_scale: float | None = None,
        qkv_format: str = "sbhd",
        softmax_type: str = "vanilla",
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.channels, self.qkv_format = heads, channels, qkv_format
        self.function = lambda x: x
        self.calls: list[tuple[bool, ...]] = []

    def forward(self, *tensors: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append(tuple(tensor.is_contiguous() for tensor in tensors))
        return tensors[0].flatten(2)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    cls = engine._exact_attention(Theirs)
    cls.__module__, cls.__qualname__ = engine.__name__, cls.__name__
    monkeypatch.setattr(engine, "_classes", lambda: (cls,))
    return cls(4, 8, softmax_scale=0.3, qkv_format="bshd").eval()


def notice(module: nn.Module, *args: Any) -> None:
    module.noticed = True  # type: ignore[assignment]


def test_a_pickle_makes_the_module_again_with_its_hooks_and_its_mode(attention: Any) -> None:
    attention.register_forward_pre_hook(notice)
    other = pickle.loads(pickle.dumps(attention))
    assert type(other) is type(attention)
    assert (other.heads, other.channels, other._scale, other.qkv_format) == (4, 8, 0.3, "bshd")
    assert other.training is False
    x = torch.zeros(1, 2, 4, 8)
    other(x, x, x)
    assert other.noticed


def test_a_pickle_keeps_a_hook_of_the_whole_backward_pass(attention: Any) -> None:
    attention.register_full_backward_hook(notice)
    other = pickle.loads(pickle.dumps(attention))
    x = torch.zeros(1, 2, 4, 8, requires_grad=True)
    other(x, x, x).sum().backward()
    assert other.noticed


def test_a_copy_keeps_all_that_the_module_holds(attention: Any) -> None:
    attention.calls.append((True,))
    other = copy.deepcopy(attention)
    assert other.calls == attention.calls
    assert other.calls is not attention.calls
    assert other._scale == 0.3


def test_one_query_sees_a_cache_as_it_lies_and_all_else_is_made_contiguous(attention: Any) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 1, 4, 8)
    key, value = (torch.randn(2, 2, 5, 8).transpose(1, 2) for _ in "kv")
    out = attention(query, key, value, attn_mask_type="no_mask")
    assert attention.calls == []
    wide_key, wide_value = (tensor.double().repeat_interleave(2, 2) for tensor in (key, value))
    weights = torch.einsum("bqhd,bkhd->bhqk", query.double(), wide_key).mul(0.3).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, wide_value).flatten(2)
    assert_close(out, expected, terms=8 + 2 * 5, condition=scores(query, key, 0.3))
    attention(query, key, value, attn_mask_type="causal_bottom_right")
    attention(query.expand(2, 3, 4, 8), key, value, attn_mask_type="no_mask")
    attention(query.clone().requires_grad_(), key, value, attn_mask_type="no_mask")
    attention.train()(query, key, value, attn_mask_type="no_mask")
    assert attention.calls == [(True, True, True)] * 4


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"softmax_type": "off-by-one"}, {"qkv_format": "sbhd"}])
def test_one_query_with_another_softmax_is_transformer_engines(attention: Any, given: dict[str, Any]) -> None:
    other = type(attention)(4, 8, **{"qkv_format": "bshd", **given}).eval()
    query, key = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 5, 8).transpose(1, 2)
    other(query, key, key, attn_mask_type="no_mask")
    assert other.calls == [(True, True, True)]


def test_a_softcap_is_the_references_where_transformer_engine_has_none() -> None:
    class Old(nn.Module):
        def __init__(self, heads: int, channels: int) -> None:
            super().__init__()

    class New(nn.Module):
        def __init__(self, heads: int, channels: int, softcap: float = 0.0) -> None:
            super().__init__()
            self.softcap = softcap

    old, new = (type("Exact", (base,), {}) for base in (Old, New))
    assert isinstance(engine._attention(old, 2, 8), Old)
    capped = engine._attention(old, 2, 8, softcap=50.0)
    assert isinstance(capped, reference.DotProductAttention)
    assert capped.softcap == 50
    capped = engine._attention(new, 2, 8, softcap=50.0)
    assert isinstance(capped, New)
    assert capped.softcap == 50
