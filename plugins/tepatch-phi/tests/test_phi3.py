"""What is special to Phi-3: dropout of what is added, and rope that changes its factors in the middle of a text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rounding import assert_close, forward_terms
from transformers import Phi3Config, Phi3ForCausalLM

import tepatch
from tepatch.testing import small_sizes

TINY = small_sizes(num_hidden_layers=2, num_key_value_heads=4, original_max_position_embeddings=32, eos_token_id=None)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}


def pair(folder: Path, **config: Any) -> tuple[Any, Any]:
    """Hugging Face's model and ours with the same random weights."""
    torch.manual_seed(0)
    stock = Phi3ForCausalLM(Phi3Config(**TINY, **config))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stock.save_pretrained(folder)
    return stock.eval(), tepatch.load("phi3", folder, backend="reference", progress=False)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def test_what_is_added_is_dropped_as_in_hugging_face(tmp_path: Path) -> None:
    stock, ours = pair(tmp_path, resid_pdrop=0.3)
    logits = {}
    for name, model in (("stock", stock), ("ours", ours)):
        evaluated = model(tokens(2, 12)).logits
        torch.manual_seed(7)
        logits[name] = model.train()(tokens(2, 12)).logits
        assert not torch.allclose(logits[name], evaluated, rtol=0.1), "dropout changes something"
    assert_close(logits["ours"], logits["stock"], terms=forward_terms(stock.config, 12))


def test_a_text_that_outgrows_the_original_length_goes_on_with_the_long_factors(tmp_path: Path) -> None:
    """Hugging Face then forgets its cache and computes all keys anew; a shorter text has the short factors again."""
    stock, ours = pair(tmp_path, rope_parameters=copy.deepcopy(LONGROPE))
    for length in (29, 40, 8):
        text = stock.generate(tokens(2, length), max_new_tokens=8, do_sample=False)
        assert torch.equal(ours.generate(tokens(2, length), max_new_tokens=8, do_sample=False), text)


def test_all_layers_have_the_window_whatever_layer_types_says(tmp_path: Path) -> None:
    stock, ours = pair(tmp_path, sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    assert_close(ours(tokens(2, 20)).logits, stock(tokens(2, 20)).logits, terms=forward_terms(stock.config, 20))
