"""Attention that a patch leaves to transformers: nothing that its modules pass is dropped."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from tepatch.errors import UnsupportedError
from tepatch.hf import attention
from tepatch.hf.model import build_on_meta
from tepatch.testing.cases import cache_name

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.2,
}


def test_what_neither_sdpa_nor_the_class_takes_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8)
    for name, value in (("s_aux", torch.ones(4)), ("softcap", 5.0), ("of_tomorrow", False)):
        with pytest.raises(UnsupportedError, match=f"{name}: the attention of LlamaAttention, which the patch leaves"):
            attention.attention_of_stock_modules(module, query, query[:, :2], query[:, :2], None, **{name: value})
    plain = attention.attention_of_stock_modules(module, query, query[:, :2], query[:, :2], None, s_aux=None)
    assert plain[0].shape == (1, 5, 4, 8)


def logits(model: Any, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, attention_mask=mask).logits
    return out if mask is None else out[mask.bool()]


def test_a_class_without_sdpa_is_computed_eagerly_with_its_sinks() -> None:
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    torch.manual_seed(0)
    stock = GptOssForCausalLM(config).eval()
    stock.set_experts_implementation("eager")
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.self_attn.sinks.normal_()
    assert stock.config._attn_implementation == "eager"
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    expected = [logits(stock, mask) for mask in (None, padded)]
    attention.mark_eager(stock)
    stock.config._attn_implementation = attention.NAME
    for mask, wanted in zip((None, padded), expected, strict=True):
        torch.testing.assert_close(logits(stock, mask), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    for layer in stock.model.layers:
        layer.self_attn.sinks.data.zero_()
    assert (logits(stock, None) - expected[0]).abs().max() > 0.01 * expected[0].abs().max(), "sinks matter"


def test_models_that_are_built_know_which_classes_have_no_sdpa() -> None:
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model, _ = build_on_meta(GptOssForCausalLM, config, dtype=torch.float32)
    assert model.model.layers[0].self_attn.computes_eagerly
    model, _ = build_on_meta(LlamaForCausalLM, LlamaConfig(**SIZES), dtype=torch.float32)
    assert not hasattr(model.model.layers[0].self_attn, "computes_eagerly")


def test_packed_rows_told_by_their_starts_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.config._attn_implementation = attention.NAME
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    places = torch.tensor([[*range(5), *range(7)]])
    row = IDS[:1]
    with torch.no_grad():
        expected = model(row, position_ids=places, use_cache=False).logits
        found = model(row, position_ids=places, attention_mask=None, cu_seq_lens_q=starts, use_cache=False).logits
        alone = model(row, use_cache=False, position_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (alone - expected).abs().max() > 1e-2


def test_a_keyword_of_masks_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rule: the mask function of tepatch was called with a keyword"):
        attention.mask_for_layers(1, 4, 4, rule=lambda *_: True)


def test_a_rule_that_is_not_known_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def every_second(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key % 2 == 0

    config = LlamaConfig(**SIZES)
    config._attn_implementation = attention.NAME
    attention._tell_once.cache_clear()
    given = {"attention_mask": None, str(cache_name(create_causal_mask)): None, "and_mask_function": every_second}
    with caplog.at_level(logging.WARNING, logger="tepatch"):
        masks = [create_causal_mask(config, torch.zeros(1, 4, 32), **given) for _ in range(2)]
    assert masks[0].dtype == torch.bool
    (record,) = caplog.records
    assert "every_second" in record.getMessage()
    assert "slow" in record.getMessage()
