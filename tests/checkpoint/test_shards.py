"""One file or many: the index is held against the files, and every disagreement is an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import TensorInfo, open_checkpoint
from tepatch.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
KINDS = pytest.mark.parametrize("suffix", [".safetensors", ".bin"])


def renamed(shards: dict[str, Tensors], suffix: str) -> dict[str, Tensors]:
    return {file.replace(".safetensors", suffix): tensors for file, tensors in shards.items()}


def test_a_single_file_is_described_by_its_header(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    info = checkpoint.tensors["w"]
    assert info == TensorInfo(
        name="w", shape=(2, 3), dtype="BF16", file="model.safetensors", offset=info.offset, nbytes=12
    )
    assert checkpoint.files == ("model.safetensors",)
    assert checkpoint.location == str(tmp_path)
    assert checkpoint.config_folder == tmp_path
    assert checkpoint.also_present == ()


@KINDS
def test_shards_are_described_in_the_order_of_their_names(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, Tensors], suffix: str
) -> None:
    shards = renamed(dict(reversed(two_shards.items())), suffix)
    checkpoint = open_checkpoint(write_shards(tmp_path, shards))
    assert checkpoint.files == tuple(sorted(shards))
    assert sorted(checkpoint.tensors) == ["a", "b", "c", "d"]
    places = [(info.file, info.offset) for info in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in checkpoint.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("I64", (4,), 32),
        "c": ("BF16", (5,), 10),
        "d": ("F16", (), 2),
    }


def test_shards_may_be_in_a_folder_below(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, Tensors]
) -> None:
    shards = {f"parts/{file}": tensors for file, tensors in two_shards.items()}
    assert open_checkpoint(write_shards(tmp_path, shards)).files == tuple(shards)


@KINDS
def test_a_missing_shard_is_named_with_the_number_of_its_tensors(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, Tensors], suffix: str
) -> None:
    write_shards(tmp_path, renamed(two_shards, suffix))
    gone = f"model-00002-of-00002{suffix}"
    (tmp_path / gone).unlink()
    with pytest.raises(CheckpointError, match=f"{gone}: is missing; the index places 2 tensors in it"):
        open_checkpoint(tmp_path)


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path: Path, write_index: Callable[..., Path]) -> None:
    (tmp_path / "x.safetensors").mkdir()
    write_index(tmp_path, {"w": "x.safetensors"})
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(tmp_path)


@KINDS
def test_a_tensor_that_is_in_another_shard_is_an_error(
    tmp_path: Path,
    write_shards: Callable[..., Path],
    write_index: Callable[..., Path],
    two_shards: dict[str, Tensors],
    suffix: str,
) -> None:
    shards = renamed(two_shards, suffix)
    write_shards(tmp_path, shards)
    first, second = shards
    index = "pytorch_model.bin.index.json" if suffix == ".bin" else "model.safetensors.index.json"
    write_index(tmp_path, {"a": first, "b": second, "ghost": first, "c": second}, name=index)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    (in_second,) = caught.value.problems
    assert "lacks 1 tensor" in in_second.what
    assert in_second.details == (f"b (it is in {first})",)


@KINDS
def test_what_the_index_names_and_no_shard_holds_is_absent(
    tmp_path: Path,
    write_shards: Callable[..., Path],
    write_index: Callable[..., Path],
    two_shards: dict[str, Tensors],
    suffix: str,
) -> None:
    shards = renamed(two_shards, suffix)
    write_shards(tmp_path, shards)
    first, second = shards
    index = "pytorch_model.bin.index.json" if suffix == ".bin" else "model.safetensors.index.json"
    write_index(tmp_path, {"a": first, "b": first, "ghost": first, "c": second, "d": second}, name=index)
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["a", "b", "c", "d"]
    assert checkpoint.absent == ("ghost",)


@KINDS
def test_a_tensor_in_two_shards_is_an_error_which_names_both(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, Tensors], suffix: str
) -> None:
    shards = renamed(two_shards, suffix)
    first, second = shards
    shards[second]["a"] = torch.zeros(1)
    write_shards(tmp_path, shards)
    with pytest.raises(CheckpointError, match=f"{second}: holds 1 tensor that {first} holds too\n  a\n"):
        open_checkpoint(tmp_path)


def test_a_tensor_which_the_index_does_not_list_is_kept(
    tmp_path: Path,
    write_shards: Callable[..., Path],
    write_index: Callable[..., Path],
    two_shards: dict[str, Tensors],
) -> None:
    write_shards(tmp_path, two_shards)
    first, second = two_shards
    write_index(tmp_path, {"a": first, "c": second})
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its index is not JSON"),
        ("[]", "its index is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["x"]}', "has no weight_map"),
        ('{"weight_map": {"w": "x.safetensors", "w": "y.safetensors"}}', "lists 'w' twice"),
        ('{"weight_map": {"w": 3}}', "the file of w is not a string"),
        ('{"weight_map": {"w\\u001b": "x.safetensors"}}', "name of a tensor .* cannot be printed"),
        ('{"weight_map": {"w": "x.bin"}}', "does not end in .safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_which_is_malformed_is_refused(tmp_path: Path, text: str, message: str, name: str) -> None:
    if name.startswith("pytorch"):
        text, message = (
            part.replace(".bin", ".PT").replace(".safetensors", ".bin").replace(".PT", ".safetensors")
            for part in (text, message)
        )
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_without_metadata_is_taken(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "x.safetensors"}}')
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def test_an_index_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as stream:
        stream.truncate(10**9)
    with pytest.raises(CheckpointError, match="larger than 100,000,000 bytes"):
        open_checkpoint(tmp_path)


def test_what_lies_beside_the_chosen_files_is_told(
    tmp_path: Path, write_shards: Callable[..., Path], two_shards: dict[str, Tensors]
) -> None:
    write_shards(tmp_path, two_shards)
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    first = next(iter(two_shards))
    shutil.copy(tmp_path / first, tmp_path / "model-00003-of-00003.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "config.json", "tokenizer.json"):
        (tmp_path / name).touch()
    assert open_checkpoint(tmp_path).also_present == (
        "model-00003-of-00003.safetensors",
        "pytorch_model.bin",
    )
