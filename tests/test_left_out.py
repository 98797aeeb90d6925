"""What a checkpoint lists and nothing needs does not stop a load: names without a tensor, entries that are none."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tepatch
from tepatch.errors import PlanError
from tepatch.hf.model_plan import plan_of

Make = Callable[..., Any]
Save = Callable[..., Path]


def load(folder: Path, **options: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", progress=False, **options)


def name_in_index(folder: Path, name: str, *, kind: str = "safetensors") -> None:
    path = next(folder.glob(f"*.{kind}.index.json"))
    index = json.loads(path.read_text())
    index["weight_map"][name] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def assert_same(ours: Any, theirs: Any) -> None:
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("drop", [(), ("mtp.fc.weight",)])
def test_an_index_may_name_what_no_file_holds(
    kind: str, drop: tuple[str, ...], tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2, kind=kind)
    name_in_index(folder, "mtp.fc.weight", kind=kind)
    model = load(folder, drop=drop)
    assert_same(model, LlamaForCausalLM.from_pretrained(folder))
    assert "the index names 1 tensors that no file holds: mtp.fc.weight" in str(model.tepatch)
    made = tepatch.convert("llama", folder, tmp_path / "te", drop=drop, progress=False)
    assert any("no file holds: mtp.fc.weight" in note for note in made.notes)


def test_what_no_file_holds_and_a_rule_needs_is_an_error(tiny_llama: Make, save_checkpoint: Save) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    folder = save_checkpoint(tiny_llama(), shards=2, drop=(missing,))
    name_in_index(folder, missing)
    name_in_index(folder, "mtp.fc.weight")
    with pytest.raises(PlanError, match="the index names tensors that no file holds") as caught:
        load(folder)
    assert missing in str(caught.value.problems[0])
    assert caught.value.problems[-1].details == (missing,)


EXTRA = "model.layers.0.self_attention.proj._extra_state"


def te_llama(folder: Path, extra: Any) -> Path:
    """The folder of a Llama in te_llama's layout, as a ``.bin`` with ``extra`` in it."""
    model = load(folder)
    (plan,) = plan_of(model).other_layouts
    tensors = dict(tepatch.transfer.fill.restore_tensors(plan, dict(model.named_parameters())))
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, EXTRA: extra}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("extra", [None, io.BytesIO(b""), io.BytesIO(b"scales"), torch.zeros(0, dtype=torch.uint8)])
def test_what_the_mapping_ignores_need_not_be_a_tensor(
    extra: Any, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    model = load(te_llama(save_checkpoint(stock), extra))
    assert_same(model, stock)
    assert model.tepatch.layout == "te_llama"
    made = tepatch.convert("llama", tmp_path / "checkpoint", tmp_path / "te", to="te", progress=False)
    if not isinstance(extra, torch.Tensor):
        assert any("1 entries are no tensors, and are left out" in note for note in made.notes)


@pytest.mark.parametrize(
    ("extra", "what"), [(None, "this entry is no tensor\n"), (io.BytesIO(b"x"), "bytes in a BytesIO")]
)
def test_what_nothing_leaves_out_is_told_and_can_be_dropped(
    extra: Any, what: str, tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock, kind="bin", extra=None)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "lm_head.state": extra}, folder / "pytorch_model.bin")
    with pytest.raises(PlanError, match=what) as caught:
        load(folder)
    assert "leave it out: drop=['lm_head.state']" in caught.value.problems[-1].fix
    assert_same(load(folder, drop=["lm_head.state"]), stock)
