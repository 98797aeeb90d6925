"""Finding out how a checkpoint fits a model: in which layout its tensors are, and the plan that reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.listing import MAX_NAMED
from tepatch.checkpoint.manifest import MANIFEST, Manifest
from tepatch.errors import PlanError, Problem
from tepatch.hf.config import ConfigFields
from tepatch.hf.locate import Located, Locator
from tepatch.mapping import Mapping as Rules
from tepatch.mapping import read_mapping
from tepatch.mapping.names import fold
from tepatch.mapping.rules import source_names
from tepatch.planning import Plan, make_export_plan, make_plan
from tepatch.planning.identity import make_identity_plan

if TYPE_CHECKING:
    from tepatch.patch import Patch
    from tepatch.planning import TensorSpec

ORIGINAL: Final = "hf"
"""The layout of the patch's own mapping: the original checkpoint's."""
NATIVE: Final = "te"
"""The layout of the patched model's own parameters."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one checkpoint and the model belong together."""

    relation: Plan
    """The original checkpoint's tensors and the parameters: what a converted one is converted back by."""
    reading: Plan
    """This checkpoint's tensors and the parameters. The same object as ``relation`` if that is its layout."""
    layout: str
    """``hf``, ``te``, or the name of one of the patch's other layouts."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """A checkpoint that is held against the rules of a patch."""

    patch: Patch
    rules: Rules
    fields: ConfigFields
    checkpoint: Checkpoint
    locator: Locator
    targets: Mapping[str, TensorSpec]
    ties: Mapping[str, str]
    dropped: Collection[str] = ()
    """Tensors of the checkpoint that the caller does not want."""
    choices: tuple[str, ...] = ()
    """What the caller has chosen, as notes."""
    has_own_rules: bool = True
    """Whether the rules are the patch's, and its other layouts may be tried."""

    def run(self) -> Fit:
        """Raises ``PlanError`` when the checkpoint is in no layout that is known."""
        if self.checkpoint.manifest is not None:
            relation = self._relation_of(self.checkpoint.manifest)
            where = str(self.checkpoint.config_folder / MANIFEST)
            reading = make_identity_plan(
                relation, self.checkpoint.tensors, location=self.checkpoint.location, where=where, notes=self._notes()
            )
            return Fit(relation=relation, reading=reading, layout=NATIVE)
        try:
            plan = self._plan(self.rules)
        except PlanError:
            layout = self._likeliest_layout()
            if layout == ORIGINAL:
                raise
            reading = self._plan(self._layout_rules(layout))
            return Fit(relation=self._export({}), reading=reading, layout=layout)
        return Fit(relation=plan, reading=plan, layout=ORIGINAL)

    def _located(self, rules: Rules) -> Located:
        names = [name for name in self.checkpoint.tensors if name not in self.dropped]
        return self.locator.at(rules, names, self.checkpoint.location)

    def _plan(self, rules: Rules) -> Plan:
        located = self._located(rules)
        wanted, unwanted = self._no_tensors(located.rules)
        try:
            plan = make_plan(
                located.rules,
                config=self.fields,
                sources=self.checkpoint.tensors,
                targets=self.targets,
                ties=self.ties,
                spelling=located.rest,
                dropped=self.dropped,
                patch=self.patch.name,
                location=self.checkpoint.location,
                notes=(*self._notes(), *unwanted),
            )
        except PlanError as error:
            raise PlanError([*error.problems, *wanted, *self._lost(located.rules)], heading=error.heading) from None
        if wanted:
            raise PlanError(wanted, heading=f"{located.rules.name} does not fit {self.checkpoint.location}")
        return plan

    def _no_tensors(self, rules: Rules) -> tuple[list[Problem], list[str]]:
        """Of the checkpoint's entries that are no tensors: those that nothing leaves out, and notes on the others."""
        problems, left = [], []
        for name, kind in self.checkpoint.others.items():
            if name in self.dropped or any(each.source.pattern.match(name) for each in rules.ignored):
                left.append(name)
                continue
            problems.append(
                Problem(
                    where=f"{self.checkpoint.location}: {name}",
                    what="this entry is no tensor" + (f", but bytes in a {kind}" if kind == "BytesIO" else ""),
                    found=kind,
                    fix=f"leave it out: drop=['{name}'], or list it under 'ignore' with the reason",
                )
            )
        if len(problems) > MAX_NAMED:
            more = f"{len(problems) - MAX_NAMED:,} more entries are no tensors"
            problems = [*problems[:MAX_NAMED], Problem(where=self.checkpoint.location, what=more)]
        notes = [f"{len(left)} entries are no tensors, and are left out: {', '.join(fold(left, 3))}"] if left else []
        return problems, notes

    def _lost(self, rules: Rules) -> list[Problem]:
        """What the index names, no file holds, and rules are for."""
        patterns = [name.pattern for name in source_names(rules)] if self.checkpoint.absent else []
        lost = [name for name in self.checkpoint.absent if any(pattern.match(name) for pattern in patterns)]
        what, fix = "the index names tensors that no file holds", "download or copy the checkpoint again"
        where = self.checkpoint.location
        return [Problem(where=where, what=what, details=tuple(fold(lost, 12)), fix=fix)] if lost else []

    def _export(self, like: Mapping[str, TensorSpec]) -> Plan:
        located = self.locator.at(self.rules, like, self.checkpoint.location)
        return make_export_plan(
            located.rules,
            config=self.fields,
            targets=self.targets,
            ties=self.ties,
            spelling=located.rest,
            like=like,
            keep_dtypes=True,
            patch=self.patch.name,
            location=self.checkpoint.location,
        )

    def _notes(self) -> tuple[str, ...]:
        unread = (f"{name} is also in the folder and was not read" for name in self.checkpoint.also_present)
        absent = self.checkpoint.absent
        names = ", ".join(fold(absent, 3))
        gone = (f"the index names {len(absent)} tensors that no file holds: {names}",) if absent else ()
        taken = ", ".join(f"'{part}'" for part in self.checkpoint.wrappers)
        stripped = (f"{taken} of wrappers around modules left out of names, and not saved again",) if taken else ()
        return (*self.choices, *unread, *gone, *stripped)

    def _layout_rules(self, layout: str) -> Rules:
        return read_mapping(self.patch.mapping_path(layout))

    def _likeliest_layout(self) -> str:
        """The layout that knows the most of the checkpoint's names; the original's if none knows more."""
        candidates = {ORIGINAL: self.rules}
        if self.has_own_rules:
            candidates |= {layout: self._layout_rules(layout) for layout in self.patch.layouts}
        known = {}
        for layout, rules in candidates.items():
            patterns = [name.pattern for name in source_names(self._located(rules).rules)]
            known[layout] = sum(any(p.match(name) for p in patterns) for name in self.checkpoint.tensors)
        return max(known, key=lambda layout: known[layout])  # the first of equals

    def _relation_of(self, manifest: Manifest) -> Plan:
        if manifest.patch != self.patch.name:
            raise PlanError(
                Problem(
                    where=str(self.checkpoint.config_folder / MANIFEST),
                    what="this checkpoint was converted with another patch",
                    expected=manifest.patch,
                    found=self.patch.name,
                    fix=f"name the patch '{manifest.patch}'",
                )
            )
        try:
            relation = self._export(manifest.originals)
        except PlanError as error:
            raise PlanError([_other_layout(self, manifest), *error.problems]) from error
        if relation.layout_digest != manifest.layout_digest:
            raise PlanError(_other_layout(self, manifest))
        made = {name: e.shape for name, e in relation.sources.items()}
        said = {name: e.shape for name, e in manifest.originals.items()}
        if wrong := [name for name in (*said, *made) if said.get(name) != made.get(name)]:
            raise PlanError(
                Problem(
                    where=str(self.checkpoint.config_folder / MANIFEST),
                    what="its 'originals' are not what the parameters are made of",
                    details=tuple(fold(list(dict.fromkeys(wrong)), 12)),
                    fix="restore the file as it was written, or convert the original again",
                )
            )
        return relation


def _other_layout(fitting: Fitting, manifest: Manifest) -> Problem:
    where = str(fitting.checkpoint.config_folder / MANIFEST)
    if manifest.mapping_digest == fitting.rules.digest:
        return Problem(
            where=where,
            what="the config is not the one that this was converted with, or this file has been changed since",
            details=(f"converted from {manifest.source}",),
            fix="restore config.json and tepatch.json as they were written, or convert the original again",
        )
    made_by = f"{manifest.plugin or 'a patch that was passed by hand'}, tepatch {manifest.tepatch}"
    package = manifest.plugin.replace(" ", "==")
    return Problem(
        where=where,
        what=f"'{fitting.rules.name}' places tensors elsewhere than the mapping that this was converted with",
        details=(f"converted by {made_by}", f"from {manifest.source}"),
        expected=f"{manifest.mapping} (sha256 {manifest.mapping_digest[:12]})",
        found=f"{fitting.rules.name} (sha256 {fitting.rules.digest[:12]})",
        fix=f"install what converted it{f' (pip install {package})' if package else ''}, or pass its mapping file with "
        "mapping=... (--mapping), and convert it back to hf; or convert the original again",
    )
