"""What is special to Mistral, beyond what every family is tried on in ``test_conformance.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rounding import assert_close, forward_terms
from transformers import AutoModelForCausalLM, MinistralConfig, MistralConfig

import tepatch
from tepatch.errors import PlanError
from tepatch.testing import small_sizes

SIZES = small_sizes(num_hidden_layers=2, head_dim=16, sliding_window=8)
SOME = ["full_attention", "sliding_attention"]


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


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"])
@pytest.mark.parametrize("patch", ["auto", "ministral"])
def test_architectures_of_mistral_with_kinds_of_layers_are_ministrals_as_in_transformers(
    patch: str, auto_class: str, tmp_path: Path
) -> None:
    auto: Any = getattr(transformers, auto_class)
    stock = auto.from_config(MinistralConfig(**SIZES, layer_types=SOME))
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    named = [name.replace("Ministral", "Mistral") for name in config["architectures"]]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "architectures": named}))
    theirs = auto.from_pretrained(tmp_path)
    ours = tepatch.load(patch, tmp_path, backend="reference", dtype=torch.float32)
    assert type(ours) is type(theirs)
    assert ours.config.architectures == [type(theirs).__name__]
    ids = torch.arange(3, 27).reshape(1, -1)  # three windows
    with torch.no_grad():
        assert_close(ours(ids)[0], theirs(ids)[0], terms=forward_terms(ours.config, 24))
