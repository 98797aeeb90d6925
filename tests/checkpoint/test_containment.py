"""A checkpoint cannot make tepatch open a file outside its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A checkpoint file that is not in the folder which the tests open."""
    folder = tmp_path / "outside"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "secret.safetensors")
    return folder / "secret.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../outside/secret.safetensors", "leads out of the folder"),
        ("sub/../../outside/secret.safetensors", "leads out of the folder"),
        ("{outside}", "absolute path"),
        ("C:/secret.safetensors", "absolute path"),
        ("..\\\\outside\\\\secret.safetensors", "backslash"),
        ("a\0.safetensors", "cannot be printed"),
        ("\ud800.safetensors", "cannot be printed"),
        ("", "it is empty"),
    ],
)
def test_a_shard_outside_the_folder_is_refused(
    folder: Path, outside: Path, write_index: Callable[..., Path], file: str, reason: str
) -> None:
    write_index(folder, {"w": file.format(outside=outside)})
    with pytest.raises(CheckpointError, match=f"file name of w is refused: .*{reason}"):
        open_checkpoint(folder)


def test_all_refused_shards_are_reported_at_once(folder: Path, write_index: Callable[..., Path]) -> None:
    write_index(folder, {"v": "../v.safetensors", "w": "/w.safetensors", "x": "../v.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert len(caught.value.problems) == 2


def test_a_shard_which_is_a_link_out_of_the_folder_is_refused(
    folder: Path, outside: Path, write_index: Callable[..., Path]
) -> None:
    (folder / "x.safetensors").symlink_to(outside)
    write_index(folder, {"w": "x.safetensors"})
    with pytest.raises(CheckpointError, match="link that leads out of the checkpoint's folder"):
        open_checkpoint(folder)


def test_a_folder_of_shards_which_is_a_link_is_refused(
    folder: Path, outside: Path, write_index: Callable[..., Path]
) -> None:
    (folder / "parts").symlink_to(outside.parent)
    write_index(folder, {"w": "parts/secret.safetensors"})
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_the_first_file_may_not_be_a_link_out_of_the_folder(folder: Path, outside: Path, name: str) -> None:
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(folder)


def test_a_subfolder_may_not_lead_out_of_the_folder(folder: Path, outside: Path) -> None:
    save_file({"w": torch.zeros(1)}, outside.parent / "model.safetensors")
    (folder / "link").symlink_to(outside.parent)
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(folder, subfolder="link")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_checkpoint(folder, subfolder="../outside")


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "step-100.safetensors")
    (folder / "model.safetensors").symlink_to("step-100.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["w"]


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (tmp_path / "latest").symlink_to(folder)
    assert open_checkpoint(tmp_path / "latest").location == str(tmp_path / "latest")


@pytest.mark.parametrize("target", ["model.safetensors", "nowhere"])
def test_a_link_to_nothing_is_missing_and_not_passed_over(folder: Path, target: str) -> None:
    (folder / "model.safetensors").symlink_to(target)
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is missing"):
        open_checkpoint(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(folder)
