"""A converted checkpoint that is no longer what was converted is not converted back, and can be told before a load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tepatch
from tepatch.checkpoint import open_checkpoint
from tepatch.dtypes import torch_dtype
from tepatch.errors import CheckpointError, PlanError
from tepatch.hf.model_plan import plan_of

Make = Callable[..., Any]
Save = Callable[..., Path]
CHANGED = "are not what they were when this checkpoint was converted"


def convert(source: Path, destination: Path, **options: Any) -> tepatch.conversion.Converted:
    return tepatch.convert("llama", source, destination, progress=False, **options)


def load(folder: Path, **options: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", progress=False, **options)


def flip(folder: Path, name: str) -> None:
    """Change one bit of the exponent of a number in the middle of a tensor."""
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[name]
    with (folder / info.file).open("r+b") as stream:
        size = torch_dtype(info.dtype).itemsize
        stream.seek(info.offset + info.nbytes // size // 2 * size + size - 1)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x01]))


def assert_back(back: Path, source: Path) -> None:
    ours, theirs = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def source(tiny_llama: Make, save_checkpoint: Save) -> Path:
    return save_checkpoint(tiny_llama(dtype=torch.bfloat16))


LAYER = "model.layers.1"
DAMAGED = {
    f"{LAYER}.self_attn.qkv.weight": rf"{LAYER}\.self_attn\.[kqv]_proj\.weight",
    f"{LAYER}.self_attn.qkv.layernorm_weight": rf"{LAYER}\.input_layernorm\.weight",
    f"{LAYER}.mlp.fc1_weight": rf"{LAYER}\.mlp\.(gate|up)_proj\.weight",
    "model.embed_tokens.weight": r"model\.embed_tokens\.weight",
}
"""A parameter, and what of the original its middle is of."""


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("held", ["auto", "float32"])
@pytest.mark.parametrize("name", DAMAGED)
def test_one_bit_that_changed_stops_the_way_back(
    name: str, held: str, dtype: str, source: Path, tmp_path: Path
) -> None:
    te = convert(source, tmp_path / "te", dtype=held).destination
    flip(te, name)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=CHANGED) as caught:
        convert(te, tmp_path / "back", dtype=dtype, workers=3)
    (detail,) = caught.value.problems[0].details
    assert re.fullmatch(DAMAGED[name], detail)
    assert not (tmp_path / "back").exists()
    assert [each for each in sorted(os.listdir(tmp_path)) if not each.endswith("-partial")] == before
    with pytest.raises(CheckpointError, match=CHANGED):
        load(te, check_digests=True)


def test_what_is_whole_comes_back_and_loads(source: Path, tmp_path: Path) -> None:
    for held in ("auto", "float32"):
        te = convert(source, tmp_path / f"te-{held}", dtype=held, max_shard_size="60KB").destination
        back = convert(te, tmp_path / f"back-{held}").destination
        assert_back(back, source)
        assert not any("digest" in note for note in load(te, check_digests=True).tepatch.notes)


def test_tensors_that_changed_names_are_told(source: Path, tmp_path: Path) -> None:
    te = convert(source, tmp_path / "te").destination
    tensors = load_file(te / "tepatch.safetensors")
    one, other = (f"model.layers.{layer}.mlp.fc2_weight" for layer in (0, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, te / "tepatch.safetensors")
    load(te)  # names and shapes are right, and nothing else is looked at
    for call in (lambda: convert(te, tmp_path / "back"), lambda: load(te, check_digests=True)):
        with pytest.raises(CheckpointError, match=CHANGED) as caught:
            call()
        assert caught.value.problems[0].details == ("model.layers.{0,2}.mlp.down_proj.weight",)


def test_a_file_with_what_is_wrong_is_not_kept_for_another_run(source: Path, tmp_path: Path) -> None:
    te = convert(source, tmp_path / "te").destination
    flip(te, "lm_head.weight")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=CHANGED):
            convert(te, tmp_path / "back", max_shard_size="20KB", workers=1)
    assert not (tmp_path / "back").exists()


def test_copied_again_it_is_converted_back(source: Path, tmp_path: Path) -> None:
    """The advice."""
    te = convert(source, tmp_path / "te").destination
    whole = (te / "tepatch.safetensors").read_bytes()
    flip(te, "lm_head.weight")
    with pytest.raises(CheckpointError, match=CHANGED):
        convert(te, tmp_path / "back")
    (te / "tepatch.safetensors").write_bytes(whole)
    assert_back(convert(te, tmp_path / "back").destination, source)


def test_what_was_rounded_has_no_digest_and_is_named(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama(dtype=torch.float32))
    te = convert(folder, tmp_path / "te", dtype="bfloat16").destination
    made = convert(te, tmp_path / "back")
    assert any("30 tensors do not come back bit for bit, and no digest" in note for note in made.notes)
    assert any("no digest was compared" in note for note in load(te, check_digests=True).tepatch.notes)


def test_a_third_layout_has_no_digests_of_what_is_given_back(source: Path, tmp_path: Path) -> None:
    model = load(source)
    third = tmp_path / "third"
    third.mkdir()
    (plan,) = plan_of(model).other_layouts
    tensors = tepatch.transfer.fill.restore_tensors(plan, dict(model.named_parameters()))
    save_file({name: tensor.float() for name, tensor in tensors}, third / "model.safetensors")
    (third / "config.json").write_text((source / "config.json").read_text())
    te = convert(third, tmp_path / "te", to="te").destination
    made = convert(te, tmp_path / "back")
    assert any("converted from a third layout" in note for note in made.notes)
    assert_back(made.destination, source)


def test_a_manifest_that_was_edited_gives_nothing_back(source: Path, tmp_path: Path) -> None:
    """With another dtype there, numbers would be rounded, and the digests said to be of other tensors."""
    te = convert(source, tmp_path / "te").destination
    text = (te / "tepatch.json").read_text()
    (te / "tepatch.json").write_text(text.replace('"BF16"', '"F16"', 1))
    for call in (lambda: convert(te, tmp_path / "back"), lambda: load(te, check_digests=True)):
        with pytest.raises(CheckpointError, match=r"tepatch\.json: this file has been changed since it was written"):
            call()
    assert not (tmp_path / "back").exists()
    (te / "tepatch.json").write_text(json.dumps(json.loads(text)))  # the same, with other spaces
    assert_back(convert(te, tmp_path / "back").destination, source)


def test_digests_are_checked_only_where_there_are_any(source: Path) -> None:
    with pytest.raises(PlanError, match=r"check_digests: there are digests in the manifest of a converted"):
        load(source, check_digests=True)
