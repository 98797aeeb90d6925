"""What is special to Mistral, beyond what every family is tried on in ``test_conformance.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MinistralConfig, MistralConfig, PreTrainedConfig

import tepatch
from tepatch.errors import PlanError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "sliding_window": 8,
}
SOME = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("name", "config", "windows"),
    [
        ("mistral", MistralConfig(**SIZES), [8, 8]),
        ("mistral", MistralConfig(**{**SIZES, "sliding_window": None}), [None, None]),
        ("ministral", MinistralConfig(**SIZES), [8, 8]),
        ("ministral", MinistralConfig(**SIZES, layer_types=SOME), [None, 8]),
    ],
)
def test_each_layer_has_the_window_that_the_config_says(
    name: str, config: PreTrainedConfig, windows: list[int | None]
) -> None:
    ours = tepatch.build(name, config, backend="reference")
    assert [layer.self_attn.window for layer in ours.model.layers] == windows


@pytest.mark.parametrize(
    ("name", "config"), [("mistral", MistralConfig(**SIZES)), ("ministral", MinistralConfig(**SIZES))]
)
def test_angles_stay_in_float32_when_the_model_is_cast(name: str, config: PreTrainedConfig) -> None:
    rotary: Any = tepatch.build(name, config, backend="reference").bfloat16().model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert all(table.dtype == torch.float32 for table in rotary(torch.ones(1, dtype=torch.bfloat16), torch.ones(1, 1)))


def test_a_config_of_mistral_with_kinds_of_layers_is_ministral_to_auto(tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_config(MinistralConfig(**SIZES, layer_types=SOME))
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "architectures": None}))
    ours = tepatch.load("auto", tmp_path, backend="reference", dtype=torch.float32)
    assert type(ours).__name__ == "MinistralForCausalLM"
    assert ours.model.layers[0].self_attn.window is None


def test_a_config_of_mistral_with_kinds_of_layers_is_refused_as_such() -> None:
    config = MistralConfig(**SIZES)
    config.layer_types = SOME
    with pytest.raises(PlanError, match="one window for all layers, whatever layer_types says"):
        tepatch.build("mistral", config, backend="reference")
