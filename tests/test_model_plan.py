"""What a patched model keeps of how it was loaded: one relation, and neither a model nor a checkpoint."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tepatch
from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.errors import PlanError
from tepatch.hf.model_plan import plan_of
from tepatch.planning import Plan

Make = Callable[..., Any]
Save = Callable[..., Path]


def load(source: Any, **arguments: Any) -> Any:
    return tepatch.load("llama", source, backend="reference", progress=False, **arguments)


def reached(start: object) -> list[object]:
    """All that is kept alive by ``start``, but for classes, modules and what these hold."""
    seen: dict[int, object] = {}
    todo = [start]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, type) or (callable(each) and hasattr(each, "__globals__")):
            continue
        if type(each).__name__ == "module":
            continue
        seen[id(each)] = each
        todo += gc.get_referents(each)
    return list(seen.values())


def test_what_a_model_keeps_holds_no_model_and_no_checkpoint(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = load(save_checkpoint(tiny_llama()))
    for asked in ("names", "memory_names", "other_layouts"):
        getattr(plan_of(model), asked)
    for kept in (plan_of(model), model.tepatch):
        held = reached(kept)
        assert [each for each in held if isinstance(each, Plan)]
        assert not [each for each in held if isinstance(each, torch.nn.Module | torch.Tensor | FolderCheckpoint)]


def test_a_copy_shares_the_plan_and_not_the_original(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = load(save_checkpoint(tiny_llama()))
    other = copy.deepcopy(model)
    assert plan_of(other) is plan_of(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None  # without the garbage collector


def test_each_plan_is_made_once(tiny_llama: Make, save_checkpoint: Save) -> None:
    plan = plan_of(load(save_checkpoint(tiny_llama())))
    assert plan.names is plan.names
    assert plan.memory_names is plan.memory_names
    assert plan.other_layouts is plan.other_layouts
    assert [each.patch for each in plan.other_layouts] == ["llama"]


def test_a_pickle_takes_the_plans_of_other_layouts_along(tiny_llama: Make, save_checkpoint: Save) -> None:
    plan = plan_of(load(save_checkpoint(tiny_llama())))
    again = pickle.loads(pickle.dumps(plan))
    assert again.locator is None
    assert again.other_layouts == plan.other_layouts
    assert again.relation == plan.relation


def test_a_checkpoint_that_is_open_is_taken_for_its_folder(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    checkpoint = open_checkpoint(folder)
    expected = load(folder)
    model = load(checkpoint)
    assert model.name_or_path == str(folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tepatch.plan("llama", checkpoint, backend="reference") == expected.tepatch.plan
    made = tepatch.convert("llama", checkpoint, tmp_path / "te", to="te", progress=False)
    assert made.source == str(folder)


@pytest.mark.parametrize(
    "said", [{"variant": "fp16"}, {"subfolder": "a"}, {"revision": "main"}, {"use_safetensors": True}]
)
def test_how_to_open_what_is_open_is_refused(
    said: dict[str, Any], tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tiny_llama()))
    for call in (
        lambda: load(checkpoint, **said),
        lambda: tepatch.plan("llama", checkpoint, **said),
        lambda: tepatch.convert("llama", checkpoint, tmp_path / "te", **said),
    ):
        with pytest.raises(PlanError, match="is open already") as error:
            call()
        assert f"open_checkpoint(folder, {next(iter(said))}=" in error.value.problems[0].fix
