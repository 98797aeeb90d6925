"""Converting a checkpoint on disk from one layout to another, with no model in memory and no GPU.

Each tensor of the new files is put together from those of the old ones, which are read and not mapped: what is needed
is one tensor for each thread, and what it is made of. Where a layout only concatenates, bytes go straight from file
to file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tepatch import __version__
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.checkpoint.listing import parse_json
from tepatch.checkpoint.manifest import MANIFEST, STEM, Manifest, Original, printable
from tepatch.checkpoint.staging import Staging
from tepatch.dtypes import dtype_code, is_convertible, torch_dtype
from tepatch.errors import CheckpointError, PlanError, Problem, visible
from tepatch.hf.config import AutoClass
from tepatch.hf.digests import Promised, held, promised
from tepatch.hf.fit import NATIVE, ORIGINAL
from tepatch.hf.prepare import AUTO, Prepared, Source, opened, parameter_dtype, prepare
from tepatch.patch import Patch
from tepatch.planning import Plan
from tepatch.plugins import PluginHost, default_host
from tepatch.transfer.reader import Parameters, Tensors, on_cpu_by_default
from tepatch.transfer.steps import check_constants, check_copies
from tepatch.transfer.write import CONFIGS, MAX_SHARD_SIZE, Outline, companions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Layout = Literal["te", "hf"]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What ``convert`` has done."""

    source: str
    destination: Path
    layout: str
    """The layout that was written: ``te`` or ``hf``."""
    found: str
    """The layout that the source was in."""
    plan: Plan
    """What was executed: it reads the source's tensors, or the parameters that they make."""
    files: dict[str, int]
    """Bytes of each file."""
    bytes_written: int
    """Bytes of weight files written by this run; less than all of them when it went on with an earlier one."""
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        seconds = self.seconds["write"]
        rate = self.bytes_written / 1e9 / max(seconds, 1e-9)
        lines = [
            f"converted {self.source} ({self.found}) to {self.destination} ({self.layout}): "
            f"{len(self.plan.writes):,} tensors in {len(self.files)} files",
            f"  plan {self.seconds['plan']:.2f} s, "
            f"write {seconds:.2f} s ({self.bytes_written:,} bytes, {rate:.2f} GB/s)",
        ]
        inexact = self.plan.inexact()
        if inexact:
            lines.append(f"  {len(inexact)} tensors do not come back bit for bit: see tepatch plan")
        return visible("\n".join([*lines, *(f"  note: {note}" for note in self.notes)]))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-ready data, without the plan."""
        return {
            "source": self.source,
            "destination": str(self.destination),
            "from": self.found,
            "to": self.layout,
            "tensors": len(self.plan.writes),
            "files": self.files,
            "bytes_written": self.bytes_written,
            "inexact": self.plan.inexact(),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


@on_cpu_by_default
def convert(
    patch: str | Patch,
    source: Source,
    destination: str | PathLike[str],
    *,
    to: Layout | None = None,
    dtype: torch.dtype | str = AUTO,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    workers: int = 2,
    overwrite: bool = False,
    mapping: str | PathLike[str] | None = None,
    config: PreTrainedConfig | None = None,
    auto_class: AutoClass = None,
    drop: Sequence[str] = (),
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    progress: bool | None = None,
    plugins: PluginHost | None = None,
) -> Converted:
    """Convert a checkpoint to the layout of a patch's layers (``to="te"``), or back (``to="hf"``), on the CPU.

    By default ``to`` is the layout that ``source`` is not in. Arguments that ``load`` has too mean the same. A
    checkpoint in the layout of the layers carries a manifest, and ``load`` takes it as it is; converted back it is
    the original, bit for bit, with the original's dtypes unless ``dtype`` says otherwise; what ``drop`` names does not
    come back, and with an ``auto_class`` both are of that class. Layouts that the patch knows besides are read too.

    ``destination`` must not exist, unless ``overwrite`` replaces it as a whole, and appears when it is complete. A
    run that was killed goes on where it was when it is started again with the same arguments. Memory: one tensor for
    each of the ``workers``. Raises ``PlanError`` and ``CheckpointError`` before anything is written,
    ``CheckpointError`` also when the source changes meanwhile, or what is converted back is not what the digests in its
    manifest say (nothing appears then), and ``SaveError`` for what can not be written.
    """
    started = time.perf_counter()
    if not isinstance(workers, int) or workers < 1:
        raise PlanError(Problem(where="workers", what="at least one worker is needed", found=repr(workers)))
    checkpoint = opened(
        source, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    # Parameters of a checkpoint of parameters are what they are; to convert back, ``dtype`` is that of the original's.
    job = prepare(
        patch,
        checkpoint,
        config=config,
        dtype=checkpoint.manifest.dtype if checkpoint.manifest is not None else dtype,
        backend="reference",
        mapping=mapping,
        auto_class=auto_class,
        drop=drop,
        plugins=plugins,
    )
    layout = _wanted(to, job)
    plan = _plan(job, layout, dtype)
    assert isinstance(job.checkpoint, FolderCheckpoint)  # nothing of it is fresh
    checkpoint = job.checkpoint
    promise = promised(job)
    written_dtype = job.dtype if layout == NATIVE else _only_dtype(plan)
    other_class = "" if auto_class is None else type(job.model).__name__
    files, left = _companions(checkpoint, written_dtype, config, other_class)
    host = plugins if plugins is not None else default_host()
    if layout == NATIVE:
        sizes = {file: stamp.size for file, stamp in checkpoint.stamps.items()}
        manifest = manifest_of(job, host.package_of(job.patch), sizes)
        files[MANIFEST] = manifest.to_json().encode()
    outline = Outline.of(plan, files, max_shard_size=max_shard_size, stem=STEM if layout == NATIVE else "model")
    planned = time.perf_counter()
    folder = checkpoint.config_folder
    with (
        Staging(
            destination,
            overwrite=overwrite,
            source=folder,
            need=outline.need,
            job=_digest(job, outline, checkpoint),
        ) as new,
        Tensors(checkpoint) as tensors,
    ):
        is_in_two_steps = plan.is_reversed and job.layout != NATIVE
        read = Parameters(job.reading, tensors.read) if is_in_two_steps else tensors.read
        check_constants(plan, read)
        check_copies(job.reading, tensors.read)
        expected = _expected(promise, plan)
        if promise is not None:  # what is written in another dtype has no digest, and what it is made of has
            others = [name for name in promise.digests if name not in expected]
            promise.refuse(promise.differing(others, tensors.read, workers=workers))
        digests: dict[str, str] = {}
        written = outline.write_weights(
            new,
            read,
            None if is_in_two_steps else tensors.pieces,
            workers=workers,
            progress=progress,
            digests=digests if layout == NATIVE else None,
            expected=expected,
        )
        if layout == NATIVE:
            # What an earlier run has written, or was put together, has not passed by.
            digests |= tensors.digests([name for name in plan.reads if name not in digests], workers=workers)
            manifest = replace(manifest, source_digests={name: digests[name] for name in job.reading.reads})
            outline.files[MANIFEST] = manifest.to_json().encode()
        tensors.verify()
        outline.write_files(new)
        new.commit()
    return Converted(
        source=source.location if isinstance(source, FolderCheckpoint) else str(source),
        destination=Path(destination),
        layout=layout,
        found=job.layout,
        plan=plan,
        files=outline.need,
        bytes_written=written,
        seconds={"plan": planned - started, "write": time.perf_counter() - planned},
        notes=(*job.reading.notes, *left, *(promise.notes if promise is not None else ()), *new.notes),
    )


def _expected(promise: Promised | None, plan: Plan) -> dict[str, str]:
    """The digest of each tensor that is to be written as the original had it."""
    if promise is None:
        return {}
    return {n: d for n, d in promise.digests.items() if plan.writes[n].dtype == promise.plan.writes[n].dtype}


NO_DIGEST = "0" * 32


def manifest_of(job: Prepared, package: str, source_files: Mapping[str, int]) -> Manifest:
    """The manifest for a conversion of ``job``'s checkpoint to the layout of the layers, with digests still to come.

    ``package`` is the plugin's; ``source_files`` are the checkpoint's files and their bytes.
    """
    relation = job.relation
    sources = {name: entry for name, entry in relation.sources.items() if entry.state != "ignored"}
    return Manifest(
        patch=job.patch.name,
        plugin=printable(package),
        mapping=printable(job.plan.rules.name),
        mapping_digest=job.plan.rules.digest,
        layout_digest=relation.layout_digest,
        model_class=type(job.model).__name__,
        dtype=str(job.dtype).removeprefix("torch."),
        tepatch=__version__,
        source=printable(job.checkpoint.location),
        source_files=source_files,
        source_digests=dict.fromkeys(job.reading.reads, NO_DIGEST),
        originals={name: Original(shape=entry.shape, dtype=entry.dtype) for name, entry in sources.items()},
        ignored={name: entry.note for name, entry in job.reading.sources.items() if entry.state == "ignored"},
    )


def _wanted(to: str | None, job: Prepared) -> str:
    """The layout to write: what was asked for, if it is another than the source's."""
    layout = to or (NATIVE if job.layout == ORIGINAL else ORIGINAL)
    if layout not in (NATIVE, ORIGINAL):
        raise PlanError(Problem(where="to", what="no such layout", expected="'te' or 'hf'", found=repr(to)))
    if layout == job.layout:
        raise PlanError(
            Problem(
                where=job.checkpoint.location,
                what=f"this checkpoint is in the layout '{layout}' already",
                fix=f"copy it, or convert it to '{NATIVE if layout == ORIGINAL else ORIGINAL}'",
            )
        )
    return layout


def _plan(job: Prepared, layout: str, dtype: torch.dtype | str) -> Plan:
    if layout == NATIVE:
        return job.reading
    # Read in the dtypes that its files have, whatever the manifest says.
    plan = held(job) if job.layout == NATIVE else job.relation
    if not _is_auto(dtype):
        code = dtype_code(parameter_dtype(dtype, job.model.config)) or ""
        sources = {n: replace(e, dtype=code) if is_convertible(e.dtype, code) else e for n, e in plan.sources.items()}
        plan = replace(plan, sources=sources)
    return plan.reverse()


def _is_auto(dtype: torch.dtype | str) -> bool:
    return isinstance(dtype, str) and dtype == AUTO


def _only_dtype(plan: Plan) -> torch.dtype | None:
    """The floating-point dtype of all that is written; None if there are several."""
    found = {torch_dtype(spec.dtype) for spec in plan.writes.values()}
    floats = [dtype for dtype in found if dtype is not None and dtype.is_floating_point]
    return floats[0] if len(floats) == 1 else None


def _companions(
    checkpoint: FolderCheckpoint, dtype: torch.dtype | None, config: PreTrainedConfig | None, other_class: str
) -> tuple[dict[str, bytes], list[str]]:
    """All that belongs to the model beside its weights, as it is, and notes.

    Only the config says another dtype, if it is one, and the class that was asked for (``other_class``), or is the
    ``config`` that was passed.
    """
    folder = checkpoint.config_folder
    files, notes = companions(folder, known=(*checkpoint.files, checkpoint.entry, *checkpoint.also_present))
    for name in CONFIGS:
        if not (folder / name).exists():
            continue
        path = file_inside(folder, name)
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(Problem(where=str(path), what="cannot be read", found=str(error))) from error
    if config is not None:
        files["config.json"] = config.to_json_string().encode()
        notes.append("config.json is the config that was passed")
    if "config.json" in files:
        data = parse_json(files["config.json"], where=str(folder / "config.json"), subject="text")
        changes: dict[str, Any] = {}
        said, wanted = data.get("dtype", data.get("torch_dtype")), str(dtype).removeprefix("torch.")
        if dtype is not None and said != wanted:
            data.pop("torch_dtype", None)
            changes["dtype"] = wanted
        if other_class and data.get("architectures") != [other_class]:
            # Else transformers would look for the tensors of the class that it was, and draw what it does not find.
            changes["architectures"] = [other_class]
        if data.pop("transformers_weights", None) is not None or changes:  # weights get names of their own
            files["config.json"] = (json.dumps({**data, **changes}, indent=2) + "\n").encode()
    return files, notes


def _digest(job: Prepared, outline: Outline, checkpoint: FolderCheckpoint) -> str:
    """What decides every byte that is written: a run with the same may go on where another was killed."""
    text = hashlib.sha256(__version__.encode())
    for file, stamp in checkpoint.stamps.items():
        # The file whose header was read, however it was named.
        seen = {field.name: getattr(stamp, field.name) for field in fields(stamp) if field.name != "where"}
        text.update(repr((file, seen)).encode("utf-8", "surrogateescape"))
    for shard in outline.shards:
        text.update(repr((shard.file, shard.nbytes)).encode() + shard.header)
    for name, data in outline.files.items():
        text.update(name.encode() + hashlib.sha256(data).digest())
    text.update(f"{outline.plan.layout_digest} {job.reading.layout_digest} {outline.plan.is_reversed}".encode())
    return text.hexdigest()
