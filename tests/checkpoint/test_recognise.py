"""Files that are no weights are told by what they are, with advice that helps."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


def zipped() -> bytes:
    out = io.BytesIO()
    torch.save({"w": torch.ones(3)}, out)
    return out.getvalue()


NO_WEIGHTS = {
    "a pointer of git": (POINTER, "it is a Git LFS pointer", "run 'git lfs pull' in this folder"),
    "a page": (b"<!DOCTYPE html><html>Sign in</html>", "it is a web page", "hf auth login"),
    "a page after a mark": (b"\xef\xbb\xbf\n<html>", "it is a web page", "hf auth login"),
    "an answer in XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page", "again"),
    "JSON": (b'{"error": "Repository not found"}', "it is JSON", "again"),
    "an index": (
        b'{"weight_map": {"w": "x"}}',
        "it is an index in JSON",
        "an index is called model.saf",
    ),
    "words": (b"Invalid username or password.", "it is text ('Invalid username or password.')", "again"),
    "words with an escape": ("Entry\u202e not found".encode(), "", "again"),
    "nothing": (b"", "it is empty", "again"),
    "zeros": (bytes(100_000), "it is full of zeros", "again"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(range(100)), "it is a GGUF file", "convert it to safetensors"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(range(100)), "it is an HDF5 file", "convert it"),
    "an archive": (gzip.compress(b"weights"), "it is an archive (gzip)", "unpack it"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_a_file_is_is_said(kind: str, name: str, tmp_path: Path) -> None:
    content, what, advice = NO_WEIGHTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    wanted = "safetensors file" if name == "model.safetensors" else "PyTorch checkpoint"
    assert f"{name}: is not a {wanted}" in text
    assert what in text
    assert advice in text
    assert "\u202e" not in text


def test_a_pickle_is_told_by_either_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match="it is a bare pickle"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_weights_under_the_name_of_another_format_open_when_the_advice_is_taken(tmp_path: Path, variant: str) -> None:
    for ours, write in (
        (f"model{variant}.safetensors", lambda path: path.write_bytes(zipped())),
        (f"pytorch_model{variant}.bin", lambda path: save_file({"w": torch.ones(3)}, path)),
    ):
        write(tmp_path / ours)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path, variant=variant[1:] or None)
        fix = caught.value.problems[0].fix
        assert fix.startswith("rename it to ")
        renamed = (tmp_path / ours).rename(tmp_path / fix.removeprefix("rename it to "))
        assert list(open_checkpoint(tmp_path, variant=variant[1:] or None).tensors) == ["w"]
        renamed.unlink()


def test_an_empty_stub_beside_good_shards_is_named(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, dict[str, torch.Tensor]]
) -> None:
    write_shards(tmp_path, two_shards)
    _, second = two_shards
    (tmp_path / second).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{second}: is not a safetensors file: it is empty") as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_a_download_that_has_not_ended_is_named(
    suffix: str, tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, dict[str, torch.Tensor]]
) -> None:
    write_shards(tmp_path, two_shards)
    _, second = two_shards
    (tmp_path / second).rename(tmp_path / f"{second}{suffix}")
    with pytest.raises(CheckpointError, match=rf"{second}{suffix} is there: its download has not ended") as caught:
        open_checkpoint(tmp_path)
    assert "let the download end" in caught.value.problems[0].fix
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / f"model.safetensors{suffix}").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"its download has not ended: model\.safetensors{suffix}"):
        open_checkpoint(alone)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tepatch.json"])
def test_text_files_are_told_as_well(name: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "tepatch.safetensors")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: its (index|manifest) is not JSON: it is a Git LFS pointer"):
        open_checkpoint(tmp_path)


def test_a_tensor_may_begin_with_anything(tmp_path: Path) -> None:
    """What is whole is taken, whatever is in it."""
    tensors = {"w": torch.zeros(1000), "<html>": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"weight_map": "PK"})
    assert open_checkpoint(tmp_path).tensors.keys() == load_file(tmp_path / "model.safetensors").keys()
    (tmp_path / "model.safetensors").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="it is JSON"):
        open_checkpoint(tmp_path)
