"""The layout of a checkpoint's files: every byte settled beforehand, and read back by three other readers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tepatch.checkpoint import Shard, index_json, index_name, open_checkpoint, parse_size, plan_shards, tensor_bytes
from tepatch.checkpoint.safetensors_header import parse_safetensors_header
from tepatch.dtypes import ITEM_SIZES, dtype_code, torch_dtype
from tepatch.errors import PlanError
from tepatch.planning.plan import Spec

DTYPES = [code for code in ITEM_SIZES if torch_dtype(code) is not None]


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), dtype_code(tensor.dtype) or "") for name, tensor in tensors.items()}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **options: Any) -> tuple[Shard, ...]:
    """Write tensors as a plan of shards says, without anything else."""
    folder.mkdir(exist_ok=True)
    shards = plan_shards(specs_of(tensors), **options)
    for shard in shards:
        with (folder / shard.file).open("wb") as stream:
            stream.write(shard.header)
            for info in shard.tensors:
                assert stream.tell() == info.offset
                stream.write(tensor_bytes(tensors[info.name]))
            assert stream.tell() == shard.nbytes
    if len(shards) > 1:
        (folder / index_name()).write_text(index_json(shards))
    return shards


def random_tensor(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bytes, in which each is one that the dtype has and that compares equal to itself."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if code == "BOOL" else 120  # 0x78...: neither infinite nor NaN in any dtype
    raw = torch.randint(0, high, (prod(shape) * ITEM_SIZES[code],), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype(code)).reshape(shape)


SPECS = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable() and name != "__metadata__"),
    st.builds(
        Spec,
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.sampled_from(sorted(ITEM_SIZES)),
    ),
    max_size=25,
)


@given(SPECS, st.integers(1, 3000))
def test_each_tensor_is_in_one_shard_in_order_aligned_and_within_the_limit(specs: dict[str, Spec], limit: int) -> None:
    shards = plan_shards(specs, max_shard_size=limit)
    files = [shard.file for shard in shards]
    many = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    assert files == (many if len(shards) > 1 else ["model.safetensors"])
    placed: list[str] = []
    sizes: list[int] = []
    for shard in shards:
        names = [info.name for info in shard.tensors]
        given = [name for name in specs if name in names]
        assert names == sorted(given, key=lambda name: -ITEM_SIZES[specs[name].dtype])
        placed += given
        parsed = parse_safetensors_header(
            io.BytesIO(shard.header), size=shard.nbytes, file=shard.file, where=shard.file
        )
        # The parser sorts by position, where tensors without elements share one.
        assert sorted(parsed, key=lambda info: names.index(info.name)) == list(shard.tensors)
        for info in shard.tensors:
            assert Spec(info.shape, info.dtype) == specs[info.name]
            assert info.offset % ITEM_SIZES[info.dtype] == 0
        assert len(shard.header) % 8 == 0
        assert shard.tensors or not specs
        sizes.append(sum(info.nbytes for info in shard.tensors))
        large = [info for info in shard.tensors if info.nbytes > limit]
        assert sizes[-1] <= limit or [info.nbytes for info in shard.tensors if info.nbytes] == [large[0].nbytes]
    assert placed == list(specs)
    for shard, size in zip(shards[1:], sizes[:-1], strict=True):
        first = min(shard.tensors, key=lambda info: list(specs).index(info.name))
        assert size + first.nbytes > limit, "a shard ended before it was full"


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shapes = [(), (0,), (3, 0), (1,), (3, 5), (2, 3, 1)]
    tensors = {
        f"{code}.{shape}": random_tensor(code, shape, seed) for code in DTYPES for seed, shape in enumerate(shapes)
    }
    assert len(DTYPES) >= 18
    for name, limit in (("one", "1GB"), ("many", 100)):
        folder = tmp_path / name
        shards = write(folder, tensors, max_shard_size=limit)
        assert (len(shards) > 10) == (name == "many")
        checkpoint = open_checkpoint(folder)
        assert set(checkpoint.tensors) == set(tensors)
        for shard in shards:
            with safe_open(folder / shard.file, framework="pt") as theirs, checkpoint.open(shard.file) as ours:
                assert theirs.metadata() == {"format": "pt"}
                assert set(theirs.keys()) == {info.name for info in shard.tensors}
                for info in shard.tensors:
                    want = tensors[info.name]
                    for got in (theirs.get_tensor(info.name), ours.read(info)):
                        assert (got.dtype, got.shape) == (want.dtype, want.shape)
                        assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("limit", ["1GB", "50KB"])
def test_transformers_loads_what_was_written(limit: str, tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    folder = tmp_path / "written"
    shards = write(folder, state, max_shard_size=limit)
    assert (len(shards) > 1) == (limit == "50KB")
    model.config.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    got = loaded.state_dict()
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype


def test_the_index_has_the_totals_that_transformers_writes(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    theirs = json.loads((tmp_path / "theirs" / index_name()).read_text())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    shards = write(tmp_path / "ours", state, max_shard_size="50KB")
    text = (tmp_path / "ours" / index_name()).read_text()
    ours = json.loads(text)
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["weight_map"] == {info.name: shard.file for shard in shards for info in shard.tensors}
    assert text == json.dumps(ours, indent=2, sort_keys=True) + "\n"


def test_the_stem_names_the_files() -> None:
    specs = {"a": Spec((4,), "F32"), "b": Spec((4,), "F32")}
    assert [shard.file for shard in plan_shards(specs, max_shard_size=16, stem="te")] == [
        "te-00001-of-00002.safetensors",
        "te-00002-of-00002.safetensors",
    ]
    assert plan_shards(specs, max_shard_size=32, stem="te")[0].file == "te.safetensors"
    assert index_name("te") == "te.safetensors.index.json"


def test_what_a_file_cannot_hold_is_named_all_at_once() -> None:
    specs = {
        "__metadata__": Spec((1,), "F32"),
        "good": Spec((1,), "F32"),
        "bell\a": Spec((1,), "F32"),
        "packed": Spec((2,), "F4"),
        "deep": Spec((1,) * 65, "F32"),
    }
    with pytest.raises(PlanError) as caught:
        plan_shards(specs, max_shard_size="5GB")
    assert [problem.where for problem in caught.value.problems] == ["__metadata__", r"'bell\x07'", "packed", "deep"]
    assert "F4" in str(caught.value)


def test_a_header_over_the_limit_of_the_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tepatch.checkpoint.writing.MAX_HEADER_BYTES", 300)
    specs = {f"tensor.{i}": Spec((1,), "F32") for i in range(10)}
    with pytest.raises(PlanError, match="set a smaller max_shard_size"):
        plan_shards(specs, max_shard_size="5GB")
    assert len(plan_shards(specs, max_shard_size=8)) == 5


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        ("300", 300),
        ("300B", 300),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        (" 5 GB ", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1.5KB", 1500),
        ("0.1GB", 100_000_000),
        ("2TB", 2_000_000_000_000),
        ("1KiB", 1024),
        ("1MiB", 1 << 20),
        ("1GiB", 1 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_as_hugging_face_does_and_binary_ones_too(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        0,
        -1,
        True,
        1.5,
        None,
        "",
        "GB",
        "0",
        "0GB",
        "-5GB",
        "5XB",
        "5 G B",
        "1e9",
        "5GB5",
        "0.0001KB",
        "\u0665GB",
        "9" * 5000,
    ],
)
def test_a_size_that_is_none_is_refused_with_examples(size: Any) -> None:
    with pytest.raises(PlanError, match="is not a size") as caught:
        parse_size(size)
    (problem,) = caught.value.problems
    assert problem.found == repr(size)
    assert "5GB" in problem.expected


def test_the_limit_of_a_plan_is_checked_as_well() -> None:
    with pytest.raises(PlanError, match="is not a size"):
        plan_shards({}, max_shard_size=0)


def test_the_bytes_of_a_tensor_are_its_memory() -> None:
    tensor = torch.zeros(2, 3, requires_grad=True)
    data = tensor_bytes(tensor)
    with torch.no_grad():
        tensor[1, 2] = 1.0
    assert bytes(data) == bytes(20) + b"\x00\x00\x80\x3f"
    assert (data.format, data.nbytes) == ("B", 24)


def test_a_size_of_one_with_any_stride_is_contiguous() -> None:
    tensor = torch.arange(5.0).as_strided((1, 5, 1), (99, 1, 7))
    assert bytes(tensor_bytes(tensor)) == bytes(tensor_bytes(torch.arange(5.0)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4).T,
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch._neg_view(torch.zeros(3)),
    ],
    ids=["transposed", "meta", "conjugate", "negative"],
)
def test_a_tensor_whose_memory_is_not_its_value_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous tensor on the CPU"):
        tensor_bytes(tensor)
