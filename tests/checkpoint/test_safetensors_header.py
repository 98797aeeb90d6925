"""The header of a safetensors file: what is taken, what is refused, and that nothing else comes out."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tepatch.checkpoint import TensorInfo
from tepatch.checkpoint.safetensors_header import MAX_HEADER_BYTES, parse_safetensors_header
from tepatch.errors import CheckpointError


def parse(content: bytes, *, size: int | None = None) -> list[TensorInfo]:
    size = len(content) if size is None else size
    return parse_safetensors_header(io.BytesIO(content), size=size, file="f.safetensors", where="f.safetensors")


def parse_header(header: object, *, data: int = 0) -> list[TensorInfo]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse(struct.pack("<Q", len(text)) + text, size=8 + len(text) + data)


def entry(shape: object, start: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_tensors_come_in_the_order_of_their_data() -> None:
    infos = parse_header({"z": entry([2], 4, 12), "a": entry([], 0, 4)}, data=12)
    assert [(info.name, info.shape, info.nbytes) for info in infos] == [("a", (), 4), ("z", (2,), 8)]
    assert infos[1].offset - infos[0].offset == 4


def test_the_offset_counts_from_the_start_of_the_file() -> None:
    header = json.dumps({"a": entry([1], 0, 4)}).encode() + b"   "
    assert parse_header(header, data=4)[0].offset == 8 + len(header)


def test_tensors_without_elements_are_taken() -> None:
    infos = parse_header({"a": entry([0, 4], 0, 0), "b": entry([1], 0, 4), "c": entry([0], 4, 4)}, data=4)
    assert [info.name for info in infos] == ["a", "b", "c"]


def test_metadata_is_not_a_tensor() -> None:
    assert parse_header({"__metadata__": {"format": "pt"}}) == []
    assert parse_header({"__metadata__": None}) == []


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_shorter_than_the_prefix_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="shorter than the 8 bytes"):
        parse(content)


def test_a_header_longer_than_the_file_is_refused() -> None:
    with pytest.raises(CheckpointError, match="header of 500 bytes, longer than the file"):
        parse(struct.pack("<Q", 500) + b"{}")


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(CheckpointError, match="more than the 100,000,000"):
        parse(struct.pack("<Q", MAX_HEADER_BYTES + 1), size=10**12)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not JSON"),
        (b'{"a": \xff}', "not JSON in UTF-8"),
        (b"[]", "not a JSON object"),
        (b" {}", "not a JSON object"),
        (b"{} {}", "not JSON"),
        (b'{"a":' + b"[" * 100_000, "too many brackets"),
        (b'{"a":' + b"9" * 5_000 + b"}", "not JSON"),
    ],
)
def test_a_header_which_is_not_an_object_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_header(header)


def test_a_tensor_listed_twice_is_refused() -> None:
    one = json.dumps(entry([1], 0, 4))
    with pytest.raises(CheckpointError, match="lists 'w' twice"):
        parse_header(f'{{"w": {one}, "w": {one}}}'.encode(), data=4)


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lists 'shape' twice"):
        parse_header(b'{"w": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 4]}}', data=4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (entry([1], 0, 4, "F33"), "unknown dtype(.|\n)*expected: .*BF16(.|\n)*found: +'F33'"),
        (entry([1], 0, 4, ["F32"]), "unknown dtype"),
        (entry([2], 0, 1, "F4"), "F4 packs several elements into a byte"),
        (entry([-1], 0, 4), "not a list of sizes"),
        (entry([1.0], 0, 4), "not a list of sizes"),
        (entry([True], 0, 4), "not a list of sizes"),
        (entry([0, 2**63], 0, 0), "not a list of sizes"),
        (entry([1] * 65, 0, 4), "not a list of sizes"),
        (entry("4", 0, 4), "not a list of sizes"),
        (entry([1], False, 4), "not a pair of positions"),
        (entry([1], -4, 0), "not a pair of positions"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "not a pair of positions"),
        ({"dtype": "F32", "shape": [1]}, "not a pair of positions"),
        (entry([2], 0, 4), r"does not match(.|\n)*expected: 8 bytes for F32 \[2\]"),
        (entry([1], 4, 0), "does not match"),
        (["F32", [1], [0, 4]], "not described by a JSON object"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"layer.w: (.|\n)*{message}"):
        parse_header({"layer.w": value}, data=4)


def test_metadata_of_other_than_strings_is_refused() -> None:
    with pytest.raises(CheckpointError, match="__metadata__: must map strings to strings"):
        parse_header({"__metadata__": {"format": 1}})


@pytest.mark.parametrize("name", ["\x1b[2J", "\ud800", "a\nb"])
def test_a_name_that_cannot_be_printed_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be printed") as caught:
        parse_header({name: entry([1], 0, 4)}, data=4)
    assert name not in str(caught.value)


def test_overlapping_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="b: overlaps a by 4 bytes"):
        parse_header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, data=12)


def test_a_tensor_inside_another_is_one_problem() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header({"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, data=16)
    assert [problem.what for problem in caught.value.problems] == ["overlaps a by 12 bytes"]


def test_a_gap_between_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="b: 4 bytes before it belong to no tensor"):
        parse_header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, data=12)


def test_a_truncated_file_says_how_much_is_missing() -> None:
    with pytest.raises(CheckpointError, match="truncated: 3 bytes are missing"):
        parse_header({"a": entry([2], 0, 8)}, data=5)


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match="2 bytes at its end belong to no tensor"):
        parse_header({"a": entry([2], 0, 8)}, data=10)


def test_all_wrong_entries_are_reported_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header({"a": entry([1], 0, 4, "X"), "b": entry([-1], 4, 8), "c": entry([1], 8, 12)}, data=12)
    assert len(caught.value.problems) == 2


def test_thousands_of_wrong_entries_are_summed_up() -> None:
    with pytest.raises(CheckpointError, match="4,988 more entries") as caught:
        parse_header({f"w{i}": entry([-1], 0, 4) for i in range(5_000)})
    assert len(caught.value.problems) == 13


@given(st.binary(max_size=200))
def test_any_bytes_either_parse_or_are_refused(content: bytes) -> None:
    parse_or_refuse(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
nearly_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F8_E8M0"]) | json_values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | json_values,
    },
)


@given(st.dictionaries(st.text(max_size=4), nearly_entries | json_values, max_size=3), st.integers(0, 64))
def test_any_json_either_parses_or_is_refused(header: dict[str, object], data: int) -> None:
    text = json.dumps(header).encode()
    parse_or_refuse(struct.pack("<Q", len(text)) + text + bytes(data))


WELL_FORMED = json.dumps(
    {"__metadata__": {"format": "pt"}, "a.w": entry([2, 2], 0, 16), "b": entry([3], 16, 22, "BF16")}
).encode()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(WELL_FORMED) + 7), st.integers(0, 255)), max_size=4))
def test_what_is_taken_is_also_taken_by_the_safetensors_package(changes: list[tuple[int, int]]) -> None:
    content = bytearray(struct.pack("<Q", len(WELL_FORMED)) + WELL_FORMED + bytes(22))
    for position, value in changes:
        content[position] = value
    infos = parse_or_refuse(bytes(content))
    if infos is None:
        assert changes
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        with safe_open(path, framework="pt") as other:
            for info in infos:
                assert tuple(other.get_tensor(info.name).shape) == info.shape


def parse_or_refuse(content: bytes) -> list[TensorInfo] | None:
    try:
        return parse(content)
    except CheckpointError as error:
        str(error).encode()  # a lone surrogate would not be
        return None


def test_problems_of_all_files_are_reported_together(
    tmp_path: Path, write_raw: Callable[..., Path], write_index: Callable[..., Path]
) -> None:
    from tepatch.checkpoint import open_checkpoint

    write_raw(tmp_path / "1.safetensors", {"a": entry([2], 0, 8)}, data=5)
    write_raw(tmp_path / "2.safetensors", b"nonsense")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        str(tmp_path / f"{i}.safetensors") for i in (1, 2, 3)
    ]
