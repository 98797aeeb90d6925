"""What is special to Qwen, beyond what every family is tried on in ``test_conformance.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3Config

import tepatch
from tepatch.testing import small_sizes

SIZES = small_sizes(num_hidden_layers=2)
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("name", "config", "biases"),
    [
        ("qwen2", Qwen2Config(**SIZES), ["qkv.bias"]),
        ("qwen3", Qwen3Config(**SIZES, head_dim=24), []),
        ("qwen3", Qwen3Config(**SIZES, head_dim=24, attention_bias=True), ["qkv.bias", "proj.bias"]),
    ],
)
def test_no_number_can_be_trained_that_hugging_faces_model_does_not_have(
    name: str, config: PreTrainedConfig, biases: list[str]
) -> None:
    stock = AutoModelForCausalLM.from_config(config)
    ours = tepatch.build(name, config, backend="reference")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())
    layer = ours.model.layers[1]
    assert [n for n, _ in layer.named_parameters() if n.endswith("bias")] == [f"self_attn.{n}" for n in biases]
    fresh = {n: p for n, p in stock.state_dict().items() if p.dim() == 1}  # norms and biases: not random
    assert fresh
    assert all(torch.equal(ours.state_dict()[n], p) for n, p in fresh.items())


def test_masks_that_generation_makes_for_each_kind_of_layer_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, **WINDOW, initializer_range=0.2, eos_token_id=None)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    ours = tepatch.load("auto", tmp_path, backend="reference", dtype=torch.float32)
    ids = torch.randint(1, 128, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    texts = [model.generate(ids * mask, cache_implementation="static", **arguments) for model in (stock, ours)]
    assert torch.equal(*texts)
    assert len(texts[0].unique()) > 12  # and not the same token again and again
