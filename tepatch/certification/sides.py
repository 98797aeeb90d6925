"""A checkpoint seen as the original's tensors, whatever layout it is in: the two sides of a comparison.

Parameters are looked at in the geometry of the original tensors that they hold. All that a layout does to a value is
elementwise there: a scale and an offset, and a rounding to the parameter's dtype. So both what a side holds and what
it should hold are tensors of the original's shape, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING

import torch

from tepatch.certification.comparison import affines_of
from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.dtypes import FLOATS, is_convertible, is_exact, torch_dtype
from tepatch.errors import PlanError
from tepatch.hf.config import AutoClass
from tepatch.hf.fit import NATIVE, ORIGINAL
from tepatch.hf.prepare import Prepared, prepare
from tepatch.planning.bind import IDENTITY, Affine
from tepatch.planning.plan import Copy, Plan, Spec, Step
from tepatch.transfer.reader import Parameters, Tensors
from tepatch.transfer.steps import Read, assemble, put, same_bits

if TYPE_CHECKING:
    from tepatch.patch import Patch
    from tepatch.plugins import PluginHost


@dataclass(kw_only=True)
class Side:
    """One checkpoint, open for reading; several threads may read."""

    checkpoint: Checkpoint
    layout: str
    job: Prepared | None
    """None if the checkpoint is not what the patch expects: then its tensors are taken as they are."""
    tensors: Tensors
    names: Mapping[str, Spec]
    """The original's tensors that this side gives, with their dtypes here; not the ignored ones."""
    ignored: Mapping[str, str]
    """Tensors in its files that the mapping ignores, each with the reason."""
    tied: Mapping[str, str]
    """Copies of tied tensors, each with the parameter that it is a copy of."""
    refusal: PlanError | None = None
    """Why there is no job."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors in its files, where they are not those of ``names``."""

    def __post_init__(self) -> None:
        self.copies: dict[str, list[Copy]] = {}
        for copy in self.relation.copies if self.relation is not None else ():
            self.copies.setdefault(copy.source, []).append(copy)
        is_other = self.layout not in (ORIGINAL, NATIVE) and self.job is not None
        self._parameter: Read = self.tensors.read
        if is_other and self.job is not None:
            self._parameter = Parameters(self.job.reading, self.tensors.read)

    @property
    def relation(self) -> Plan | None:
        return self.job.relation if self.job is not None else None

    @property
    def is_native(self) -> bool:
        """Whether its files hold parameters."""
        return self.layout == NATIVE

    @property
    def holds_originals(self) -> bool:
        """Whether its files hold the original's tensors by their own names."""
        return self.layout == ORIGINAL

    def original(self, name: str, dtype: str = "") -> torch.Tensor:
        """The original's tensor, in ``dtype`` (a code; its own by default). Not to be written to."""
        spec = self.names.get(name) or self.checkpoint.tensors[name]
        wanted = torch_dtype(dtype or spec.dtype)
        if self.holds_originals:
            return self.tensors.read(self.stored.get(name, name)).to(wanted)
        return self._pulled(name, dtype or spec.dtype, undo=True)

    def raw(self, name: str) -> torch.Tensor:
        """What the parameters hold of an original tensor, in its geometry and with nothing undone or rounded."""
        return self._pulled(name, self.raw_dtype(name), undo=False)

    def value(self, name: str) -> torch.Tensor:
        """The original's tensor without any rounding that comes from giving it back."""
        if not self.is_native:
            return self.original(name)
        return self.original(name, "F64" if self.affines(name) else self.raw_dtype(name))

    def raw_dtype(self, name: str) -> str:
        """The widest dtype of the parameters that hold a tensor."""
        return widest(self._stored_dtype(target) for target in self._targets(name))

    def affines(self, name: str) -> tuple[Affine, ...]:
        """Scales and offsets by which parameters hold a tensor, other than none at all."""
        return affines_of([copy.affine for copy in self.copies.get(name, ())])

    def encoded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What ``raw`` has to be for an original ``tensor``: scaled and rounded as loading does it, part by part."""
        if name in self.tied:
            return tensor.to(torch_dtype(self._stored_dtype(self.tied[name])))
        return encoded(
            tensor, self.copies[name], {target: self._stored_dtype(target) for target in self._targets(name)}
        )

    def passed_through(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        """What becomes of an original tensor that is loaded into parameters and saved in ``dtype`` again."""
        held = self.encoded(name, tensor)
        out = torch.empty(tensor.shape, dtype=torch_dtype(dtype))
        if name in self.tied:
            return out.copy_(held)
        for copy in self.copies[name]:
            put(_in_place(copy, is_undone=True), held, out)
        return out

    @property
    def other_copies(self) -> tuple[str, ...]:
        """Copies of tied tensors in the files of another layout: they have no name among the original's."""
        if self.job is None or self.holds_originals:
            return ()
        return tuple(name for name, entry in self.job.reading.sources.items() if entry.state == "redundant")

    def tie_is_kept(self, name: str) -> bool:
        """Whether a copy of a tied tensor, in a file, has the values of the tensor that it is a copy of."""
        if self.job is None or self.is_native:
            return True  # there is one tensor only
        plan = self.job.reading
        target = plan.sources[name].note
        parts = [copy.source for copy in plan.copies if copy.target == target]
        dtype = widest(plan.sources[each].dtype for each in (*parts, name))  # so that nothing is rounded
        entry = replace(plan.targets[target], dtype=dtype)
        whole = assemble(replace(plan, targets={**plan.targets, target: entry}), target, self.tensors.read)
        return same_bits(whole, self.tensors.read(name).to(whole.dtype))

    def tied_name(self, name: str) -> str:
        """The original tensor that a tied copy is equal to, or the parameter if it has no tensor of its own."""
        target = self.tied[name]
        sources = [each for each, copies in self.copies.items() if any(copy.target == target for copy in copies)]
        return sources[0] if len(sources) == 1 else target

    def _targets(self, name: str) -> list[str]:
        return [self.tied[name]] if name in self.tied else [copy.target for copy in self.copies[name]]

    def _stored_dtype(self, target: str) -> str:
        if self.is_native:
            return self.checkpoint.tensors[target].dtype
        return self.relation.targets[target].dtype if self.relation is not None else ""

    def _pulled(self, name: str, dtype: str, *, undo: bool) -> torch.Tensor:
        wanted = torch_dtype(dtype)
        if name in self.tied:
            return self._parameter(self.tied[name]).to(wanted)
        out = torch.empty(self.names[name].shape, dtype=wanted)
        for copy in self.copies[name]:
            step = copy.step(is_reversed=True)
            put(step if undo else step._replace(affine=IDENTITY), self._parameter(copy.target), out)
        return out


def open_side(
    stack: ExitStack,
    checkpoint: FolderCheckpoint,
    patch: str | Patch,
    *,
    mapping: str | PathLike[str] | None,
    dtype: torch.dtype | str,
    plugins: PluginHost | None,
    auto_class: AutoClass,
    drop: Iterable[str],
    may_not_fit: bool,
) -> Side:
    """Settle what a checkpoint is, and open it for as long as ``stack`` lasts.

    ``dtype`` is that of the parameters which a checkpoint of the original's tensors has gone through. Raises
    ``PlanError`` for a checkpoint that does not fit the patch, unless it ``may_not_fit`` and may be the original's.
    """
    native = checkpoint.manifest is not None
    chosen = checkpoint.manifest.dtype if checkpoint.manifest is not None else dtype

    def settled(dtype: torch.dtype | str) -> Prepared:
        return prepare(
            patch,
            checkpoint,
            dtype=dtype,
            backend="reference",
            mapping=mapping,
            auto_class=auto_class,
            drop=drop,
            plugins=plugins,
        )

    try:
        job = settled(chosen)
    except PlanError as error:
        if native or not may_not_fit:
            raise
        specs = {name: Spec(tuple(info.shape), info.dtype) for name, info in checkpoint.tensors.items()}
        return Side(
            checkpoint=checkpoint,
            layout=ORIGINAL,
            job=None,
            tensors=stack.enter_context(Tensors(checkpoint)),
            names=specs,
            ignored={},
            tied={},
            refusal=error,
        )
    if job.layout not in (ORIGINAL, NATIVE):
        # In a dtype that holds all of its values: what is rounded on the way shows as a difference of dtypes.
        code = widest(entry.dtype for entry in job.reading.sources.values() if entry.state == "used")
        job = settled(torch_dtype(code) or chosen)
    assert isinstance(job.checkpoint, FolderCheckpoint)  # nothing of it is fresh
    return Side(
        checkpoint=job.checkpoint,
        layout=job.layout,
        job=job,
        tensors=stack.enter_context(Tensors(job.checkpoint)),
        names=job.relation.reverse().writes,
        ignored={name: entry.note for name, entry in job.reading.sources.items() if entry.state == "ignored"},
        tied={name: entry.note for name, entry in job.relation.sources.items() if entry.state == "redundant"},
    )


def named_like(side: Side, other: Side) -> Side:
    """``side`` with the names of ``other`` for tied tensors that the two have under different names."""
    names = {}
    for plan, is_here in ((side.relation, True), (other.relation, False)):
        for name, entry in plan.sources.items() if plan is not None else ():
            if entry.state == "used" and entry.note:
                mine, wanted = (name, entry.note) if is_here else (entry.note, name)
                known = side.names.keys() | side.ignored.keys()
                if mine in side.names and wanted not in known and wanted in other.names and mine not in other.names:
                    names[mine] = wanted
    if side.job is None or not names:
        return side
    return replace(
        side,
        job=replace(side.job, relation=side.job.relation.renamed(names)),
        names={names.get(name, name): spec for name, spec in side.names.items()},
        stored={wanted: mine for mine, wanted in names.items()},
    )


def encoded(tensor: torch.Tensor, copies: Sequence[Copy], dtypes: Mapping[str, str]) -> torch.Tensor:
    """What parameters hold of an original ``tensor``, in its own geometry; ``dtypes`` are those of the parameters.

    Of parameters in several dtypes, each part is rounded to its own, and the result is in the widest.
    """
    out = torch.empty(tensor.shape, dtype=torch_dtype(widest(dtypes.values())))
    for copy in copies:
        step, dtype = _in_place(copy, is_undone=False), torch_dtype(dtypes[copy.target])
        part = out if dtype == out.dtype else torch.empty(tensor.shape, dtype=dtype)
        put(step, tensor, part)
        if part is not out:
            _view(out, step).copy_(_view(part, step))
    return out


def widest(dtypes: Iterable[str]) -> str:
    """A dtype that holds every value of all these; one of them if they are not floats."""
    codes: list[str] = list(dict.fromkeys(dtypes))
    are_floats = all(is_convertible(code, "F64") for code in codes)
    candidates: list[str] = [*codes, *FLOATS] if are_floats else codes
    for candidate in candidates:
        if all(is_exact(code, candidate) for code in codes):
            return candidate
    return codes[0]


def _in_place(copy: Copy, *, is_undone: bool) -> Step:
    """A copy with the source's own geometry on both sides: what happens to values, without moving them."""
    sizes, strides, offset = copy.pair.sizes, copy.pair.source_strides, copy.pair.source_offset
    return Step(copy.source, sizes, strides, offset, strides, offset, copy.affine, is_undone)


def _view(tensor: torch.Tensor, step: Step) -> torch.Tensor:
    return tensor.as_strided(step.sizes, step.write_strides, step.write_offset)
