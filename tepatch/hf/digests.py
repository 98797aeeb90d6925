"""A converted checkpoint held against the digests of its original, which its manifest has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from tepatch.checkpoint.manifest import MANIFEST, Manifest
from tepatch.checkpoint.writing import tensor_bytes
from tepatch.errors import CheckpointError, Problem
from tepatch.hf.prepare import Prepared
from tepatch.mapping.names import fold
from tepatch.planning import Plan
from tepatch.transfer.steps import Read, assemble, damaged


@dataclass(frozen=True, kw_only=True)
class Promised:
    """What a converted checkpoint has to give back, as far as digests can tell."""

    location: str
    plan: Plan
    """From the parameters, in the dtypes that the files hold, to the original's tensors in theirs."""
    digests: Mapping[str, str]
    """xxh3_128 over the bytes of each of the original's tensors that come back bit for bit."""
    notes: tuple[str, ...] = ()
    """Which do not, and are held against nothing."""

    def differing(self, names: Collection[str], read: Read, *, workers: int) -> list[str]:
        """Those of ``names`` that are not what they were. Reads the parameters with ``read``, in ``workers`` threads.

        Memory: a tensor for each thread, and what it is made of.
        """
        wanted = [name for name in names if name in self.digests]

        def differs(name: str) -> bool:
            data = tensor_bytes(assemble(self.plan, name, read))
            return xxhash.xxh3_128_hexdigest(data) != self.digests[name]

        with ThreadPoolExecutor(workers) as pool:
            return [name for name, is_other in zip(wanted, pool.map(differs, wanted), strict=True) if is_other]

    def refuse(self, differing: Iterable[str]) -> None:
        """Raise ``CheckpointError`` that names ``differing``, if there are any."""
        if names := list(differing):
            raise damaged(self.location, names)


def promised(job: Prepared) -> Promised | None:
    """What ``job``'s checkpoint has to give back; None if it is not a converted one.

    Raises ``CheckpointError`` for a manifest that is not as it was written: its digests, or the dtypes that they are
    of, may be what was changed.
    """
    manifest = job.checkpoint.manifest
    if manifest is None:
        return None
    where = str(Path(job.checkpoint.config_folder) / MANIFEST)
    if manifest.is_edited:
        what = "this file has been changed since it was written, and digests in it tell nothing any more"
        raise CheckpointError(Problem(where=where, what=what, fix="restore it as it was written, or convert again"))
    plan = held(job)
    if not manifest.has_digests_of_originals:
        note = "converted from a third layout: the manifest has no digests of what is given back; none were compared"
        return Promised(location=job.checkpoint.location, plan=plan.reverse(), digests={}, notes=(note,))
    digests, notes = _exact(plan, manifest)
    return Promised(location=job.checkpoint.location, plan=plan.reverse(), digests=digests, notes=notes)


def held(job: Prepared) -> Plan:
    """``job.relation`` with the parameters in the dtypes that a converted checkpoint's files have them in."""
    tensors = job.checkpoint.tensors
    targets = job.relation.targets
    entries = {n: replace(e, dtype=tensors[n].dtype) if n in tensors else e for n, e in targets.items()}
    return replace(job.relation, targets=entries)


def _exact(plan: Plan, manifest: Manifest) -> tuple[dict[str, str], tuple[str, ...]]:
    inexact = plan.inexact()
    digests = {name: digest for name, digest in manifest.source_digests.items() if name not in inexact}
    left = [name for name in manifest.source_digests if name in inexact]
    if not left:
        return digests, ()
    names = ", ".join(fold(left, 3))
    return digests, (f"{len(left)} tensors do not come back bit for bit, and no digest was compared of them: {names}",)
