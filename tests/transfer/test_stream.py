"""Loading in pieces, by several threads, to the CPU and to a GPU: what arrives, what is read, and what can go wrong."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.reading import FileStamp
from tepatch.checkpoint.writing import tensor_bytes
from tepatch.errors import CheckpointError, LoadError, PlanError
from tepatch.mapping import parse_mapping
from tepatch.planning import Spec, make_plan
from tepatch.progress import ProgressBar
from tepatch.transfer import turns
from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.raw import cached_share, forget, stream_bytes
from tepatch.transfer.settings import Reading
from tepatch.transfer.shards import Cut
from tepatch.transfer.steps import same_bits
from tepatch.transfer.stream import Stream

Make = Callable[..., Any]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where parameters go. Afterwards no thread is left, and no memory of a GPU is taken."""
    device = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
    yield device
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tepatch-read")]
    if device.type == "cuda":
        gc.collect()
        assert torch.cuda.memory_allocated(device) == before


def load(sample: Any, device: torch.device, reading: Reading | None = None, **more: Any) -> Any:
    to = Destination(device=device, **more)
    return load_tensors(sample.plan, sample.checkpoint, to=to, reading=reading, progress=False)


@pytest.mark.parametrize(
    "reading",
    [
        Reading(threads=3, piece_bytes=64),
        Reading(threads=1, piece_bytes=512, buffers=1),
        Reading(threads=16, piece_bytes=2048, buffers=3),
        Reading(),
        Reading(threads=2, piece_bytes=700, cache="bypass"),
        Reading(cache="bypass"),
    ],
)
def test_everything_arrives_in_its_place(reading: Reading, device: torch.device, sample: Make) -> None:
    made = sample()
    loaded, timing = load(made, device, reading)
    assert loaded.keys() == made.expected.keys()
    for name, expected in made.expected.items():
        assert loaded[name].device == device
        assert same_bits(loaded[name].cpu(), expected), name
    # Each byte once: also of a tensor that is dealt out to several parameters along an inner dimension.
    assert timing.bytes_read == sum(info.nbytes for info in made.checkpoint.tensors.values())
    assert set(timing.stages) == {"allocate", "read", "copy", "place"}


def test_another_source_gives_the_same(device: torch.device, sample: Make) -> None:
    made = sample()
    loaded, _ = load(made, device, Reading(source="safetensors"))
    for name, expected in made.expected.items():
        assert same_bits(loaded[name].cpu(), expected), name


@pytest.mark.parametrize("cache", ["use", "bypass"])
def test_the_page_cache_is_filled_or_left_alone(cache: str, device: torch.device, tmp_path: Path) -> None:
    path, values = tmp_path / "model.safetensors", torch.randn(1 << 24)
    save_file({"w": values}, path)
    save_file({"w": values}, tmp_path / "other")
    forget([path, tmp_path / "other"])
    if cached_share([tmp_path / "other"]) != 0:  # asking has the system read some of it
        pytest.skip("this file system keeps its files in memory")
    loaded, _ = stream_bytes(open_checkpoint(path), Reading(cache=cache, piece_bytes=1 << 20), device=device)
    assert same_bits(loaded.cpu()[-values.nbytes :].view(torch.float32), values)
    share = cached_share([path])
    assert share is not None
    assert share == 1 if cache == "use" else share < 0.2  # the header has been read


@pytest.mark.parametrize("piece_bytes", [4096, 1 << 16])
@pytest.mark.parametrize("cache", ["use", "bypass"])
def test_elements_that_lie_askew_in_the_file_are_read(
    cache: str, piece_bytes: int, device: torch.device, tmp_path: Path
) -> None:
    """The format lets a tensor begin anywhere, and torch looks at none that does not begin at a whole element."""
    path = tmp_path / "model.safetensors"
    values = torch.randn(5000)
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [5000], "data_offsets": [3, 3 + values.nbytes]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"abc" + tensor_bytes(values))
    checkpoint = open_checkpoint(path)
    plan = make_plan(
        parse_mapping("version: 1\nparameters: {odd: same, w: same}", name="m.yaml"),
        config={},
        sources=checkpoint.tensors,
        targets={"odd": Spec((3,), "U8"), "w": Spec((5000,), "BF16")},
    )
    forget([path])
    reading = Reading(threads=2, piece_bytes=piece_bytes, cache=cache)
    loaded, _ = load_tensors(plan, checkpoint, to=Destination(device=device), reading=reading, progress=False)
    assert bytes(loaded["odd"].tolist()) == b"abc"
    assert same_bits(loaded["w"].cpu(), values.bfloat16())


def test_more_threads_read_what_is_not_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(1 << 20)}, path)
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))

    def settled(reading: Reading) -> tuple[int | None, int | None]:
        with ProgressBar(0, False, "") as bar:
            stream = Stream(None, checkpoint, reading, device=torch.device("cpu"), allocate=torch.empty, bar=bar)
        return stream.reading.threads, stream.reading.buffers

    assert settled(Reading()) == (8, 16)
    assert settled(Reading(threads=3)) == (3, 6)
    assert settled(Reading(threads=3, buffers=4)) == (3, 4)
    forget([path])
    if (found := settled(Reading())) == (8, 16):
        pytest.skip("this file system keeps its files in memory")
    assert found == (16, 32)


CUTS = {
    "run": [Cut(0, 65, 15)],
    "interleaved": [Cut(0, 3, 4)],
    "turned": [Cut(0, 7, 11)],
    "stacked": [Cut(1, 10, 30), Cut(0, 1, 2)],
    "padded": [Cut(0, 30, 10)],
    "cast": [Cut(1, 5, 20)],
    "embed": [Cut(0, 80, 10)],
    "shifted": [Cut(0, 60, 0)],
}


def test_a_shard_is_the_slice_of_the_whole(device: torch.device, sample: Make) -> None:
    made = sample()
    loaded, _ = load(made, device, Reading(threads=2, piece_bytes=256), shards=CUTS)
    for name, whole in made.expected.items():
        expected = whole
        for cut in CUTS.get(name, ()):
            expected = expected.narrow(cut.dim, cut.start, cut.size)
        assert same_bits(loaded[name].cpu(), expected.contiguous()), name


def test_shards_of_rows_read_each_byte_once(sample: Make, device: torch.device) -> None:
    """What two processes read is what one would; nobody reads bytes for the other."""
    made = sample(copy=False)
    halves = []
    for rank in range(2):
        shards = {}
        for name, whole in made.expected.items():
            rows = whole.shape[0]
            start = -(-rows // 2) * rank
            shards[name] = [Cut(0, start, min(-(-rows // 2), rows - start))]
        loaded, timing = load(made, device, Reading(threads=2, piece_bytes=128), shards=shards)
        halves.append((loaded, timing.bytes_read))
    for name, whole in made.expected.items():
        assert same_bits(torch.cat([loaded[name].cpu() for loaded, _ in halves]), whole), name
    total = sum(info.nbytes for info in made.checkpoint.tensors.values())
    # "turned" is cut across the rows of its source: both read what lies between.
    assert total <= sum(count for _, count in halves) <= total + made.checkpoint.tensors["square"].nbytes


def test_a_copy_that_differs_is_an_error(device: torch.device, sample: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head"][89, 31] += 1

    with pytest.raises(CheckpointError, match=r"head differs from embed.*\n.*tie_word_embeddings"):
        load(sample(change), device, Reading(piece_bytes=256))


def test_a_number_that_is_too_large_is_an_error(device: torch.device, sample: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["wide"][59, 40] = 1e30

    with pytest.raises(LoadError, match=r"wide: values that float16 can not hold\n.*65504.*\n.*1.*e\+30"):
        load(sample(change, dtype="F16"), device, Reading(piece_bytes=256))


def test_infinity_itself_is_no_error(device: torch.device, sample: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["wide"][3, 4] = float("inf")

    loaded, _ = load(sample(change), device)
    assert loaded["cast"][3, 4] == float("inf")


def test_a_disk_that_fails_is_told(device: torch.device, sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read, calls = sample(), os.preadv, []

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(
        CheckpointError, match=r"model-0000.-of-00002.safetensors: cannot be read at byte [\d,]+"
    ) as got:
        load(made, device, Reading(threads=3, piece_bytes=256))
    assert "Input/output error" in str(got.value)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_file_that_is_cut_short_meanwhile_is_told(
    is_first: bool, device: torch.device, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, read, calls = sample(), os.preadv, []
    path = made.folder / "model-00002-of-00002.safetensors"

    def cutting(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == (1 if is_first else 12):
            os.truncate(path, path.stat().st_size // 2)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(CheckpointError, match=r"model-00002.*has changed since its header was read"):
        load(made, device, Reading(threads=2, piece_bytes=256))


def test_a_file_that_is_written_to_meanwhile_is_told(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes could be read, and they are of two states of the file."""
    made, read, calls = sample(), os.preadv, []
    path = made.folder / "model-00001-of-00002.safetensors"
    stamp = FileStamp.of(path, where="")

    def touching(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 8:
            os.utime(path, ns=(stamp.mtime_ns + 1, stamp.mtime_ns + 1))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", touching)
    with pytest.raises(CheckpointError, match=r"model-00001.*has changed since its header was read"):
        load(made, torch.device("cpu"), Reading(threads=2, piece_bytes=256))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("seconds", [0.01, 0.4])
def test_an_interrupt_stops_all_threads(
    seconds: float, times: int, sample: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the main thread waits for the others, which is where it is most of the time; and while it waits again."""
    made, read, calls, lock = sample(), os.preadv, [], threading.Lock()
    is_waiting = threading.Event()
    main, before = threading.get_ident(), set(sys._current_frames())

    def slow(*arguments: Any) -> int:
        if threading.get_ident() != main:
            is_waiting.wait()
            with lock:
                calls.append(arguments)
                is_third = len(calls) == 3
            for _ in range(times if is_third else 0):
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.1)
            time.sleep(seconds)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    to, reading = Destination(device=device), Reading(threads=2, piece_bytes=64)
    with pytest.raises(KeyboardInterrupt):
        load_tensors(made.plan, made.checkpoint, to=to, reading=reading, progress=False, meanwhile=is_waiting.set)
    assert set(sys._current_frames()) <= before
    assert len(calls) < sum(info.nbytes for info in made.checkpoint.tensors.values()) // 64


def test_in_inference_mode_everything_arrives_too(device: torch.device, sample: Make) -> None:
    made = sample()
    with torch.inference_mode():
        loaded, _ = load(made, device, Reading(threads=3, piece_bytes=300))
        assert all(tensor.is_inference() for tensor in loaded.values())
        for name, expected in made.expected.items():
            assert same_bits(loaded[name].cpu(), expected), name
    ordinary, _ = load(made, device)
    assert not any(tensor.is_inference() for tensor in ordinary.values())


@pytest.mark.parametrize("what", ["huge pages", "advice"])
def test_a_system_without_what_only_makes_it_quicker_will_do(
    what: str, device: torch.device, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if what == "advice":
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    else:
        monkeypatch.setattr(mmap, "mmap", type("NoHugePages", (mmap.mmap,), {"madvise": refuse}))
    made = sample()
    loaded, _ = load(made, device, Reading(threads=2))
    for name, expected in made.expected.items():
        assert same_bits(loaded[name].cpu(), expected), name


def test_a_host_without_memory_for_a_buffer_is_told(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(LoadError, match=r"checkpoint: out of memory on the host for a buffer[\s\S]*8,396,800 bytes"):
        load(sample(), torch.device("cpu"), Reading(threads=2))


def test_pythons_own_lack_of_memory_is_told_though_it_says_nothing(sample: Make) -> None:
    def allocate(*_: object) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(LoadError, match=r"out of memory after reading 0 of[\s\S]*found: +MemoryError"):
        load(sample(), torch.device("cpu"), allocate=allocate)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_an_empty_parameter_has_empty_shards_and_is_sealed(
    shape: tuple[int, ...], device: torch.device, tmp_path: Path
) -> None:
    save_file({"w": torch.zeros(shape), "v": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(
        parse_mapping("version: 1\nparameters: {w: same, v: same}", name="m.yaml"),
        config={},
        sources=checkpoint.tensors,
        targets={"w": Spec(shape, "F32"), "v": Spec((3,), "F32")},
    )
    sealed: dict[str, torch.Tensor] = {}

    def seal(name: str) -> Any:
        return lambda tensor: sealed.setdefault(name, tensor)

    to = Destination(device=device, shards={"w": [Cut(0, 0, shape[0] // 2)], "v": [Cut(0, 3, 0)]}, seals={
        name: seal(name) for name in "wv"
    })  # fmt: skip
    loaded, _ = load_tensors(plan, checkpoint, to=to, progress=False)
    assert sealed.keys() == {"w", "v"}
    assert loaded["w"].shape == (shape[0] // 2, *shape[1:])
    assert loaded["v"].shape == (0,)


def test_one_element_of_a_parameter_that_is_read_with_a_wide_one(device: torch.device, tmp_path: Path) -> None:
    whole = torch.arange(2000.0).view(1000, 2)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    columns = "".join(f"  {name}: {{of: w, take: {{out_of: 2, index: {i}, dim: 1}}}}\n" for i, name in enumerate("ab"))
    plan = make_plan(
        parse_mapping(f"version: 1\nparameters:\n{columns}", name="m.yaml"),
        config={},
        sources=checkpoint.tensors,
        targets={name: Spec((1000,), "F32") for name in "ab"},
    )
    to, reading = Destination(device=device, shards={"b": [Cut(0, 5, 1)]}), Reading(piece_bytes=64)
    loaded, _ = load_tensors(plan, checkpoint, to=to, reading=reading, progress=False)
    assert torch.equal(loaded["a"].cpu(), whole[:, 0])
    assert loaded["b"].tolist() == [11.0]


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("name", ["0", "2", "mover", "ring", "ahead"])
def test_a_system_that_gives_no_thread_is_told(
    name: str, is_cached: bool, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, start, read = sample(), threading.Thread.start, os.preadv

    def refusing(thread: threading.Thread) -> None:
        if thread.name == f"tepatch-read-{name}":
            raise RuntimeError("can't start new thread")
        start(thread)

    def asked(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        if not flags:
            return read(file, buffers, position)
        if is_cached:
            return 1
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "preadv", asked)
    monkeypatch.setattr(threading.Thread, "start", refusing)
    if name == "ahead" and is_cached:
        load(made, torch.device("cpu"), Reading(threads=4))  # no such thread is needed
        return
    with pytest.raises(LoadError, match=r"no thread can be started for reading[\s\S]*Reading\(threads=1\)"):
        load(made, torch.device("cpu"), Reading(threads=4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tepatch-read")]


def test_memory_comes_back_with_an_error_that_several_threads_have(
    sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, read, together = sample(), os.preadv, threading.Barrier(3)
    kept: list[weakref.ref[torch.Tensor]] = []

    def failing(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        if flags:
            return read(file, buffers, position, flags)
        together.wait(10)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        kept.append(weakref.ref(out))
        return out

    monkeypatch.setattr(os, "preadv", failing)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(made, torch.device("cpu"), Reading(threads=3, piece_bytes=64), allocate=allocate)
        assert kept
        assert not [each for each in kept if each() is not None]
    finally:
        gc.enable()


def test_buffers_are_made_only_if_somebody_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read straight into memory of the CPU needs none, however long there would be time to make them."""
    save_file({"w": torch.randn(100), "v": torch.randn(50)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    plan = make_plan(
        parse_mapping("version: 1\nparameters: {w: same, v: same}", name="m.yaml"),
        config={},
        sources=checkpoint.tensors,
        targets={"w": Spec((100,), "F32"), "v": Spec((50,), "F32")},
    )
    made: list[Any] = []
    memory = mmap.mmap

    def noted(*arguments: Any, **more: Any) -> mmap.mmap:
        made.append(arguments)
        return memory(*arguments, **more)

    monkeypatch.setattr(mmap, "mmap", noted)
    to = Destination(device=torch.device("cpu"))
    load_tensors(plan, checkpoint, to=to, progress=False, meanwhile=lambda: time.sleep(0.02))
    assert made == []


def test_memory_is_taken_before_anything_is_read(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = sample(), os.preadv
    taken: list[str] = []
    at_first: list[int] = []

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        taken.append(name)
        return torch.empty(shape, dtype=dtype)

    def noted(file: int, buffers: Any, position: int, flags: int = 0) -> int:
        if not flags:
            at_first.append(len(taken))
        return read(file, buffers, position, flags)

    monkeypatch.setattr(os, "preadv", noted)
    load(made, torch.device("cpu"), Reading(piece_bytes=256), allocate=allocate)
    assert sorted(taken) == sorted(made.plan.writes)
    assert set(at_first) == {len(taken)}


def test_threads_change_turns_quickly_while_files_are_read_and_not_after(sample: Make) -> None:
    made, before, seen = sample(), sys.getswitchinterval(), []
    to = Destination(device=torch.device("cpu"))

    def nested() -> None:
        seen.append(sys.getswitchinterval())
        load_tensors(made.plan, made.checkpoint, to=to, progress=False)
        seen.append(sys.getswitchinterval())

    load_tensors(made.plan, made.checkpoint, to=to, progress=False, meanwhile=nested)
    assert seen == [pytest.approx(turns.SECONDS)] * 2
    assert sys.getswitchinterval() == before
    with pytest.raises(KeyError), turns.quick_turns():
        raise KeyError
    assert sys.getswitchinterval() == before


def test_what_is_assembled_is_whole_and_few_at_a_time(device: torch.device, sample: Make) -> None:
    made = sample()
    alive: dict[str, int] = {}
    most = [0]
    kept: dict[str, torch.Tensor] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        if name in seals and name != "embed":  # it has a copy to be compared with, and so stays to the end
            alive[name] = out.nbytes
            most[0] = max(most[0], sum(alive.values()))
            weakref.finalize(out, alive.pop, name)
        return out

    def seal(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept[name] = tensor.clone()
        return tensor.float().sum().cpu()

    seals = {name: (lambda tensor, name=name: seal(name, tensor)) for name in made.expected}
    reading = Reading(threads=3, piece_bytes=256)
    loaded, _ = load(made, device, reading, allocate=allocate, seals=seals)
    for name, expected in made.expected.items():
        assert same_bits(kept[name].cpu(), expected), name
        assert loaded[name].shape == ()
    largest = max(tensor.nbytes for tensor in made.expected.values())
    assert largest < most[0] <= 2 * largest
    loaded.clear()
    kept.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("is_assembled", [False, True])
def test_too_little_memory_of_a_gpu_is_told_and_given_back(is_assembled: bool, sample: Make) -> None:
    """Before anything is read, or in the midst of it for what is assembled first."""
    made = sample()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name == "stacked":
            return torch.empty(1 << 46, dtype=torch.uint8, device="cuda")  # torch's own error
        return torch.empty(shape, dtype=dtype, device="cuda")

    seals = dict.fromkeys(made.expected, torch.clone) if is_assembled else {}
    with pytest.raises(LoadError, match=r"out of memory after reading ([\d,]+) of [\d,]+ bytes") as got:
        load(made, torch.device("cuda", 0), Reading(threads=2, piece_bytes=256), allocate=allocate, seals=seals)
    if not is_assembled:
        assert "after reading 0 of" in str(got.value)
    del got
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_copies_to_a_gpu_are_from_pinned_memory(sample: Make) -> None:
    from tepatch.transfer.memory import HostMemory

    with HostMemory(1 << 21, is_pinned=True) as memory:
        assert memory.is_pinned
        assert memory.bytes.is_pinned()
    _, timing = load(sample(), torch.device("cuda", 0))
    assert timing.notes == ()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": 2.5}, "threads"),
        ({"piece_bytes": 8}, "piece_bytes"),
        ({"piece_bytes": None}, "piece_bytes"),
        ({"buffers": True}, "buffers"),
        ({"threads": 1025}, "threads"),
        ({"piece_bytes": (1 << 30) + 1}, "piece_bytes"),
        ({"buffers": 10**30}, "buffers"),
        ({"source": "magic"}, "source"),
        ({"cache": "maybe"}, "cache"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(PlanError, match=rf"reading\.{name}: can not be used[\s\S]*leave it out"):
        Reading(**wrong)
    Reading(**{key: value for key, value in wrong.items() if key != name})


@pytest.mark.parametrize("source", ["fastsafetensors", "runai", "instanttensor"])
def test_a_source_that_there_was_is_refused_with_those_that_there_are(source: str) -> None:
    with pytest.raises(PlanError, match=rf"expected: +direct or safetensors\n.*{source}"):
        Reading(source=source)
