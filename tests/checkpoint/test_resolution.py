"""Which files are chosen: the order of transformers, variants, and what is said when nothing is found."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError

PLAIN = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]
FP16 = [
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.fp16.bin",
    "pytorch_model.bin.index.fp16.json",
]


@pytest.fixture
def folder(tmp_path: Path, write_index: Callable[..., Path]) -> Path:
    """Every kind of checkpoint at once: the name of its tensor tells which one was opened."""
    save_file({"shard": torch.zeros(1)}, tmp_path / "shard.safetensors")
    torch.save({"shard": torch.zeros(1)}, tmp_path / "shard.bin")
    for single, index, pickled, pickled_index in (PLAIN, FP16):
        save_file({single: torch.zeros(1)}, tmp_path / single)
        write_index(tmp_path, {"shard": "shard.safetensors"}, name=index)
        torch.save({pickled: torch.zeros(1)}, tmp_path / pickled)
        write_index(tmp_path, {"shard": "shard.bin"}, name=pickled_index)
    return tmp_path


@pytest.mark.parametrize(("variant", "order"), [(None, PLAIN), ("", PLAIN), ("fp16", FP16)])
def test_files_are_chosen_in_the_order_of_transformers(folder: Path, variant: str | None, order: list[str]) -> None:
    for entry, expected in zip(order, (order[0], "shard.safetensors", order[2], "shard.bin"), strict=True):
        chosen = open_checkpoint(folder, variant=variant)
        assert chosen.files == (expected,)
        (folder / entry).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint was found"):
        open_checkpoint(folder, variant=variant)


def test_use_safetensors_restricts_the_choice(folder: Path) -> None:
    assert open_checkpoint(folder, use_safetensors=True).files == ("model.safetensors",)
    assert open_checkpoint(folder, use_safetensors=False).files == ("pytorch_model.bin",)


def test_an_option_which_leaves_out_what_is_there_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"is there: pytorch_model.bin\n.*left out by use_safetensors"):
        open_checkpoint(tmp_path, use_safetensors=True)


def test_a_variant_that_would_work_is_suggested(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="did you mean variant='fp16'") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.problems[0].details == (
        *(f"looked for: {name}" for name in PLAIN),
        "is there: model.fp16.safetensors",
    )


def test_no_variant_is_suggested_where_only_the_plain_files_are(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="did you mean variant=None"):
        open_checkpoint(tmp_path, variant="fp16")


def test_other_files_of_weights_are_listed(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(CheckpointError, match=r"name the file itself, .*: consolidated.00.pth"):
        open_checkpoint(tmp_path)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-q8.gguf").touch()
    with pytest.raises(CheckpointError, match="does not read GGUF"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the path and the subfolder"):
        open_checkpoint(tmp_path)


def test_a_subfolder_is_opened(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "unet" / "model.safetensors")
    assert open_checkpoint(tmp_path, subfolder="unet").config_folder == tmp_path / "unet"
    with pytest.raises(CheckpointError, match="vae: there is no such folder"):
        open_checkpoint(tmp_path, subfolder="vae")


@pytest.mark.parametrize("name", [*PLAIN, *FP16, "shard.bin", "shard.safetensors"])
def test_a_file_can_be_named_itself(folder: Path, name: str) -> None:
    checkpoint = open_checkpoint(folder / name)
    assert list(checkpoint.tensors) == ["shard" if "index" in name or "shard" in name else name]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.gguf"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match="not a checkpoint file that tepatch reads"):
            open_checkpoint(tmp_path / name)


def test_options_without_a_meaning_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="revision='main' has no meaning: the path is a folder"):
        open_checkpoint(folder, revision="main")
    with pytest.raises(CheckpointError, match=r"variant='fp16', subfolder='x' has no meaning: .* one file"):
        open_checkpoint(folder / "model.safetensors", variant="fp16", subfolder="x")
    with pytest.raises(CheckpointError, match="not allowed by use_safetensors=True"):
        open_checkpoint(folder / "pytorch_model.bin", use_safetensors=True)
    with pytest.raises(CheckpointError, match="not allowed by use_safetensors=False"):
        open_checkpoint(folder / "model.safetensors.index.json", use_safetensors=False)


def test_converted_weights_are_never_looked_for_among_pickles(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "tepatch.safetensors")
    (tmp_path / "tepatch.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"use_safetensors=False has no meaning: tepatch.json says"):
        open_checkpoint(tmp_path, use_safetensors=False)
    for restriction in (None, True):  # no restriction of what is there: the manifest is what is wrong
        with pytest.raises(CheckpointError, match=r"tepatch.json") as caught:
            open_checkpoint(tmp_path, use_safetensors=restriction)
        assert "has no meaning" not in str(caught.value)


def test_a_folder_that_can_not_be_read_is_told_as_that(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be allowed to read everything, so the system's answers are made up."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=rf"{folder}: this folder can not be read\n.*permissions"):
        open_checkpoint(folder)


def test_a_folder_on_the_way_that_can_not_be_entered_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=r"on the way to it can not be entered\n.*namei"):
        open_checkpoint(folder / "shard.safetensors")
