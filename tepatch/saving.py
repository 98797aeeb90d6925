"""Saving a patched model as the checkpoint that it came from: the plan backwards, streaming."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tepatch.checkpoint.resolve import is_tokenizer, weight_files
from tepatch.checkpoint.staging import Staging
from tepatch.dtypes import dtype_code, torch_dtype
from tepatch.errors import Problem, SaveError, visible
from tepatch.hf.config import told
from tepatch.hf.export import check_present, export_plan, report_of
from tepatch.hf.model_plan import plan_of
from tepatch.hf.named import named_tensors
from tepatch.hf.offloaded import offloaded
from tepatch.hf.prepare import AUTO, parameter_dtype
from tepatch.hf.translate import readable
from tepatch.planning import Plan
from tepatch.transfer.steps import check_constants
from tepatch.transfer.write import MAX_SHARD_SIZE, Outline, companions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What ``save`` has written."""

    folder: Path
    plan: Plan
    """Reversed: it reads the parameters and writes the checkpoint's tensors."""
    files: dict[str, int]
    """Bytes of each file."""
    seconds: float
    notes: tuple[str, ...]
    """What was converted on the way, copied, or left out."""

    def __str__(self) -> str:
        tensors, total = len(self.plan.writes), sum(self.files.values())
        rate = total / 1e9 / max(self.seconds, 1e-9)
        lines = [f"saved {tensors} tensors to {self.folder}: {total:,} bytes in {self.seconds:.2f} s ({rate:.2f} GB/s)"]
        return visible("\n".join([*lines, *(f"  note: {note}" for note in self.notes)]))


def save(
    model: PreTrainedModel,
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | str = AUTO,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Saved:
    """Write a patched model as an ordinary Hugging Face checkpoint, in the layout of the one that it came from.

    ``model`` is what ``load`` or ``build`` returned, not a wrapper around it. ``folder`` must not exist, unless
    ``overwrite`` replaces what is there as a whole; it appears when it is complete. ``dtype`` is that of the
    tensors written (default: each parameter's own). The folder gets weights (with an index if they are more than
    ``max_shard_size``), config, generation settings, and the tokenizer of the checkpoint that was loaded.

    Memory: one tensor. Quantized parameters are dequantized on the way. Raises ``PlanError`` naming what is missing
    from the model or was added to it, and ``SaveError`` for a destination that is refused or can not be written.
    """
    started = time.perf_counter()
    report = report_of(model)
    code = "" if isinstance(dtype, str) and dtype == AUTO else dtype_code(parameter_dtype(dtype, model.config)) or ""
    plan = export_plan(model, dtype=code).renamed(plan_of(model).spelling)
    tensors, away, notes = named_tensors(model), offloaded(model), []
    plain = (torch.Tensor, torch.nn.Parameter)
    kinds = Counter(kind.__name__ for kind in (type(tensors[name]) for name in plan.reads) if kind not in plain)
    if kinds:
        notes.append(f"dequantized: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}")
    files = _config_files(model, {spec.dtype for spec in plan.writes.values()})
    if report.config_folder is not None:
        source = Path(report.config_folder)
        if source.is_dir():
            tokenizer, left = companions(source, select=is_tokenizer, known=weight_files(source))
            files = {**tokenizer, **files}
            notes += left
            if tokenizer:
                notes.append(f"copied from {source}: {', '.join(tokenizer)}")
        else:
            notes.append(f"no tokenizer was copied: {source} is gone")
    outline = Outline.of(plan, files, max_shard_size=max_shard_size)

    def read(name: str) -> torch.Tensor:
        tensor = away[name]() if name in away else readable(tensors[name].detach())
        if tensor is None:
            raise SaveError(
                Problem(
                    where=name,
                    what=f"this parameter is a {type(tensors[name]).__name__}: its numbers are not all here",
                    fix="gather sharded parameters first",
                )
            )
        return tensor

    check_present(tensors, plan, away)
    check_constants(plan, read)
    source_folder = None if report.config_folder is None else Path(report.config_folder)
    with Staging(folder, overwrite=overwrite, source=source_folder, need=outline.need) as staging:
        outline.write_weights(staging, read, progress=progress)
        outline.write_files(staging)
        staging.commit()
    return Saved(
        folder=Path(folder),
        plan=plan,
        files=outline.need,
        seconds=time.perf_counter() - started,
        notes=(*notes, *staging.notes),
    )


def _config_files(model: PreTrainedModel, dtypes: set[str]) -> dict[str, bytes]:
    """``config.json`` and ``generation_config.json``, as transformers writes them."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    floats = [d for d in map(torch_dtype, sorted(dtypes)) if d is not None and d.is_floating_point]
    if len(floats) == 1:
        config.dtype = floats[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        except Exception as error:  # transformers checks values here, and raises errors of many types
            raise SaveError(
                Problem(
                    where="model.config, model.generation_config",
                    what="transformers can not save these settings",
                    details=told(error),
                    fix="correct the setting on the model, then save again",
                )
            ) from error
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
