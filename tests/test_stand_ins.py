"""A release of transformers that calls something otherwise, or does something else: an error or right numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import transformers

RELEASE = "5.24."
"""The release of which stand-ins are made."""

SEEN_WITHOUT_A_PROOF = {
    "a layer's cache has another name": "ReplaceError: transformers.models.llama.modeling_llama:LlamaDecoderLayer: "
    "forward of its replacement does not take 'states', which transformers",
    "a layer's angles have another name": "does not take 'rotary'",
    "a layer takes something new": "does not take 'strength'",
    "a layer is given something new by keyword": "UnsupportedError: strength: LlamaDecoderLayer was called with",
    "a layer's number has another name": "__init__ of its replacement does not take 'number'",
    "a layer gives a tuple": "too many values to unpack",
    "the rotary module's positions have another name": "unexpected keyword argument 'places'",
    "a cache's method has another name": "no attribute 'update'",
    "whether a cache has a fixed size has another name": "no attribute 'is_compileable'",
    "a mask's rule is given by another name": "UnsupportedError: rule: the mask function of tepatch was called with",
    "padding is given to masks by another name": "UnsupportedError: padding: the mask function of tepatch",
    "a rule has another name": "cannot import name 'causal_mask_function'",
}
"""The changes that are an error by themselves, and what it says."""
SEEN_BY_THE_PROOF = {"a cache takes values before keys", "causal attention looks less far"}
"""Changes of what is done, under the same names: only numbers show them."""
WITHOUT_EFFECT = {
    "nothing",
    "a decorator hides what a layer takes",
    "a rule's closure has another variable",
    "outputs have another field",
    "a decorator has another name",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not transformers.__version__.startswith(RELEASE):
        pytest.skip(f"the changes are to the files of transformers {RELEASE}x")
    folder = tmp_path_factory.mktemp("stand-ins")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
    command = [sys.executable, stand_ins.__file__, str(folder / "checkpoint"), str(folder / "copies")]
    environment = {**os.environ, "PYTHONPATH": str(Path(stand_ins.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True, env=environment)
    return {found["change"]: found for found in map(json.loads, done.stdout.splitlines())}


def test_every_change_has_an_expectation() -> None:
    assert stand_ins.CHANGES.keys() == {*SEEN_WITHOUT_A_PROOF, *SEEN_BY_THE_PROOF, *WITHOUT_EFFECT}


@pytest.mark.parametrize("name", SEEN_WITHOUT_A_PROOF)
def test_another_name_is_an_error_even_without_a_proof(name: str, outcomes: Any) -> None:
    found = outcomes[name]
    assert found["unproven"].startswith("error: ")
    assert SEEN_WITHOUT_A_PROOF[name] in found["unproven"]
    assert found["proven"].startswith("error: ")


@pytest.mark.parametrize("name", sorted(SEEN_BY_THE_PROOF))
def test_another_meaning_is_refused_by_the_proof(name: str, outcomes: Any) -> None:
    assert outcomes[name]["unproven"] == "different"  # or the change would not be one
    assert outcomes[name]["proven"].startswith("error: ProofError: 'llama' was not proven with transformers 5.24.")
    assert "does not compute what transformers' own does" in outcomes[name]["proven"]


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_does_not_concern_the_layers_changes_nothing(name: str, outcomes: Any) -> None:
    assert outcomes[name] == {"change": name, "unproven": "equal", "proven": "equal"}
