"""``tepatch bench load``: how long a checkpoint takes to load here, what it could take at best, what holds it up."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.cli.options import Backend, Dtype, chosen_patch
from tepatch.cli.output import AsJson, print_json, reporting, say
from tepatch.cli.tables import print_table
from tepatch.transfer.settings import BOUNDS, MIB, SOURCES, THREADS_CACHED, THREADS_UNCACHED, Reading

if TYPE_CHECKING:
    import torch

    from tepatch.checkpoint.folder import FolderCheckpoint

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

READ, PAST, STREAM, PEER = "read", "read, no page cache", "stream", "transformers"
NEAR = 1.15
"""A time within this of a limit is at that limit."""


@bench.callback()
def _bench() -> None:
    """Measure tepatch on this machine."""


Run = Callable[[], tuple[object, Mapping[str, float]]]
"""Does what is timed. Returns what came of it, and the parts of the time that it knows of."""


@dataclass
class Contender:
    """Something that is timed, and its times."""

    name: str
    run: Run
    seconds: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def stages(self) -> dict[str, float]:
        """The parts of the round that took the median time, or a little more."""
        return dict(self.parts[self.seconds.index(statistics.median_high(self.seconds))])


@bench.command()
def load(
    location: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder, a checkpoint file, or a hub id in the local cache.")
    ],
    patch: Annotated[
        str, typer.Option("--patch", metavar="PATCH", help="A patch's name, or 'auto': the one for the model's type.")
    ] = "auto",
    dtype: Dtype = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as 'cpu' or 'cuda:1'; by default what the backend computes on.")
    ] = None,
    backend: Backend = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured, after once for warming up.")] = 5,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the checkpoint's files from the page cache before each time.")
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="NAME", help=f"Who reads the files: {', '.join(SOURCES)}. Can be repeated."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=BOUNDS["threads"][1],
            help=f"Threads that read. Default: the cores here, {THREADS_CACHED} at most ({THREADS_UNCACHED}: --cold).",
        ),
    ] = None,
    piece_mib: Annotated[
        int,
        typer.Option(
            "--piece-mib", min=1, max=BOUNDS["piece_bytes"][1] // MIB, help="MiB that a thread reads at once."
        ),
    ] = 8,
    buffers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=BOUNDS["buffers"][1],
            help="Pieces that may be in memory at once. Default: twice the threads.",
        ),
    ] = None,
    with_transformers: Annotated[
        bool, typer.Option("--with-transformers", help="Also measure transformers' from_pretrained.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how long a checkpoint takes to load, and what the same bytes take with no model in them.

    Each way is tried once, for warming up, and then measured in turn with the others. What is listed as limits are the
    files' bytes, read and thrown away ('read'), and brought to the device by tepatch's own reader ('stream'). The
    median and what a load's own report says about it tell where the time goes.

    Without --cold the files come from memory: from the system's page cache, if they fit into it.
    """
    if unknown := [name for name in source or () if name not in SOURCES]:
        raise typer.BadParameter(f"'{unknown[0]}' is none of {', '.join(SOURCES)}", param_hint="--source")
    chosen = chosen_patch(patch, as_json=as_json)
    with reporting(as_json):
        from transformers.utils import logging

        from tepatch.checkpoint import open_checkpoint
        from tepatch.hf.placement import check_device
        from tepatch.proven import installed_versions
        from tepatch.te import probe

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        is_te = backend != "reference" and probe().usable
        target = check_device(device or ("cuda" if is_te else "cpu"))
        reading = Reading(threads=threads, piece_bytes=piece_mib * MIB, buffers=buffers).settled(is_cached=not cold)
        readings = {
            name: reading if name == "direct" else Reading(source=name) for name in dict.fromkeys(source or ["direct"])
        }
        checkpoint = open_checkpoint(location)
        given = {"dtype": dtype, "device": target, "backend": backend}
        contenders, notes = _contenders(checkpoint, reading, target, is_cold=cold, with_transformers=with_transformers)
        for name, each in readings.items():
            contenders.append(Contender(f"tepatch, {name}", _loads(chosen, location, each, given)))
        if with_transformers:
            contenders.append(Contender(PEER, _stock_loads(checkpoint, target, dtype)))
        paths = [stamp.path for stamp in _byte_files(checkpoint)]
        nbytes = sum(stamp.size for stamp in _byte_files(checkpoint))
        _measure(contenders, rounds, paths if cold else [], notes, total=nbytes, progress=False if quiet else None)
        medians = {each.name: each.median for each in contenders}
        ours = next(each for each in contenders if each.name.startswith("tepatch, "))
        num_threads = reading.num_threads
        is_gpu = target.type == "cuda"
        said = advice(ours.median, ours.stages, medians, is_cold=cold, is_gpu=is_gpu, threads=num_threads)
        result = {
            "checkpoint": location,
            "device": str(target),
            "bytes": nbytes,
            "is_cold": cold,
            "threads": num_threads,
            "piece_bytes": piece_mib * MIB,
            "buffers": reading.num_buffers,
            "runs": {
                each.name: {
                    "seconds": each.seconds,
                    "median": each.median,
                    "gb_per_second": nbytes / 1e9 / each.median,
                    "stages": each.stages,
                }
                for each in contenders
            },
            "advice": said,
            "notes": notes,
            "versions": installed_versions(),
        }
    if as_json:
        print_json(result)
    else:
        _print(result)


def advice(
    ours: float,
    stages: Mapping[str, float],
    medians: Mapping[str, float],
    *,
    is_cold: bool,
    is_gpu: bool,
    threads: int,
) -> list[str]:
    """What holds a load up that took ``ours`` seconds, and what can be done about it; a sentence each."""
    limits = {name: medians[name] for name in (READ, PAST, STREAM) if name in medians}
    out = [f"{ours / seconds:.2f} x the time of '{name}'" for name, seconds in limits.items()]
    read = min(seconds for name, seconds in limits.items() if name != STREAM)
    model = ours - stages["load"]
    parts = ("read", "copy", "place", "allocate")
    most = max(parts, key=stages.__getitem__)
    if model > 0.4 * ours:
        out.append(
            f"Python is the limit: {model:.2f} s of {ours:.2f} s go to building and planning the model, which does"
            " not grow with its weights"
        )
    elif ours <= NEAR * read and is_cold:
        out.append("the disk is the limit: only a faster one, or files that are in memory already, would help")
    elif ours <= NEAR * max(limits.values()):
        out.append(f"moving the bytes is the limit: more cores may help ({threads} threads now)")
    elif not any(stages[name] for name in parts):
        out.append("what it waits for is not known, as a library reads: compare it with --source direct")
    elif most == "place" and is_gpu:
        out.append(
            "sending is the limit, which one thread does for a GPU: larger pieces (--piece-mib) are fewer to send, and"
            " so are values in the model's own dtype and order (convert them once with 'tepatch convert')"
        )
    elif most == "place":
        out.append(
            "putting values in another dtype or order is the limit: load in the checkpoint's own dtype, or convert it"
            " once with 'tepatch convert'"
        )
    elif most == "allocate":
        out.append("taking memory for the parameters is the limit: it comes from the system, a page at a time")
    elif most == "copy":
        out.append(
            "copies to the GPU are the limit: see whether memory could be pinned (ulimit -l), and the GPU's slot"
        )
    else:
        out.append(f"reading is the limit, but not at its best: try --threads (now {threads}) and --piece-mib")
    return out


def _byte_files(checkpoint: FolderCheckpoint) -> list[Any]:
    from tepatch.transfer.raw import byte_files

    return list(byte_files(checkpoint).values())


def _contenders(
    checkpoint: FolderCheckpoint,
    reading: Reading,
    device: torch.device,
    *,
    is_cold: bool,
    with_transformers: bool,
) -> tuple[list[Contender], list[str]]:
    """The limits. Raises ``PlanError`` where transformers could not load the checkpoint."""
    from tepatch.checkpoint import open_checkpoint
    from tepatch.errors import CheckpointError, PlanError, Problem
    from tepatch.transfer.raw import read_bytes, stream_bytes

    what = ""
    if with_transformers and checkpoint.manifest is not None:
        what = "transformers can not load the layout that 'tepatch convert' made"
    elif with_transformers and open_checkpoint(checkpoint.config_folder).files != checkpoint.files:
        what = "transformers loads folders, and takes other files of this one"
    if what:
        raise PlanError(Problem(where=checkpoint.location, what=what, fix="leave --with-transformers out"))
    out, notes = [Contender(READ, lambda: (read_bytes(checkpoint, reading), {}))], []
    if is_cold:
        try:
            read_bytes(checkpoint, reading, is_direct=True)
            out.append(Contender(PAST, lambda: (read_bytes(checkpoint, reading, is_direct=True), {})))
        except CheckpointError as error:
            notes.append(f"left out '{PAST}': {error.problems[0].found or error}")
    out.append(Contender(STREAM, lambda: (stream_bytes(checkpoint, reading, device=device), {})))
    return out, notes


def _loads(patch: Any, location: str, reading: Reading, given: Mapping[str, Any]) -> Run:
    def run() -> tuple[object, Mapping[str, float]]:
        import tepatch.loading

        model = tepatch.loading.load(patch, location, reading=reading, progress=False, **given)
        seconds: Any = model.tepatch.seconds  # type: ignore[union-attr]
        return model, seconds

    return run


def _stock_loads(checkpoint: FolderCheckpoint, device: torch.device, dtype: str) -> Run:
    from tepatch.hf.config import model_class, read_config

    folder = checkpoint.config_folder
    stock: Any = model_class(read_config(folder))

    def run() -> tuple[object, Mapping[str, float]]:
        placed = {} if device.type == "cpu" else {"device_map": str(device)}
        model = stock.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **placed)
        for parameter in model.parameters() if device.type == "cpu" else ():
            parameter.data = parameter.data.clone()  # left mapped to the file, it would not be read yet
        return model, {}

    return run


def _measure(
    contenders: list[Contender],
    rounds: int,
    dropped: list[Any],
    notes: list[str],
    *,
    total: int,
    progress: bool | None,
) -> None:
    """Fill in the times: once around for warming up, then ``rounds`` times; ``dropped`` leave the page cache before."""
    import torch

    from tepatch.progress import ProgressBar
    from tepatch.transfer.raw import cached_share, forget

    kept = 0.0
    with ProgressBar(total * len(contenders) * (rounds + 1), progress, "measuring") as bar:
        for index in range(rounds + 1):
            for each in contenders:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if dropped:
                    forget(dropped)
                    kept = max(kept, cached_share(dropped) or 0.0)
                started = time.perf_counter()
                held, parts = each.run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                del held  # which takes time too
                if index:
                    each.seconds.append(seconds)
                    each.parts.append(parts)
                bar.advance(total)
    if dropped and cached_share(dropped[:1]) is None:
        notes.append("this file system does not say what is in the page cache: the files may not have been dropped")
    if kept > 0.01:
        notes.append(
            f"{kept:.0%} of the files stayed in the page cache: something uses them, or they are in memory only"
        )


def _print(result: dict[str, Any]) -> None:
    state = "cold: dropped from the page cache before each load" if result["is_cold"] else "warm"
    say(f"{result['checkpoint']} to {result['device']}: {result['bytes'] / 1e9:.2f} GB, {state}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    say(f"{result['threads']} threads, pieces of {result['piece_bytes'] >> 20} MiB; {versions}\n")
    rows = [
        (
            name,
            f"{run['median']:.3f} s",
            f"{min(run['seconds']):.3f}",
            f"{max(run['seconds']):.3f}",
            f"{run['gb_per_second']:.2f} GB/s",
        )
        for name, run in result["runs"].items()
    ]
    print_table(("", "median", "least", "most", ""), rows, numbers_from=1)
    say()
    for name, run in result["runs"].items():
        if run["stages"]:
            stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in run["stages"].items())
            say(f"{name}: {stages} s")
    say("The first of them:")
    for sentence in result["advice"]:
        say(f"  {sentence}")
    for note in result["notes"]:
        say(f"  note: {note}")
