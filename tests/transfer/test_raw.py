"""The limits that a load is measured against: they move every byte, and say so when they can not."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.errors import CheckpointError, LoadError
from tepatch.transfer import raw
from tepatch.transfer.raw import byte_files, cached_share, copy_bytes, forget, read_bytes, stream_bytes
from tepatch.transfer.settings import Reading

CPU = torch.device("cpu")
ODD = Reading(threads=3, piece_bytes=5000)  # cuts tensors, and the end of a file, at odd places


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, whose sizes are no multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("a", 12345), ("b", 77)):
        tensors = {name: torch.randint(0, 255, (count,), dtype=torch.uint8, generator=generator)}
        save_file(tensors, tmp_path / f"model-{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "model-a.safetensors", "b": "model-b.safetensors"}}'
    )
    return tmp_path


@pytest.fixture
def checkpoint(folder: Path) -> FolderCheckpoint:
    return open_checkpoint(folder)


def paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_the_stream_brings_every_byte_of_every_file_in_order(checkpoint: FolderCheckpoint, folder: Path) -> None:
    out, measured = stream_bytes(checkpoint, ODD, device=CPU)
    expected = b"".join(path.read_bytes() for path in paths(folder))
    assert bytes(out.numpy()) == expected
    assert measured.nbytes == len(expected)
    assert measured.seconds > 0


@pytest.mark.parametrize("is_direct", [False, True])
def test_a_mere_read_reads_every_byte_once(
    checkpoint: FolderCheckpoint, folder: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in paths(folder))
    counted: list[int] = []
    preadv = os.preadv

    def count(*arguments: object) -> int:
        counted.append(preadv(*arguments))  # type: ignore[arg-type]
        return counted[-1]

    monkeypatch.setattr(raw.os, "preadv", count)
    try:
        measured = read_bytes(checkpoint, ODD, is_direct=is_direct)
    except CheckpointError as error:
        assert is_direct
        pytest.skip(f"no direct reads on this file system: {error}")
    assert sum(counted) == measured.nbytes == size


@pytest.mark.parametrize("size", [6000, 20_000])
def test_a_file_that_has_another_size_now_is_an_error_of_both(
    checkpoint: FolderCheckpoint, folder: Path, size: int
) -> None:
    os.truncate(paths(folder)[0], size)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        read_bytes(checkpoint, ODD)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        stream_bytes(checkpoint, ODD, device=CPU)


def test_a_file_that_ends_while_it_is_read_is_an_error(
    checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw.os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_bytes(checkpoint, ODD)


def test_a_read_that_the_disk_refuses_is_an_error_with_its_place(
    checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(raw.os, "preadv", refuse)
    with pytest.raises(CheckpointError, match=r"model-[ab]\.safetensors: cannot be read at byte"):
        read_bytes(checkpoint, ODD)


def test_no_direct_reads_are_an_error_that_says_so(
    checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(raw.os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read past the page cache"):
        read_bytes(checkpoint, ODD, is_direct=True)


def test_pickled_files_have_no_bytes_to_stream(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has no file whose bytes can be read as they are"):
        byte_files(open_checkpoint(tmp_path))


def test_too_little_memory_is_a_load_error(checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(raw.torch, "empty", refuse)
    with pytest.raises(LoadError, match="out of memory on cpu for all bytes of the checkpoint"):
        stream_bytes(checkpoint, ODD, device=CPU)


def test_forgotten_files_are_not_in_the_page_cache_and_read_ones_are(folder: Path) -> None:
    big, other = folder / "big.safetensors", folder / "other.safetensors"
    for path in (big, other):
        save_file({"x": torch.zeros(8 << 20, dtype=torch.uint8)}, path)
    with open(other, "rb") as file:  # what this file system can do, asked without the code under test
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share([other]) != 0.0:
        pytest.skip("this file system keeps what it has in memory, or does not say")
    assert cached_share([big]) == 1.0
    forget([big])
    assert cached_share([big]) == 0.0
    big.read_bytes()
    assert cached_share([big]) == 1.0


def test_a_file_system_that_does_not_say_what_is_cached_gives_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(raw.os, "preadv", refuse)
    assert cached_share(paths(folder)) is None
    with pytest.raises(FileNotFoundError):
        cached_share([folder / "gone.safetensors"])


def test_a_host_without_memory_for_a_buffer_is_told(
    checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(LoadError, match="out of memory on the host for a buffer"):
        read_bytes(checkpoint, ODD)


def test_memory_comes_back_with_an_error_and_not_with_the_garbage(
    checkpoint: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def held() -> int:
        return sum(type(each) is torch.Tensor and each.numel() == total for each in gc.get_objects())

    def fails() -> bool:
        try:
            stream_bytes(checkpoint, ODD, device=CPU)
        except LoadError as error:  # pytest.raises would hold it
            return "no thread can be started" in str(error)
        return False

    total = sum(stamp.size for stamp in byte_files(checkpoint).values())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    gc.collect()
    gc.disable()
    try:
        before = held()
        assert fails()
        assert held() == before
    finally:
        gc.enable()


@pytest.mark.gpu
def test_on_a_gpu_the_stream_brings_the_same_bytes_and_a_copy_takes_time(
    checkpoint: FolderCheckpoint, folder: Path
) -> None:
    device = torch.device("cuda")
    out, measured = stream_bytes(checkpoint, ODD, device=device)
    assert bytes(out.cpu().numpy()) == b"".join(path.read_bytes() for path in paths(folder))
    assert copy_bytes(measured.nbytes, ODD, device=device).seconds > 0
