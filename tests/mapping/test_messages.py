"""Whole messages, as a user reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tepatch.errors import PlanError
from tepatch.planning import Spec


def message(case: Any) -> str:
    with pytest.raises(PlanError) as caught:
        case.plan("models/small")
    return str(caught.value)


def test_the_message_for_a_missing_part_reads_like_this(llama: Callable[..., Any]) -> None:
    case = llama()
    del case.sources["model.layers.1.mlp.up_proj.weight"]
    assert (
        message(case)
        == """\
llama.yaml does not fit models/small (1 problem)
llama.yaml:25:5: 1 tensor missing from the checkpoint
  model.layers.1.mlp.up_proj.weight
  expected: for model.layers.1.mlp.fc1_weight (one of 2 parts)
  fix: the checkpoint is incomplete, or of another model"""
    )


def test_the_message_for_a_config_of_another_size_reads_like_this(llama: Callable[..., Any]) -> None:
    case = llama(groups=2)
    case.sources |= {name: spec for name, spec in llama(groups=4).sources.items() if "k_proj" in name}
    assert (
        message(case)
        == """\
llama.yaml does not fit models/small (1 problem)
llama.yaml:19:5: wrong shape: 3 tensors
  model.layers.{0..2}.self_attn.k_proj.weight
  expected: [16, 64]
  found:    [32, 64]
  fix: check that config.json belongs to this checkpoint"""
    )


def test_the_message_for_layers_that_are_not_there_reads_like_this(llama: Callable[..., Any]) -> None:
    case = llama()
    case.sources = llama(layers=1).sources
    assert (
        message(case)
        == """\
llama.yaml does not fit models/small (1 problem)
llama.yaml:2:19: the checkpoint has nothing for layer 1..2
  model.layers.{1..2}.input_layernorm.weight
  model.layers.{1..2}.self_attn.q_proj.weight
  model.layers.{1..2}.self_attn.k_proj.weight
  model.layers.{1..2}.self_attn.v_proj.weight
  ... and 5 more
  expected: 'layer' is num_hidden_layers in the config
  fix: check that config.json belongs to this checkpoint, and that the checkpoint is complete"""
    )


def test_the_message_for_two_problems_reads_like_this(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["hidden_act"] = "gelu"
    case.sources["model.rotary.inv_freq"] = Spec((4,), "F32")
    assert (
        message(case)
        == """\
llama.yaml does not fit models/small (2 problems)
llama.yaml:8:5: this layer computes SwiGLU
  expected: hidden_act == 'silu'
  found:    config.hidden_act = 'gelu'
  fix: this patch can not serve this model
llama.yaml: 1 tensor of the checkpoint that no rule uses
  model.rotary.inv_freq
  fix: add a rule, or list it under 'ignore' with the reason"""
    )


def test_the_message_for_a_source_that_is_wanted_twice_reads_like_this(llama: Callable[..., Any]) -> None:
    case = llama()
    case.text = case.text.replace("mlp.gate_proj.weight, mlp.up_proj", "mlp.gate_proj.weight, mlp.gate_proj")
    case.sources = {name: spec for name, spec in case.sources.items() if "up_proj" not in name}
    assert (
        message(case)
        == """\
llama.yaml does not fit models/small (1 problem)
llama.yaml:25:5: 3 tensors of the checkpoint not consumed exactly once: used twice
  model.layers.{0..2}.mlp.gate_proj.weight
  used for model.layers.{0..2}.mlp.fc1_weight"""
    )
