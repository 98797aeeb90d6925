"""Reading gives the tensors that the headers promised, or an error that names file and tensor."""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import Checkpoint, open_checkpoint
from tepatch.checkpoint.reading import BLOCK, ByteReader, FileStamp
from tepatch.dtypes import ITEM_SIZES, dtype_code, torch_dtype
from tepatch.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[".safetensors", ".bin"])
def stored(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    write_shards: Callable[..., Path],
    two_shards: dict[str, Tensors],
) -> tuple[Checkpoint, Tensors]:
    """An open checkpoint of two shards of either kind, and its tensors."""
    shards = {file.replace(".safetensors", request.param): tensors for file, tensors in two_shards.items()}
    checkpoint = open_checkpoint(write_shards(tmp_path, shards))
    return checkpoint, {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def test_every_tensor_comes_back_bit_by_bit(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, tensors = stored
    for file in checkpoint.files:
        with checkpoint.open(file) as shard:
            for info in checkpoint.tensors.values():
                if info.file == file:
                    read = shard.read(info)
                    expected = tensors.pop(info.name)
                    assert read.dtype == expected.dtype == torch_dtype(info.dtype)
                    assert not read.requires_grad
                    assert torch.equal(read, expected)
    assert not tensors


def test_views_and_parameters_of_a_pickle_are_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"t": base.t(), "row": base[1], "p": torch.nn.Parameter(base)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open("pytorch_model.bin") as shard:
        for name, tensor in tensors.items():
            read = shard.read(checkpoint.tensors[name])
            assert torch.equal(read, tensor)
            assert type(read) is torch.Tensor
            assert not read.requires_grad


def test_a_tensor_outlives_its_reader(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, tensors = stored
    info = checkpoint.tensors["a"]
    with checkpoint.open(info.file) as shard:
        read = shard.read(info)
    assert torch.equal(read, tensors["a"])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux to list the files in use")
def test_nothing_stays_open_after_the_block(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, _ = stored
    info = checkpoint.tensors["a"]
    path = str(checkpoint.config_folder / info.file)
    with checkpoint.open(info.file) as shard:
        shard.read(info)
        assert path in Path("/proc/self/maps").read_text()
    gc.collect()
    assert path not in Path("/proc/self/maps").read_text()
    with pytest.raises(CheckpointError, match="a: cannot be read"):
        shard.read(info)


def test_an_error_in_the_block_passes_through(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, _ = stored
    with pytest.raises(ZeroDivisionError), checkpoint.open(checkpoint.files[0]):
        raise ZeroDivisionError


def test_a_file_that_is_not_of_the_checkpoint_cannot_be_opened(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, _ = stored
    with pytest.raises(CheckpointError, match=r"'x.bin' is not a file of this checkpoint"):
        checkpoint.open("x.bin").__enter__()


def test_a_tensor_of_another_shard_is_refused_by_name(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, _ = stored
    first, second = checkpoint.files
    with (
        checkpoint.open(first) as shard,
        pytest.raises(CheckpointError, match=f"{first}: c: cannot be read"),
    ):
        shard.read(checkpoint.tensors["c"])
    assert second


@pytest.mark.parametrize("during", [False, True], ids=["before it is opened", "while it is open"])
@pytest.mark.parametrize("change", ["size", "mtime", "gone", "bytes", "file"])
def test_a_file_that_changed_since_its_header_was_read_is_refused(
    stored: tuple[Checkpoint, Tensors], change: str, during: bool
) -> None:
    checkpoint, _ = stored
    info = checkpoint.tensors["a"]
    path = checkpoint.config_folder / info.file

    def apply_change() -> None:
        status = path.stat()
        if change == "gone":
            path.unlink()
            return
        # What neither size nor time of writing shows: other bytes, and another file of the same bytes.
        if change == "bytes":
            path.write_bytes(bytes(status.st_size))
        if change == "file":
            shutil.copyfile(path, path.with_name("other"))
            os.rename(path.with_name("other"), path)
        if change == "size":
            os.truncate(path, status.st_size + 1)
        later = 1 if change == "mtime" else 0
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))

    def read() -> None:
        with checkpoint.open(info.file) as shard:
            if during:
                apply_change()
            shard.read(info)

    if not during:
        apply_change()
    with pytest.raises(CheckpointError, match=f"{info.file}: (has changed|is gone) since its header was read"):
        read()


def test_a_tensor_that_is_not_as_promised_is_refused(stored: tuple[Checkpoint, Tensors]) -> None:
    checkpoint, _ = stored
    info = checkpoint.tensors["a"]
    with checkpoint.open(info.file) as shard:
        for wrong in (replace(info, shape=(3, 2)), replace(info, dtype="I32")):
            with pytest.raises(CheckpointError, match="a: is not the tensor that the header promised"):
                shard.read(wrong)


@pytest.mark.parametrize("field", ["size", "mtime_ns", "ctime_ns", "inode", "device"])
def test_each_field_of_a_stamp_is_compared(field: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    stamp = FileStamp.of(tmp_path / "file", where="file")
    stamp.verify()
    names = {"inode": "st_ino", "device": "st_dev"}
    assert getattr(stamp, field) == getattr(os.stat(tmp_path / "file"), names.get(field, f"st_{field}"))
    with pytest.raises(CheckpointError, match="file: has changed since its header was read"):
        replace(stamp, **{field: getattr(stamp, field) + 1}).verify()


@pytest.mark.parametrize(("change", "what"), [("gone", "is gone"), ("other", "has changed")])
def test_a_file_that_changes_while_its_bytes_are_opened_is_refused(
    change: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4)}, path)
    checkpoint = open_checkpoint(tmp_path)
    opened = os.open
    descriptors: list[int] = []

    def opening(name: Any, *arguments: Any, **options: Any) -> int:
        if change == "gone":
            path.unlink()
        else:
            shutil.copyfile(path, path.with_name("other"))
            os.rename(path.with_name("other"), path)
        descriptors.append(opened(name, *arguments, **options))
        return descriptors[-1]

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {what} since its header was read"):
        ByteReader(checkpoint.stamps["model.safetensors"])
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_goes_while_it_is_opened_is_told_as_gone(
    kind: str, tmp_path: Path, write_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path, {f"x.{kind}": {"w": torch.ones(4)}}) / f"x.{kind}"
    checkpoint = open_checkpoint(tmp_path)
    looked = os.stat

    def looking(name: Any, **options: Any) -> os.stat_result:
        found = looked(name, **options)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "stat", looking)
    with pytest.raises(CheckpointError, match=f"x.{kind}: is gone"), checkpoint.open(f"x.{kind}"):
        pass


@pytest.mark.parametrize("code", ITEM_SIZES)
def test_every_dtype_of_the_table_is_read_as_its_torch_dtype(
    tmp_path: Path, write_raw: Callable[..., Path], code: str
) -> None:
    dtype = torch_dtype(code)
    assert dtype is not None
    assert dtype.itemsize == ITEM_SIZES[code]
    assert dtype_code(dtype) == code
    nbytes = 3 * ITEM_SIZES[code]
    header = {"w": {"dtype": code, "shape": [3], "data_offsets": [0, nbytes]}}
    write_raw(tmp_path / "model.safetensors", header, data=nbytes)
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open("model.safetensors") as shard:
        assert shard.read(checkpoint.tensors["w"]).dtype == dtype


def test_the_real_checkpoint_opens_and_reads(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    index = json.loads((smollm2 / "model.safetensors.index.json").read_text())
    assert set(checkpoint.tensors) == set(index["weight_map"])
    info = checkpoint.tensors["model.embed_tokens.weight"]
    with checkpoint.open(info.file) as shard:
        assert shard.read(info).isfinite().all()


def test_bytes_that_begin_and_end_anywhere_are_read_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = torch.randn(1 << 24)
    save_file({"w": values}, path)
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    info = open_checkpoint(path).tensors["w"]
    reader = ByteReader(open_checkpoint(path).stamps[path.name], past_cache=True)
    try:
        if not reader.can_bypass:
            pytest.skip("this file system has no such reads")
        buffer = memoryview(mmap.mmap(-1, 64 * BLOCK))
        expected = values.view(torch.uint8).numpy().tobytes()
        for start, nbytes in ((0, 1), (1, 5000), (BLOCK - 1, 2), (12345, 60 * BLOCK), (values.nbytes - 777, 777)):
            at = reader.read_past_cache(buffer, info.offset + start, nbytes)
            assert at == (info.offset + start) % BLOCK
            assert buffer[at : at + nbytes] == expected[start : start + nbytes]
    finally:
        reader.close()
