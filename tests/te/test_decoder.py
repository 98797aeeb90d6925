"""What layers of the common form take from a config."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import attention_options, window_of


def test_a_window_is_that_of_the_layers_type() -> None:
    config = SimpleNamespace(sliding_window=8, layer_types=["full_attention", "sliding_attention"])
    assert [window_of(config, layer) for layer in range(2)] == [None, 8]
    assert window_of(SimpleNamespace(sliding_window=8), 1) == 8
    assert window_of(SimpleNamespace(sliding_window=None, layer_types=None), 0) is None


def test_a_type_of_layer_that_is_not_known_is_refused() -> None:
    config = SimpleNamespace(sliding_window=8, layer_types=["chunked_attention"])
    with pytest.raises(UnsupportedError, match=r"layer_types\[0\]"):
        window_of(config, 0)


def test_a_head_dim_follows_from_the_sizes_where_the_config_has_none() -> None:
    fields = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": None, "rms_norm_eps": 1e-6}
    config = SimpleNamespace(**fields, attention_dropout=None, initializer_range=0.02)
    options = attention_options(config, 3)
    assert (options["head_dim"], options["num_kv_heads"], options["dropout"], options["layer_idx"]) == (12, 4, 0.0, 3)
    config.head_dim = 16
    assert attention_options(config, 0)["head_dim"] == 16


def test_the_backend_is_told_the_number_of_each_layer_from_1() -> None:
    config = LlamaForCausalLM.config_class(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    layers = [SelfAttention(**attention_options(config, index)) for index in range(3)]
    assert [layer.core_attention.layer_number for layer in layers] == [1, 2, 3]


def test_the_backend_is_told_a_softcap_where_there_is_one() -> None:
    config = LlamaForCausalLM.config_class(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    options = attention_options(config, 0)
    capped, plain = SelfAttention(**options, softcap=30.0), SelfAttention(**options)
    assert (capped.core_attention.softcap, plain.core_attention.softcap) == (30.0, 0.0)


DECODERS: list[Any] = [LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM]


@pytest.mark.parametrize("cls", DECODERS, ids=lambda cls: cls.__name__)
def test_weights_of_attention_are_dropped_as_in_hugging_face(cls: Any, tmp_path: Path) -> None:
    """The same numbers are drawn: the same weights are dropped, of the same scores, in training only."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.2}
    torch.manual_seed(0)
    stock = cls(cls.config_class(**sizes, **options, attention_dropout=0.3)).eval()
    stock.save_pretrained(tmp_path)
    model = tepatch.load(stock.config.model_type, tmp_path, backend="reference")
    ids = torch.randint(1, 64, (2, 12))
    logits = []
    for each in (stock, model):
        evaluated = each(ids, use_cache=False).logits
        torch.manual_seed(7)
        logits.append(each.train()(ids, use_cache=False).logits)
        assert not torch.allclose(logits[-1], evaluated, rtol=0.1), "dropout changes something"
        torch.manual_seed(7)
        assert torch.equal(each.eval()(ids, use_cache=False).logits, evaluated)
    assert_close(logits[1], logits[0], terms=forward_terms(stock.config, 12))


def test_weights_of_capped_attention_are_dropped_in_training(tmp_path: Path) -> None:
    """Gemma 2's eager attention draws its numbers for other shapes: what is dropped differs, and how much does not."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "head_dim": 8, "attention_dropout": 0.3}
    Gemma2ForCausalLM(Gemma2ForCausalLM.config_class(**sizes, **options)).save_pretrained(tmp_path)
    model = tepatch.load("gemma2", tmp_path, backend="reference")
    assert {layer.self_attn.core_attention.attention_dropout for layer in model.model.layers} == {0.3}
    ids = torch.randint(1, 64, (2, 12))
    evaluated = model(ids).logits
    assert not torch.equal(model.train()(ids).logits, evaluated)
