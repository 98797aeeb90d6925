"""Qwen 3 VL: the text part is patched, pictures and their positions are the stock model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import tepatch
from tepatch.testing import small_sizes
from tepatch_qwen.vl import Qwen3VLTextDecoderLayer

IMAGE, START = 100, 101


def checkpoint(folder: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 3, 3]}
    text = small_sizes(head_dim=24, rope_parameters=rope)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def picture() -> dict[str, torch.Tensor]:
    """A row with 4 x 4 patches, which are four tokens, and text around them."""
    ids = torch.randint(1, 99, (1, 30))
    ids[0, 5], ids[0, 6:10] = START, IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_save_pretrained_writes_the_names_of_the_stock_round_trip(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint")
    ours = tepatch.load("auto", tmp_path / "checkpoint", backend="reference")
    ours.save_pretrained(tmp_path / "ours")
    Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "stock")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_text_with_a_picture_is_the_stock_models(tmp_path: Path) -> None:
    stock = checkpoint(tmp_path / "stock")
    model = tepatch.load("auto", tmp_path / "stock", backend="reference")
    assert type(model) is Qwen3VLForConditionalGeneration
    assert all(type(layer) is Qwen3VLTextDecoderLayer for layer in model.model.language_model.layers)
    inputs = picture()
    other = {**inputs, "pixel_values": torch.randn(16, 3 * 2 * 4 * 4)}
    with torch.no_grad():
        expected = stock(**inputs).logits
        assert (stock(**other).logits - expected).abs().max() > 0.01 * expected.abs().max(), "the picture counts"
        # The picture's layers are fewer and narrower than the text's, which have a norm more of queries and keys.
        assert_close(model(**inputs).logits, expected, terms=3 * forward_terms(stock.config, 30))
        said = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **said), stock.generate(**inputs, **said))
