"""The types of rope that a mapping lets through, each in the case's own model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from tepatch.hf.config import ConfigFields
from tepatch.mapping.read import read_mapping
from tepatch.planning.requirements import requirement_problems
from tepatch.testing.cases import Bench, changed, rope_tables
from tepatch.testing.parity import hold_to_rounding, numbers
from tepatch.testing.results import Broken, Finding, NotApplicable

ORIGINAL = 32
"""For how many positions a model was made that the scaled types stretch: fewer than a row of a case has tokens."""
_NEAR = {"original_max_position_embeddings": ORIGINAL}
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_NEAR},
    "yarn": {"factor": 4.0, **_NEAR},
    "longrope": {"factor": 4.0, **_NEAR},
}
"""Parameters for each type that transformers has; two lists of factors come to the last one's."""
KEPT = ("rope_theta", "partial_rotary_factor")


def rope_types(bench: Bench) -> Finding:
    """Every type of rope that no ``requires`` excludes is Hugging Face's, also past its original length.

    For each of the config's tables of rope parameters, those of each type of layer where it has several.
    """
    tables = rope_tables(bench.config)
    if not tables:
        raise NotApplicable("the model has no rotary positions")
    rules = read_mapping(bench.patch.mapping_path())
    figures: dict[str, float] = {}
    for path, table in tables.items():
        for kind in TYPES:
            fields: dict[str, Any] = {path: _parameters(kind, table, bench.config)}
            if kind == "dynamic":  # its original length is the model's
                fields[path.partition("rope_parameters")[0] + "max_position_embeddings"] = ORIGINAL
            config = changed(bench.config, fields)
            if table["rope_type"] == kind or requirement_problems(rules, ConfigFields(config)):
                continue
            name = kind if len(tables) == 1 else f"{path.rpartition('.')[2]}, {kind}"
            other = Bench(bench.patch, replace(bench.case, config=config), bench.folder / f"rope-{len(figures)}")
            other.folder.mkdir()
            outs = []
            for model in other.models:
                with torch.no_grad():
                    outs.append(numbers(model(other.tokens(), **other.without_cache)))
            try:
                figures[name] = hold_to_rounding(other, *outs).figures["ours"]
            except Broken as error:
                raise Broken(f"rope type {name}: {error}") from error
    if not figures:
        raise NotApplicable("the mapping lets through no type of rope but the case's own")
    return Finding(detail=", ".join(figures), figures=figures)


def _parameters(kind: str, table: dict[str, Any], config: Any) -> dict[str, Any]:
    out = {name: table[name] for name in KEPT if name in table}
    out |= {"rope_type": kind, **copy.deepcopy(TYPES[kind])}
    if kind == "longrope":
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        count = int(head_dim * table.get("partial_rotary_factor", 1.0)) // 2
        out["short_factor"] = [1 + 0.5 * index / count for index in range(count)]
        out["long_factor"] = [1 + 3.0 * index / count for index in range(count)]
    return out
