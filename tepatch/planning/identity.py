"""The plan for a checkpoint that already holds a model's own parameters: each is itself."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC

from tepatch.dtypes import is_convertible
from tepatch.errors import PlanError, Problem
from tepatch.mapping.names import fold
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Copy, Plan, RuleEntry, SourceEntry, TargetEntry, TensorSpec
from tepatch.views import contiguous, pair


def make_identity_plan(
    relation: Plan, tensors: MappingABC[str, TensorSpec], *, location: str, where: str, notes: tuple[str, ...] = ()
) -> Plan:
    """Read every parameter of ``relation`` from the tensor of the same name.

    ``where`` names what says that the checkpoint is in this layout. Raises ``PlanError`` with every tensor that is
    missing, left over, of another shape, or of a dtype that does not convert.
    """
    wanted = {name: entry for name, entry in relation.targets.items() if entry.state != "tied"}
    problems = []
    if missing := [name for name in wanted if name not in tensors]:
        problems.append(
            Problem(where=where, what=f"parameters without a tensor ({len(missing)})", details=tuple(fold(missing, 12)))
        )
    if left := [name for name in tensors if name not in wanted]:
        problems.append(
            Problem(
                where=where, what=f"tensors that belong to no parameter ({len(left)})", details=tuple(fold(left, 12))
            )
        )
    for name in wanted.keys() & tensors.keys():
        entry, found = wanted[name], tensors[name]
        if tuple(found.shape) != entry.shape or not is_convertible(found.dtype, entry.dtype):
            problems.append(
                Problem(
                    where=f"{location}: {name}",
                    what="does not fit the parameter",
                    expected=f"{entry.dtype} {list(entry.shape)}",
                    found=f"{found.dtype} {list(found.shape)}",
                )
            )
    if problems:
        raise PlanError(problems, heading=f"{location} is not this model in the layout of the patch '{relation.patch}'")
    tied = [name for name, entry in relation.targets.items() if entry.state == "tied"]
    copies = tuple(
        Copy(name, name, pair(contiguous(entry.shape), entry.shape), IDENTITY, 0) for name, entry in wanted.items()
    )
    return Plan(
        patch=relation.patch,
        mapping=where,
        digest=relation.layout_digest,
        location=location,
        copies=copies,
        fills=(),
        sources={name: SourceEntry(tuple(spec.shape), spec.dtype, "used") for name, spec in tensors.items()},
        targets={
            name: TargetEntry(entry.shape, entry.dtype, "tied", 1, entry.tied_to)
            if entry.state == "tied"
            else TargetEntry(entry.shape, entry.dtype, "filled", 0)
            for name, entry in relation.targets.items()
        },
        rules=(
            RuleEntry(where, "every parameter", "used", len(copies), ("every parameter",)),
            *((RuleEntry(where, "tied parameters", "used", len(tied)),) if tied else ()),
        ),
        notes=notes,
    )
