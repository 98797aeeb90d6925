"""``tepatch check``: a mapping file on its own, with neither torch nor a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.cli.output import AsJson, find_patch, print_json, reporting, say

if TYPE_CHECKING:
    from tepatch.mapping import Mapping


def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A mapping file, or the name of a patch: its own mapping.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check a mapping file by itself: every problem, or a summary.

    Whether it fits a model is another question, which 'tepatch plan' answers.
    """
    path = _mapping_path(file, as_json=as_json)
    with reporting(as_json):
        from tepatch.mapping import read_mapping

        # Named as the user named it, and not by its last part, so that file:line:column can be clicked.
        summary = _summary(read_mapping(path, name=str(path)))
    if as_json:
        print_json(summary)
    else:
        say(_text(summary))


def _mapping_path(file: str, *, as_json: bool) -> Path:
    path = Path(file)
    # A patch's name has neither a dot nor a slash, and a folder is no mapping.
    if path.is_file() or path.suffix or os.sep in file:
        return path
    patch = find_patch(file, as_json=as_json, heading=f"{file}: neither a file nor the name of a patch")
    with reporting(as_json):
        return patch.mapping_path()


def _summary(mapping: Mapping) -> dict[str, Any]:
    """What a mapping says, as JSON-ready data; counts and lists include what it extends."""
    return {
        "mapping": mapping.name,
        "digest": mapping.digest,
        "extends": mapping.extends,
        "captures": {name: str(value) for name, value in mapping.captures.items()},
        "sizes": {name: str(value) for name, value in mapping.sizes.items()},
        "requires": [{"condition": str(each.condition), "sentence": each.sentence} for each in mapping.requires],
        "ignored": [{"source": str(each.source), "reason": each.reason} for each in mapping.ignored],
        "rules": [{"where": rule.where, "target": str(rule.target)} for rule in mapping.rules],
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['mapping']}: no problems (sha256 {summary['digest'][:12]})"]
    if summary["extends"]:
        lines.append(f"  extends {summary['extends']}")
    for kind in ("captures", "sizes"):
        if summary[kind]:
            lines.append(f"  {kind}: " + "; ".join(f"{name} = {value}" for name, value in summary[kind].items()))
    lines.append(f"  requires {len(summary['requires'])}:")
    lines += [f"    {each['condition']}" for each in summary["requires"]]
    lines.append(f"  ignores {len(summary['ignored'])}:")
    lines += [f"    {each['source']}: {each['reason']}" for each in summary["ignored"]]
    lines.append(f"  rules {len(summary['rules'])}:")
    lines += [f"    {each['target']}" for each in summary["rules"]]
    return "\n".join(lines)
