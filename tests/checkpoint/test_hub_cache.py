"""A hub id is looked up in the local cache, whose links into ``blobs`` are allowed and no others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_index: Callable[..., Path]) -> Path:
    """``org/name`` in a cache as the hub's client lays it out: two shards and an index, all links."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / REVISION
    for folder in (blobs, snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    for blob, tensor, file in (("aa11", "a", "1.safetensors"), ("bb22", "b", "2.safetensors")):
        save_file({tensor: torch.ones(2)}, blobs / blob)
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    write_index(blobs, {"a": "1.safetensors", "b": "2.safetensors"}, name="cc33")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/cc33")
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_a_hub_id_opens_its_snapshot_in_the_cache(snapshot: Path, revision: str | None) -> None:
    checkpoint = open_checkpoint("org/name", revision=revision)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.config_folder == snapshot


def test_the_tensors_of_a_cached_checkpoint_can_be_read(snapshot: Path) -> None:
    checkpoint = open_checkpoint("org/name")
    with checkpoint.open("2.safetensors") as shard:
        assert torch.equal(shard.read(checkpoint.tensors["b"]), torch.ones(2))


def test_a_cached_pickle_is_known_by_its_name_and_not_by_its_blob(snapshot: Path) -> None:
    torch.save({"w": torch.ones(3)}, snapshot.parents[1] / "blobs" / "dd44")
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/dd44")
    checkpoint = open_checkpoint("org/name", use_safetensors=False)
    with checkpoint.open("pytorch_model.bin") as shard:
        assert torch.equal(shard.read(checkpoint.tensors["w"]), torch.ones(3))


def test_a_path_to_the_snapshot_opens_as_well(snapshot: Path) -> None:
    assert list(open_checkpoint(snapshot).tensors) == ["a", "b"]


def test_a_subfolder_of_a_snapshot_may_link_to_blobs(snapshot: Path) -> None:
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "model.safetensors").symlink_to("../../../blobs/aa11")
    assert list(open_checkpoint("org/name", subfolder="sub").tensors) == ["a"]


def test_a_format_that_was_not_downloaded_is_not_asked_for(snapshot: Path) -> None:
    # The hub's client remembers all files of the repository, and can refuse a snapshot for lacking some.
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    names = ["model.safetensors.index.json", "1.safetensors", "2.safetensors", "pytorch_model.bin"]
    listing = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0"} for name in names}}
    (trees / f"{REVISION}.json").write_text(json.dumps(listing))
    assert list(open_checkpoint("org/name").tensors) == ["a", "b"]


def test_a_link_from_a_snapshot_to_elsewhere_is_refused(snapshot: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    save_file({"b": torch.ones(2)}, other / "ee55")
    (snapshot / "2.safetensors").unlink()
    (snapshot / "2.safetensors").symlink_to(other / "ee55")
    with pytest.raises(CheckpointError, match=r"2.safetensors: this is a link that leads out"):
        open_checkpoint("org/name")


def test_blobs_which_are_a_link_to_elsewhere_are_refused(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint("org/name")


SHA256, SHA1 = "5" * 64, "a1" * 20


@pytest.fixture
def local_dir(snapshot: Path, tmp_path: Path) -> Path:
    """What older hub clients make of ``local_dir``: large files are links to blobs of the cache."""
    blobs = snapshot.parents[1] / "blobs"
    for name, tensor in ((SHA256, "a"), (SHA1, "b")):
        save_file({tensor: torch.ones(2)}, blobs / name)
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blobs / SHA256)
    return folder


@pytest.mark.parametrize("digest", [SHA256, SHA1])
def test_a_local_dir_of_an_older_client_is_opened(local_dir: Path, snapshot: Path, digest: str) -> None:
    (local_dir / "model.safetensors").unlink()
    (local_dir / "model.safetensors").symlink_to(os.path.relpath(snapshot.parents[1] / "blobs" / digest, local_dir))
    checkpoint = open_checkpoint(local_dir)
    (name,) = checkpoint.tensors
    with checkpoint.open("model.safetensors") as shard:
        assert torch.equal(shard.read(checkpoint.tensors[name]), torch.ones(2))


def test_a_local_dir_is_opened_where_the_cache_is_a_link(
    local_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "link"))
    assert list(open_checkpoint(local_dir).tensors) == ["a"]


def relink(local_dir: Path, target: Path) -> None:
    (local_dir / "model.safetensors").unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(2)}, target)
    (local_dir / "model.safetensors").symlink_to(target)


@pytest.mark.parametrize(
    "place",
    [
        "hub/models--org--name/blobs/private.safetensors",
        f"hub/models--org--name/blobs/{SHA256}0",
        f"hub/models--org--name/refs/{SHA256}",
        f"hub/models--org--name/blobs/more/{SHA256}",
        f"hub/datasets--org--name/blobs/{SHA256}",
        f"hub/{SHA256}",
        f"elsewhere/models--org--name/blobs/{SHA256}",
        f"hub/more/models--org--name/blobs/{SHA256}",
    ],
)
def test_other_links_from_a_local_dir_are_refused(local_dir: Path, tmp_path: Path, place: str) -> None:
    relink(local_dir, tmp_path / place)
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(local_dir)


def test_a_blob_that_is_a_link_to_elsewhere_is_not_followed(local_dir: Path, snapshot: Path, tmp_path: Path) -> None:
    blob = snapshot.parents[1] / "blobs" / SHA256
    blob.rename(tmp_path / SHA256)
    blob.symlink_to(tmp_path / SHA256)
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(local_dir)


def test_a_snapshot_may_not_use_that_to_reach_another_repository(snapshot: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--org--private" / "blobs" / SHA256
    other.parent.mkdir(parents=True)
    save_file({"b": torch.ones(2)}, other)
    (snapshot / "2.safetensors").unlink()
    (snapshot / "2.safetensors").symlink_to(other)
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint("org/name")


def test_links_to_blobs_are_refused_outside_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / REVISION
    for path in (folder, tmp_path / "blobs"):
        path.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "aa11")
    (folder / "model.safetensors").symlink_to("../../blobs/aa11")
    with pytest.raises(CheckpointError, match="link that leads out"):
        open_checkpoint(folder)


def test_a_model_which_is_not_in_the_cache_says_how_to_get_it(snapshot: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder, and no such model(.|\n)*hf download org/x"):
        open_checkpoint("org/x")
    with pytest.raises(CheckpointError, match="hf download org/name --revision v2"):
        open_checkpoint("org/name", revision="v2")


def test_a_path_to_nothing_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder, and this cannot be a hub id"):
        open_checkpoint(tmp_path / "nowhere")
