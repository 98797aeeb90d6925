"""A ``.bin`` file gives names and shapes without being read, and runs no code."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tepatch.checkpoint import TensorInfo, open_checkpoint
from tepatch.errors import CheckpointError

NAME = "pytorch_model.bin"


def save(folder: Path, value: object, **options: bool) -> Path:
    torch.save(value, folder / NAME, **options)
    return folder


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_names_shapes_and_dtypes_are_those_of_the_tensors(tmp_path: Path) -> None:
    base = torch.zeros(4, 6, dtype=torch.float8_e4m3fn)
    save(
        tmp_path,
        {"w": base, "transposed": base.t(), "scalar": torch.tensor(1), "p": nn.Parameter(torch.ones(2))},
    )
    infos = list(open_checkpoint(tmp_path).tensors.values())
    assert [(info.name, info.shape, info.dtype, info.nbytes) for info in infos] == [
        ("w", (4, 6), "F8_E4M3", 24),
        ("transposed", (6, 4), "F8_E4M3", 24),
        ("scalar", (), "I64", 8),
        ("p", (2,), "F32", 8),
    ]
    assert infos[0] == TensorInfo(name="w", shape=(4, 6), dtype="F8_E4M3", file=NAME, offset=0, nbytes=24)


def test_a_state_dict_of_a_module_is_taken(tmp_path: Path) -> None:
    save(tmp_path, nn.Linear(2, 3).state_dict())
    assert list(open_checkpoint(tmp_path).tensors) == ["weight", "bias"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts what a process has read and mapped as Linux does")
def test_data_is_not_read_to_tell_the_names(tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        save(tmp_path, {"w": torch.empty(2**28)})
    assert (tmp_path / NAME).stat().st_size > 2**30
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, whatever earlier tests took
    read, resident = bytes_read(), most_resident_bytes()
    assert open_checkpoint(tmp_path).tensors["w"].nbytes == 2**30
    assert bytes_read() - read < 2**20
    assert most_resident_bytes() - resident < 2**28


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def most_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    save(tmp_path, {"w": Hostile(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pickled objects|before PyTorch 1.6"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(pickle.dumps({"w": Hostile(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match="bare pickle, and is refused"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_refusal_names_what_was_pickled(tmp_path: Path) -> None:
    save(tmp_path, {"w": Hostile(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"holds pickled objects other than tensors(.|\n)*mkdir"):
        open_checkpoint(tmp_path)


def test_a_file_of_before_pytorch_1_6_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(1)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1.6(.|\n)*fix: save it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a PyTorch checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [100, -30])
def test_a_truncated_zip_is_refused(tmp_path: Path, keep: int) -> None:
    save(tmp_path, {"w": torch.ones(9)})
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or truncated zip"):
        open_checkpoint(tmp_path)


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("archive/readme", "hello")
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint"):
        open_checkpoint(tmp_path)


def rewrite(path: Path, changes: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the zip again with other entries, named without the archive's own folder."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, changes.get(name.partition("/")[2], content))


def test_a_compressed_zip_is_refused_as_its_bytes_are_not_weights(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(1000)})
    rewrite(tmp_path / NAME, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is a compressed zip"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 36, 1_000_000])
def test_a_tensor_whose_data_has_another_size_is_refused(tmp_path: Path, size: int) -> None:
    save(tmp_path, {"w": torch.ones(50)})
    rewrite(tmp_path / NAME, {"data/0": bytes(size)})
    with pytest.raises(CheckpointError, match=r"claim data of other sizes(.|\n)*200 bytes|out of bounds"):
        open_checkpoint(tmp_path)


def test_data_that_no_tensor_uses_is_allowed(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(50), "empty": torch.ones(0)})
    with zipfile.ZipFile(tmp_path / NAME, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/data/9", b"spare")
    assert list(open_checkpoint(tmp_path).tensors) == ["w", "empty"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "is not a dictionary of tensors"),
        (torch.ones(1), "is not a dictionary of tensors"),
        (
            {"state_dict": {"w": torch.ones(1)}},
            "'state_dict': this entry is not a plain tensor(.|\n)*take the inner",
        ),
        ({"w": torch.ones(1), "l._extra_state": b"x"}, "'l._extra_state': this entry is not a plain tensor"),
        ({"w": torch.ones(1), "epoch": 3}, "'epoch': this entry is not a plain tensor\n  found: +int"),
        ({3: torch.ones(1)}, "3: the name of this entry is not a printable string"),
        ({"\x1b[2J": torch.ones(1)}, "the name of this entry is not a printable string"),
        ({"w": torch.ones(1, device="meta")}, "'w': this tensor has no plain dense data(.|\n)*meta"),
        (
            {"w": torch.ones(1, dtype=torch.complex128)},
            "'w': the dtype of this tensor has no safetensors code",
        ),
    ],
)
def test_anything_but_a_dictionary_of_plain_tensors_is_refused(tmp_path: Path, value: object, message: str) -> None:
    save(tmp_path, value)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


# torch warns of its own storage classes while it saves a sparse tensor.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match=r"'w': this tensor has no plain dense data(.|\n)*sparse"):
        open_checkpoint(tmp_path)


# torch warns that quantized dtypes will go.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)})
    with pytest.raises(CheckpointError, match=r"'w': the dtype of this tensor has no safetensors code(.|\n)*qint8"):
        open_checkpoint(tmp_path)


class Tagged(torch.Tensor):
    """A subclass: what its data means is known to the subclass only."""


def test_a_subclass_of_tensor_is_refused_even_where_torch_allows_it(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(4).as_subclass(Tagged)})
    with (
        torch.serialization.safe_globals([Tagged]),
        pytest.raises(CheckpointError, match=r"'w': this entry is not a plain tensor(.|\n)*Tagged"),
    ):
        open_checkpoint(tmp_path)


# A changed byte may announce another version of pickle, of which torch warns.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_bytes_either_load_or_are_refused(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)})
    content = (tmp_path / NAME).read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / NAME).write_bytes(damaged)
        try:
            open_checkpoint(tmp_path)
        except CheckpointError as error:
            str(error).encode()
            refused += 1
    assert refused


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}


def test_entries_that_were_exchanged_are_named(tmp_path: Path) -> None:
    """Both lengths are there, each at the other's place."""
    save(tmp_path, {"small": torch.ones(5), "large": torch.ones(70)})
    entries = entries_of(tmp_path / NAME)
    rewrite(tmp_path / NAME, {"data/0": entries["data/1"], "data/1": entries["data/0"]})
    with pytest.raises(CheckpointError, match=r"data/0: its tensors claim(.|\n)*20 bytes\n(.|\n)*280 bytes"):
        open_checkpoint(tmp_path)


def test_names_that_were_exchanged_in_the_directory_are_told(tmp_path: Path) -> None:
    save(tmp_path, {"one": torch.ones(5), "other": torch.zeros(5)})
    content = (tmp_path / NAME).read_bytes()
    start = content.index(b"PK\x01\x02")
    directory = content[start:].replace(b"/data/0", b"/data/X").replace(b"/data/1", b"/data/0")
    (tmp_path / NAME).write_bytes(content[:start] + directory.replace(b"/data/X", b"/data/1"))
    with pytest.raises(CheckpointError, match="is not where the zip says"):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(5)})
    with zipfile.ZipFile(tmp_path / NAME, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/data/0", bytes(20))
    with pytest.raises(CheckpointError, match="data/0: is there twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_a_bit_that_changed_is_told_when_it_is_read(tmp_path: Path, shared: bool) -> None:
    whole = torch.arange(100.0)
    save(tmp_path, {"w": whole, "v": whole[50:].view(5, 10) if shared else torch.ones(3)})
    content = bytearray((tmp_path / NAME).read_bytes())
    content[content.index(whole.numpy().tobytes()) + 201] ^= 1
    (tmp_path / NAME).write_bytes(content)
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open(NAME) as shard:
        with pytest.raises(CheckpointError, match=r"data/0: its bytes are not those that were saved(.|\n)*checksum"):
            shard.read(checkpoint.tensors["w"])
        if shared:
            with pytest.raises(CheckpointError, match="are not those that were saved"):
                shard.read(checkpoint.tensors["v"])
        else:
            assert torch.equal(shard.read(checkpoint.tensors["v"]), torch.ones(3))


def test_a_pickle_that_changed_is_told_by_its_checksum(tmp_path: Path) -> None:
    """Names are told by nothing else."""
    save(tmp_path, {"model.one": torch.ones(3), "model.two": torch.zeros(3)})
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content.replace(b"model.one", b"model.oNe"))
    with pytest.raises(CheckpointError, match=r"data\.pkl: its bytes are not those that were saved"):
        open_checkpoint(tmp_path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """torch can be told to compute none."""
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path, {"w": torch.ones(5)})
    finally:
        torch.serialization.set_crc32_options(computes)
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open(NAME) as shard:
        assert torch.equal(shard.read(checkpoint.tensors["w"]), torch.ones(5))


def test_what_can_be_left_out_is_no_tensor(tmp_path: Path) -> None:
    """The extra state of Transformer Engine's modules, as its versions have written it."""
    save(tmp_path, {"w": torch.ones(3), "a._extra_state": None, "b._extra_state": io.BytesIO(b"scales")})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.others == {"a._extra_state": "None", "b._extra_state": "BytesIO"}
    # Nothing of that is allowed to anybody else.
    assert io.BytesIO not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"r\xff\xff\xff\x7f", "its pickle counts more objects than it has bytes"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f", "cannot be read as a PyTorch checkpoint|pickled objects"),
    ],
)
def test_a_pickle_that_asks_for_memory_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    """A memo of two thousand million objects, bytes without an end."""
    save(tmp_path, {"w": torch.ones(3)})
    pickled = entries_of(tmp_path / NAME)["data.pkl"]
    rewrite(tmp_path / NAME, {"data.pkl": pickled[:2] + b"N" + text + pickled[2:]})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[object] = []
    endless.append(endless)
    save(tmp_path, {"w": torch.ones(3), "endless": endless})
    with pytest.raises(CheckpointError, match="'endless': this entry is not a plain tensor"):
        open_checkpoint(tmp_path)
