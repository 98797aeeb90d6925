"""How a mapping's expressions see a Hugging Face config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Gemma3Config, GPT2Config, LlamaConfig

from tepatch.errors import CheckpointError, PlanError
from tepatch.hf.config import ConfigFields, model_class, read_config
from tepatch.mapping.expressions import MissingField, parse


def test_fields_aliases_and_nested_fields_are_found() -> None:
    assert parse("hidden_size // num_attention_heads").evaluate(ConfigFields(GPT2Config(n_embd=48, n_head=4))) == 12
    fields = ConfigFields(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert parse("rope_parameters.rope_theta").evaluate(fields) == 5e5
    assert (
        parse("text_config.num_hidden_layers + 1").evaluate(
            ConfigFields(Gemma3Config(text_config={"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}))
        )
        == 8
    )


@pytest.mark.parametrize("name", ["hidden_sise", "to_dict", "_attn_implementation"])
def test_what_is_no_field_is_missing(name: str) -> None:
    with pytest.raises(MissingField, match=name):
        parse(name).evaluate(ConfigFields(LlamaConfig()))


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"model_type": "nobody_knows_this"}'])
def test_a_config_that_can_not_be_read_is_an_error_with_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_the_model_class_is_the_architecture_or_else_the_causal_model() -> None:
    assert model_class(LlamaConfig()).__name__ == "LlamaForCausalLM"
    assert model_class(LlamaConfig(architectures=["LlamaModel"])).__name__ == "LlamaModel"
    from transformers import CLIPVisionConfig

    with pytest.raises(PlanError, match="clip_vision_model"):
        model_class(CLIPVisionConfig())


def test_code_from_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
