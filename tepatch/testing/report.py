"""What the kit has found out about a patch, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from tepatch.errors import PluginError, Problem

FORMAT = "tepatch-conformance-1"

Status = Literal["proven", "passed", "failed", "skipped", "not run"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one check of one case."""

    status: Status
    """``proven`` compared bits and names, ``passed`` measured something within its bound."""
    detail: str = ""
    """What was seen, what is wrong, or why it was skipped."""
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    error: BaseException | None = field(default=None, compare=False)
    """What a check that failed has raised."""

    def __str__(self) -> str:
        figures = self.figures
        measured = f"{figures['ours']:.1e} (Hugging Face {figures['theirs']:.1e})" if "theirs" in figures else ""
        return ", ".join(part for part in (self.detail, measured) if part)

    def to_json(self) -> dict[str, Any]:
        out = {"status": self.status, "detail": self.detail, "figures": dict(self.figures), **self.notes}
        return {name: value for name, value in out.items() if value or name == "status"}


@dataclass(frozen=True, kw_only=True)
class CaseReport:
    """All checks of one case."""

    model: str
    """The class of Hugging Face's model."""
    model_type: str
    traits: tuple[str, ...]
    """What the case covers, such as ``GQA``."""
    outcomes: Mapping[str, Outcome]
    """By the name of the check; all checks are there."""

    def to_json(self) -> dict[str, Any]:
        checks = {name: outcome.to_json() for name, outcome in self.outcomes.items()}
        return {
            "model": self.model,
            "model_type": self.model_type,
            "traits": list(self.traits),
            "checks": checks,
        }


@dataclass(frozen=True, kw_only=True)
class Conformance:
    """What the kit has found out about one patch. ``str`` is a table; ``to_json`` and ``write`` keep it."""

    patch: str
    summary: str
    model_types: tuple[str, ...]
    cases: Mapping[str, CaseReport]
    requires: tuple[str, ...]
    """The conditions that the mapping states."""
    versions: Mapping[str, str]

    @property
    def failures(self) -> list[str]:
        """Each failed check, with what is wrong."""
        return [
            f"{case}, {name}: {outcome.detail}"
            for case, report in self.cases.items()
            for name, outcome in report.outcomes.items()
            if outcome.status == "failed"
        ]

    @property
    def passed(self) -> bool:
        """Whether no check has failed. What was skipped, and why, is for you to judge: see ``outcomes``."""
        return not self.failures

    @property
    def not_refuted(self) -> list[str]:
        """Conditions of ``requires`` that no case has shown to refuse anything."""
        return _not_refuted(self.requires, {name: report.to_json() for name, report in self.cases.items()})

    def raise_for_failures(self) -> None:
        """Raise ``PluginError`` with every failed check, if there is one."""
        if failures := self.failures:
            problems = [Problem(where=f"patch '{self.patch}'", what=text) for text in failures]
            raise PluginError(problems, heading=f"the patch '{self.patch}' does not conform")

    def __str__(self) -> str:
        rows = [
            (case, name, outcome.status, str(outcome))
            for case, report in self.cases.items()
            for name, outcome in report.outcomes.items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{self.patch}: " + ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        for *cells, text in rows:
            start = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
            first, *more = text.splitlines() or [""]
            lines += [f"  {start}  {first}".rstrip(), *(f"      {line.strip()}" for line in more)]
        if self.not_refuted:
            lines.append("  required, and shown by no case to refuse anything:")
            lines += [f"      {condition}" for condition in self.not_refuted]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-ready data; times are left out, so that nothing changes where nothing has changed."""
        return {
            "format": FORMAT,
            "patch": self.patch,
            "summary": self.summary,
            "model_types": list(self.model_types),
            "versions": dict(self.versions),
            "not_refuted": self.not_refuted,
            "cases": {name: report.to_json() for name, report in self.cases.items()},
        }

    def write(self, folder: str | PathLike[str]) -> Path:
        """Write ``folder/<patch>.json``.

        Of a file that is there, results stay where this run has none: of cases that it does not have, and of checks
        that it did not run (a run without a GPU leaves what was measured on one).
        """
        path = Path(folder) / f"{self.patch}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.to_json()
        before = _read(path).get("cases", {})
        for name, case in data["cases"].items():
            known = before.get(name, {}).get("checks", {})
            for check, result in case["checks"].items():
                is_open = result["status"] == "not run" or (check == "gpu" and result["status"] == "skipped")
                if is_open and check in known:
                    case["checks"][check] = known[check]
        data["cases"] = {**before, **data["cases"]}
        data["not_refuted"] = _not_refuted(self.requires, data["cases"])
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return path


def _not_refuted(requires: Iterable[str], cases: Mapping[str, Any]) -> list[str]:
    """Those of ``requires`` that do not occur in the reports of ``cases``."""
    shown = set()
    for case in cases.values():
        for conditions in case["checks"].get("refusals", {}).get("refused", {}).values():
            shown |= set(conditions)
    return [condition for condition in requires if condition not in shown]


def _read(path: Path) -> dict[str, Any]:
    """An earlier report; empty if there is none. Raises ``PluginError`` for a file that is something else."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _not_ours(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _not_ours(path, f"not in the format '{FORMAT}'")
    return data


def _not_ours(path: Path, found: str) -> PluginError:
    what = "this file is no conformance report, and is not written over"
    return PluginError(Problem(where=str(path), what=what, found=found, fix="move it away, or choose another folder"))
