"""The reference modules have exactly the parameters of Transformer Engine's, recorded on a GPU, but for two names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tepatch.te import reference
from tepatch.te.nvidia.engine import NORM_NAMES

RECORDED = Path(__file__).parent / "te_schema.json"
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_te_schema.py"


def load_recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_te_schema", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = load_recorder()


def load_entries() -> list[dict[str, Any]]:
    if not RECORDED.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))["entries"]
    return entries


def test_the_real_schema_was_recorded_for_the_whole_grid() -> None:
    assert RECORDED.exists(), "run scripts/record_te_schema.py on a GPU machine and commit what it writes"
    entries = load_entries()
    assert len(entries) >= 30
    assert [{"module": e["module"], "args": e["args"]} for e in entries] == recorder.grid(), (
        "the grid has changed since it was recorded: run scripts/record_te_schema.py again"
    )


@pytest.mark.parametrize(
    "entry", load_entries(), ids=lambda e: e["module"] + "-" + "-".join(map(str, e["args"].values()))
)
def test_a_reference_module_has_the_parameters_of_the_real_one(entry: dict[str, Any]) -> None:
    args = recorder.constructor_arguments(entry["args"])
    device = {} if entry["module"] == "DotProductAttention" else {"device": "cpu"}
    module = getattr(reference, entry["module"])(**args, **device)
    recorded = [{**each, "name": NORM_NAMES.get(each["name"], each["name"])} for each in entry["parameters"]]
    assert recorder.describe(module) == recorded


@pytest.mark.parametrize("entry", recorder.grid(), ids=lambda e: e["module"])
def test_every_module_of_the_grid_also_builds_on_meta_and_keeps_no_other_state(entry: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = getattr(reference, entry["module"])(**recorder.constructor_arguments(entry["args"]))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]
