"""Proof by reading both: every tensor of one checkpoint came back in another, in whatever layout either is.

A conversion is proven right before it starts, and its digests are kept while it runs. This trusts neither: both
checkpoints are opened anew, and what the second gives back is held against the first, bit for bit; where values were
rounded or scaled on purpose, against exactly that operation. Digests of all that was read go into a certificate, by
which any later change of the second checkpoint is found without the first (``check_certificate``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tepatch.certification.certificate import (
    FAILURES,
    Certificate,
    SideRecord,
    StoredRecord,
    TensorRecord,
    check_writable,
    write_certificate,
)
from tepatch.certification.comparison import Operation, deviation, difference
from tepatch.certification.folders import beside_weights, subfolders_note, weight_records
from tepatch.certification.recheck import CheckResult, check_certificate
from tepatch.certification.sides import Side, named_like, open_side
from tepatch.checkpoint import Checkpoint, open_checkpoint
from tepatch.checkpoint.manifest import printable
from tepatch.dtypes import is_convertible
from tepatch.errors import CheckpointError, LoadError, PlanError, Problem, SaveError
from tepatch.hf.config import AutoClass, read_config
from tepatch.hf.prepare import AUTO
from tepatch.mapping.names import fold
from tepatch.planning.accounting import DROPPED
from tepatch.planning.plan import Plan
from tepatch.plugins import default_host
from tepatch.progress import ProgressBar
from tepatch.proven import installed_versions
from tepatch.transfer.reader import on_cpu_by_default, tensor_digest
from tepatch.transfer.steps import check_constants
from tepatch.verify import judge, verify

if TYPE_CHECKING:
    from tepatch.patch import Patch
    from tepatch.plugins import PluginHost

__all__ = ["CheckResult", "certify", "check_certificate"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Fields of a config that a conversion or a version of transformers changes, and no number of the model depends on.
_FREE_FIELDS = {"dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path"}


@on_cpu_by_default
def certify(
    patch: str | Patch,
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    mapping: str | PathLike[str] | None = None,
    auto_class: AutoClass = None,
    drop: Sequence[str] = (),
    dtype: torch.dtype | str = AUTO,
    out: str | PathLike[str] | None = None,
    write: bool = True,
    token_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    workers: int = 2,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    progress: bool | None = None,
    plugins: PluginHost | None = None,
) -> Certificate:
    """Compare every tensor of ``source`` with what ``destination`` gives back, and write a certificate of it.

    Both are folders, checkpoint files or hub ids; each may be in the original's layout, in that of the patch's
    layers, or in another that the patch knows. Tensors of one dtype must be equal to the bit. Where dtypes differ, or
    the mapping scales values, the destination must be exactly what the conversion makes of the source, and the largest
    deviation is measured and held against the bound of that operation. ``dtype`` says through which dtype the values
    went where neither checkpoint does: original to original by way of a model. Copies of tied tensors may be left
    out of the destination, and so may tensors that the mapping ignores.

    ``auto_class`` is the class that both are taken for, and ``drop`` names tensors of the source that are left out, as
    ``convert`` has them: the certificate lists them as ignored.

    ``variant``, ``subfolder``, ``revision`` and ``use_safetensors`` are the source's. ``token_ids`` (``[batch,
    tokens]``) also compares logits with transformers', on whichever side is in the original's layout, loaded in
    ``dtype``; whether they keep to the bound of ``tepatch verify`` counts. ``out`` is the folder for
    ``tepatch-certificate.json`` and ``.html``, by default the destination's; with ``write=False`` nothing is written.
    Memory: a few tensors for each of the ``workers``.

    Returns the certificate, ``passed`` or not, with every problem named. Raises ``CheckpointError`` or ``PlanError``
    for what can not be opened or compared at all, ``PlanError`` also for ``workers`` and ``token_ids`` that can not be
    used, and ``SaveError`` if the certificate can not be written. All of that but the last comes before the comparison.
    """
    if not isinstance(workers, int) or workers < 1:
        raise PlanError(Problem(where="workers", what="at least one worker is needed", found=repr(workers)))
    first = open_checkpoint(
        source, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    second = open_checkpoint(destination)
    folder = Path(out) if out is not None else second.config_folder
    if first.config_folder.resolve() == second.config_folder.resolve() and first.files == second.files:
        raise PlanError(
            Problem(where=second.location, what="source and destination are one checkpoint: that would prove nothing")
        )
    if write:
        check_writable(folder)  # now, and not after hours
    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        options: dict[str, Any] = {"mapping": mapping, "dtype": dtype, "plugins": plugins, "auto_class": auto_class}
        src = open_side(stack, first, patch, drop=drop, may_not_fit=False, **options)
        dst = named_like(open_side(stack, second, patch, drop=(), may_not_fit=True, **options), src)
        logits = _Logits.of(src, dst, token_ids) if token_ids is not None else None
        bar = stack.enter_context(ProgressBar(_nbytes(first) + _nbytes(second), progress, "comparing"))

        def each(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
            return list(pool.map(work, items))

        comparison = _Comparison(src, dst, has_dtype=not (isinstance(dtype, str) and dtype == AUTO))
        rows = _unswapped(each(_advancing(comparison.row, bar, first), comparison.names), comparison.problems)
        problems = [*_first_problems(src, dst), *(comparison.problems[r.name] for r in rows if r.status in FAILURES)]
        records = [
            _record(side, printable(str(location)), known, each, bar, hash_all=side is dst)
            for side, location, known in (
                (src, source, {r.name: r.source_sha256 for r in rows}),
                (dst, destination, {r.name: r.destination_sha256 for r in rows}),
            )
        ]
        for side in (src, dst):
            side.tensors.verify()
    assert src.job is not None  # only the destination may have none
    relation = src.job.relation
    parity = None
    if logits is not None:
        parity = logits.parity(
            src.job.patch, mapping=mapping, dtype=dtype, auto_class=auto_class, drop=drop if logits.side is src else ()
        )
        if not parity["passed"]:
            problems.append(Problem(where=parity["location"], what=f"the logits do not agree: {parity['verdict']}"))
    certificate = Certificate(
        patch=src.job.patch.name,
        plugin=(plugins if plugins is not None else default_host()).package_of(src.job.patch),
        mapping=relation.mapping,
        mapping_sha256=relation.digest,
        layout_sha256=relation.layout_digest,
        versions=installed_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=records[0],
        destination=records[1],
        tensors=tuple(rows),
        constants=sum(len(side.relation.constants) for side in (src, dst) if side.relation and side.is_native),
        problems=tuple(problems),
        notes=tuple(_notes(src, dst, has_class=auto_class is not None)),
        parity=parity,
    )
    if write:
        write_certificate(certificate, folder)
    return certificate


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the destination may be, if it is to be right."""

    expected: torch.Tensor
    operation: Operation


class _Comparison:
    def __init__(self, src: Side, dst: Side, *, has_dtype: bool) -> None:
        self._src = src
        self._dst = dst
        self._has_dtype = has_dtype
        self._is_same_layout = src.is_native and dst.is_native and _layout(src) == _layout(dst)
        self.problems: dict[str, Problem] = {}
        """By the name of the tensor. Threads add to it, each its own."""
        held = dict.fromkeys([*dst.names, *(dst.ignored if dst.holds_originals else ())])
        # Of the source's tensors, in its order; then what only the destination has.
        self.names = list(dict.fromkeys([*src.names, *src.ignored, *held]))

    def row(self, name: str) -> TensorRecord:
        """Compare one tensor, wherever it is."""
        try:
            return self._row(name)
        except (LoadError, SaveError) as error:  # a value that the dtype it goes to can not hold
            side = self._src if name in self._src.names else self._dst
            spec = side.names.get(name) or side.checkpoint.tensors[name]
            row = TensorRecord(name=name, shape=tuple(spec.shape), dtype=spec.dtype, status="differs")
            problem = error.problems[0]
            details = (*problem.details, f"at {problem.where}")
            return self._fail(row, "differs", replace(problem, where=self._where(self._dst, name), details=details))

    def _row(self, name: str) -> TensorRecord:
        src, dst = self._src, self._dst
        if name in src.ignored:
            return self._ignored(name)
        if name not in src.names:
            return self._only_in_destination(name)
        tensor = src.original(name)
        row = TensorRecord(
            name=name,
            shape=tuple(tensor.shape),
            dtype=src.names[name].dtype,
            status="equal",
            source_sha256=tensor_digest(tensor),
        )
        if name in src.tied:
            row = replace(row, status="tied copy", note=f"equal to {src.tied_name(name)}")
            if not src.tie_is_kept(name):
                what = f"differs from {src.tied_name(name)} in the source, and the config says that they are one"
                return self._fail(row, "differs", Problem(where=self._where(src, name), what=what))
        if name not in dst.names and not (dst.holds_originals and name in dst.ignored):
            if name in src.tied:
                return row
            what = "is missing: the source has this tensor and the destination does not give it back"
            return self._fail(row, "missing", Problem(where=self._where(dst, name), what=what))
        return self._compared(row, tensor)

    def _ignored(self, name: str) -> TensorRecord:
        info = self._src.checkpoint.tensors[name]
        tensor = self._src.tensors.read(name)
        row = TensorRecord(
            name=name,
            shape=tuple(info.shape),
            dtype=info.dtype,
            status="ignored",
            note=self._src.ignored[name],
            source_sha256=tensor_digest(tensor),
        )
        # It need not come back. If it does, under the original's name, it is what it was.
        if self._dst.holds_originals and name in self._dst.checkpoint.tensors:
            return self._compared(row, tensor)
        return row

    def _only_in_destination(self, name: str) -> TensorRecord:
        dst = self._dst
        spec = dst.names[name] if name in dst.names else dst.checkpoint.tensors[name]
        row = TensorRecord(
            name=name,
            shape=tuple(spec.shape),
            dtype=spec.dtype,
            status="extra",
            destination_sha256=tensor_digest(dst.original(name)),
        )
        if name in dst.tied and dst.tied_name(name) in self._src.names and dst.tie_is_kept(name):
            return replace(row, status="tied copy", note=f"equal to {dst.tied_name(name)}, and not in the source")
        what = "is in the destination and not in the source"
        return self._fail(row, "extra", Problem(where=self._where(dst, name), what=what))

    def _compared(self, row: TensorRecord, tensor: torch.Tensor) -> TensorRecord:
        name, dst = row.name, self._dst
        where = self._where(dst, name)
        there = dst.names.get(name) or dst.checkpoint.tensors[name]
        if tuple(there.shape) != row.shape or not is_convertible(row.dtype, there.dtype):
            row = replace(row, destination_sha256=tensor_digest(dst.original(name)))
            forms = [f"{dtype} {list(shape)}" for dtype, shape in ((row.dtype, row.shape), (there.dtype, there.shape))]
            problem = Problem(where=where, what="is of another shape or kind", expected=forms[0], found=forms[1])
            return self._fail(row, "differs", problem)
        found = dst.raw(name) if dst.is_native else dst.original(name)
        attempts = self._attempts(name, tensor, found)
        for attempt in attempts:
            operation = attempt.operation
            is_converted = bool(operation.roundings or operation.affines)
            if difference(attempt.expected, found, is_converted=is_converted) is None:
                return self._agreed(row, operation)
        row = replace(row, destination_sha256=tensor_digest(dst.original(name)))
        return self._fail(row, "differs", self._difference(where, tensor, found, attempts[0]))

    def _agreed(self, row: TensorRecord, operation: Operation) -> TensorRecord:
        """The row of a tensor that is what it has to be, unless a number was lost on the declared way."""
        name, src, dst = row.name, self._src, self._dst
        is_the_same = not operation.roundings and not operation.affines
        there = dst.names.get(name) or dst.checkpoint.tensors[name]
        is_known = is_the_same and there.dtype == row.dtype
        digest = row.source_sha256 if is_known else tensor_digest(dst.original(name))
        row = replace(row, destination_sha256=digest)
        if is_the_same:
            return row
        row = replace(row, operation=str(operation), bound=0.0, deviation=0.0)
        if not operation.is_exact:
            row = replace(row, bound=operation.bound, deviation=deviation(src.value(name), dst.value(name), operation))
        if row.status == "equal":
            row = replace(row, status="converted")
        if row.deviation is not None and row.bound is not None and row.deviation > row.bound:
            problem = Problem(
                where=self._where(dst, name),
                what=f"numbers were lost ({operation})",
                expected=f"a deviation of at most {row.bound:.3g}",
                found=f"{row.deviation:.3g}",
                fix="convert to a dtype that holds these values",
            )
            return self._fail(replace(row, deviation=None), "differs", problem)
        return row

    def _attempts(self, name: str, tensor: torch.Tensor, found: torch.Tensor) -> list[_Attempt]:
        """What the destination may be: the likeliest first."""
        src, dst = self._src, self._dst
        own, code = src.names[name].dtype if name in src.names else src.checkpoint.tensors[name].dtype, ""
        if self._is_same_layout and name in dst.names and src.raw_dtype(name) == dst.raw_dtype(name):
            return [_Attempt(src.raw(name), Operation())]
        if dst.is_native:
            code = dst.raw_dtype(name)
            before = ((src.raw_dtype(name), own),) if src.is_native else ()
            affines = (*(src.affines(name) if src.is_native else ()), *dst.affines(name))
            return [_Attempt(dst.encoded(name, tensor), _operation((*before, (own, code)), affines))]
        code = (dst.names.get(name) or dst.checkpoint.tensors[name]).dtype
        if src.is_native:
            return [_Attempt(src.original(name, code), _operation(((src.raw_dtype(name), code),), src.affines(name)))]
        attempts = [_Attempt(tensor.to(found.dtype), _operation(((own, code),), ()))]
        if src.holds_originals and name in src.names and (self._has_dtype or src.affines(name)):
            middle = src.raw_dtype(name)
            operation = _operation(((own, middle), (middle, code)), src.affines(name))
            attempts.append(_Attempt(src.passed_through(name, tensor, code), operation))
        return attempts

    def _difference(self, where: str, tensor: torch.Tensor, found: torch.Tensor, attempt: _Attempt) -> Problem:
        operation = attempt.operation
        is_converted = bool(operation.roundings or operation.affines)
        it = difference(attempt.expected, found, is_converted=is_converted)
        assert it is not None
        lines = [f"first at {list(it.first)}"]
        if it.largest is not None:
            lines[0] += f": {it.expected!r} in the source, {it.found!r} in the destination"
            lines.append(f"largest difference: {it.largest:.6g}")
        if is_converted:
            lines.append(f"the source was converted before it was compared: {operation}")
        return Problem(
            where=where,
            what=f"{it.count:,} of {found.numel():,} elements differ from the source's",
            details=tuple(lines),
            fix=_suggestion(tensor, found),
        )

    def _fail(self, row: TensorRecord, status: Any, problem: Problem) -> TensorRecord:
        self.problems[row.name] = problem
        return replace(row, status=status, note=problem.what)

    def _where(self, side: Side, name: str) -> str:
        return f"{side.checkpoint.location}: {name}"


def _operation(roundings: Sequence[tuple[str, str]], affines: Sequence[Any]) -> Operation:
    return Operation(
        roundings=tuple((a, b) for a, b in roundings if a != b or affines), affines=tuple(dict.fromkeys(affines))
    )


def _suggestion(tensor: torch.Tensor, found: torch.Tensor) -> str:
    """What to do if the values are the source's after a rounding that nobody has declared."""
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.is_floating_point() and found.is_floating_point() and dtype not in (tensor.dtype, found.dtype):
            rounded = tensor.to(dtype).to(found.dtype)
            if difference(rounded, found, is_converted=True) is None:
                name = str(dtype).removeprefix("torch.")
                return f"these are the source's values rounded to {name}: if that was meant, say dtype={name} (--dtype)"
    return ""


def _unswapped(rows: list[TensorRecord], problems: dict[str, Problem]) -> list[TensorRecord]:
    """Say whose values a tensor has, where it has those of another tensor of the source."""
    owners = {row.source_sha256: row.name for row in rows if row.source_sha256}
    for row in rows:
        owner = owners.get(row.destination_sha256, row.name) if row.destination_sha256 else row.name
        if row.status in ("differs", "extra") and owner != row.name:
            problem = problems[row.name]
            problems[row.name] = replace(problem, details=(*problem.details, f"these are the values of {owner}"))
    return rows


def _first_problems(src: Side, dst: Side) -> list[Problem]:
    """Problems of a whole checkpoint: it does not fit the patch, or constants are none."""
    problems = list(dst.refusal.problems) if dst.refusal is not None else []
    for side in (src, dst):
        problems += [
            Problem(where=f"{side.checkpoint.location}: {name}", what="differs from the tensor that it is a copy of")
            for name in side.other_copies
            if not side.tie_is_kept(name)
        ]
        if side.is_native and side.relation is not None:
            try:
                check_constants(side.relation.reverse(), side.tensors.read)
            except SaveError as error:
                problems += [replace(problem, where=side.checkpoint.location) for problem in error.problems]
    return problems


def _record(
    side: Side,
    location: str,
    known: Mapping[str, str],
    each: Callable[..., list[Any]],
    bar: ProgressBar,
    *,
    hash_all: bool,
) -> SideRecord:
    checkpoint = side.checkpoint

    def digest(name: str) -> str:
        # What is stored by its own name has been read, and need not be once more.
        return (known.get(name) if side.holds_originals else "") or tensor_digest(side.tensors.read(name))

    digests = each(_advancing(digest, bar, checkpoint, of=lambda name: not side.holds_originals), checkpoint.tensors)
    stored = {
        info.in_file: StoredRecord(
            file=info.file,
            offset=info.offset,
            bytes=info.nbytes,
            dtype=info.dtype,
            shape=tuple(info.shape),
            sha256=sha256,
        )
        for info, sha256 in zip(checkpoint.tensors.values(), digests, strict=True)
    }
    weights = weight_records(checkpoint.config_folder, checkpoint.files)
    beside = beside_weights(checkpoint.config_folder, checkpoint.files, hash_all=hash_all, each=each)
    return SideRecord(location=location, layout=side.layout, files={**weights, **beside}, stored=stored)


def _advancing(
    work: Callable[[str], _Result],
    bar: ProgressBar,
    checkpoint: Checkpoint,
    of: Callable[[str], bool] = lambda name: True,
) -> Callable[[str], _Result]:
    def done(name: str) -> _Result:
        result = work(name)
        if name in checkpoint.tensors and of(name):
            bar.advance(checkpoint.tensors[name].nbytes)
        return result

    return done


def _notes(src: Side, dst: Side, *, has_class: bool) -> list[str]:
    notes = [note for side in (src, dst) if side.job is not None for note in side.job.reading.notes]
    if has_class and src.job is not None:
        notes.append(f"both are taken for {type(src.job.model).__name__}, the class that was asked for")
    if dropped := [name for name, reason in src.ignored.items() if reason == DROPPED]:
        notes.append(f"dropped from the source by the caller: {', '.join(fold(dropped, 12))}")
    for side in (src, dst):
        manifest = side.checkpoint.manifest
        if manifest is not None and manifest.ignored:
            names = ", ".join(fold(manifest.ignored, 3))
            notes.append(f"{side.checkpoint.location} was made without tensors that the mapping ignores: {names}")
    one, other = (read_config(side.checkpoint.config_folder).to_dict() for side in (src, dst))
    changed = sorted(k for k in one.keys() | other.keys() if k not in _FREE_FIELDS and one.get(k) != other.get(k))
    if changed:
        names = ", ".join(map(printable, changed))
        notes.append(f"config.json differs in {names}: the tensors are compared, not the settings")
    if note := subfolders_note(dst.checkpoint.config_folder, dst.checkpoint.files):
        notes.append(note)
    return notes


@dataclass(frozen=True, kw_only=True)
class _Logits:
    """Logits that are to be compared, once the tensors are; that they can be is settled before."""

    side: Side
    whose: str
    token_ids: torch.Tensor

    @classmethod
    def of(cls, src: Side, dst: Side, token_ids: Any) -> _Logits:
        """Raises ``PlanError`` for tokens that are none, and if transformers would load other files or none."""
        side = next((side for side in (dst, src) if side.holds_originals and side.job is not None), None)
        if side is None:
            raise PlanError(
                Problem(
                    where=dst.checkpoint.location,
                    what="logits can not be compared: transformers loads neither of these checkpoints",
                    fix="leave the tokens out, or certify against the original",
                )
            )
        location = side.checkpoint.location
        try:
            chosen: tuple[str, ...] = open_checkpoint(location).files
        except CheckpointError:  # a variant only, say
            chosen = ()
        if chosen != side.checkpoint.files:
            raise PlanError(
                Problem(
                    where=location,
                    what="logits can not be compared: transformers would load other files than were certified",
                    expected=_files(side.checkpoint.files),
                    found=_files(chosen),
                    fix="leave the tokens out, or certify a folder with these files alone",
                )
            )
        ids = _checked_ids(
            token_ids, vocabulary=read_config(side.checkpoint.config_folder).get_text_config().vocab_size
        )
        return cls(side=side, whose="the destination" if side is dst else "the source", token_ids=ids)

    def parity(self, patch: Patch, **arguments: Any) -> dict[str, Any]:
        """Load both ways, with the ``arguments`` of ``verify``, and compare; JSON-ready."""
        made = verify(patch, self.side.checkpoint.location, token_ids=self.token_ids, **arguments)
        verdict = judge(made)
        return {
            **made.to_json(),
            "compared": f"{self.whose} with the patch's layers, against transformers",
            "passed": verdict.passed,
            "verdict": str(verdict),
        }


def _files(names: Sequence[str]) -> str:
    return ", ".join(fold(list(names), 3)) or "nothing that it finds by itself"


def _checked_ids(token_ids: Any, *, vocabulary: int) -> torch.Tensor:
    """Token ids as a tensor ``[batch, tokens]`` of int64. Raises ``PlanError``."""
    expected, found = f"whole numbers [batch, tokens], at least one, each from 0 to {vocabulary - 1}", ""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:  # unequal rows, text, numbers that no dtype holds
        raise _no_ids(expected, str(error)) from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = str(ids.dtype)
    elif ids.dim() != 2 or ids.numel() == 0:
        found = f"shape {list(ids.shape)}"
    elif int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = f"from {int(ids.min())} to {int(ids.max())}"
    if found:
        raise _no_ids(expected, found)
    return ids.long()


def _no_ids(expected: str, found: str) -> PlanError:
    what = "these are no tokens that logits can be compared over"
    return PlanError(
        Problem(where="token_ids", what=what, expected=expected, found=found, fix="use the checkpoint's own tokenizer")
    )


def _layout(side: Side) -> str:
    relation: Plan | None = side.relation
    return relation.layout_digest if relation is not None else ""


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes for info in checkpoint.tensors.values())
