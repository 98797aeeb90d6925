"""What cases of decoders share: sizes, and a refusal for each requirement that their mappings share."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tepatch.mapping import parse_mapping
from tepatch.testing import Case, check_patch, refusals, small_sizes, wide_sizes


@pytest.mark.parametrize("sizes", [small_sizes, wide_sizes])
def test_sizes_are_changed_by_fields_and_by_nobody_else(sizes: object) -> None:
    assert callable(sizes)
    assert sizes(head_dim=24, vocab_size=99) == {**sizes(), "head_dim": 24, "vocab_size": 99}
    sizes()["vocab_size"] = 0
    assert sizes()["vocab_size"] > 0


def test_every_requirement_of_the_shared_mapping_has_a_refusal_that_it_makes() -> None:
    case = Case("tiny", LlamaConfig(**small_sizes()), refuse=refusals())
    found = check_patch("llama", [case], checks=["refusals"])
    found.raise_for_failures()
    assert found.not_refuted == []


def test_refusals_are_named_after_the_requirements_of_the_shared_mapping(tmp_path: Path) -> None:
    text = "version: 1\nextends: tepatch.te:decoder.tepatch.yaml\nparameters: {}\n"
    names = [each.name for each in parse_mapping(text, folder=tmp_path).requires]
    assert all(names)
    assert refusals(**dict.fromkeys(names)) == []


def test_refusals_are_replaced_added_and_moved_inside() -> None:
    rope = {"rope_parameters.rope_type": "yarn"}
    found = refusals(inside="text_config", rope=rope, window={"sliding_window": 0, "layer_types": []})
    assert len(found) == len(refusals()) + 1
    assert {"text_config.rope_parameters.rope_type": "yarn"} in found
    assert found[-1] == {"text_config.sliding_window": 0, "text_config.layer_types": []}
