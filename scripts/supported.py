"""Writes the tables of supported architectures from what the conformance kit has found out.

    python scripts/supported.py             # rewrites the tables
    python scripts/supported.py --check     # changes nothing, and ends with 1 where a table is not current

Reads ``docs/conformance/*.json``, which the plugins' tests write when TEPATCH_CONFORMANCE names that folder, and
rewrites what stands between the two marks in README.md and docs/reference/architectures.md. Nothing is typed by hand: a
feature is claimed if the checks that show it have passed in some case, and failed in none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "conformance"
PAGES = (ROOT / "README.md", ROOT / "docs" / "reference" / "architectures.md")
BEGIN, END = "<!-- supported:begin -->", "<!-- supported:end -->"

FEATURES = {
    "bit-exact round trips": ("round-trip",),
    "padding": ("left-padding", "right-padding"),
    "packing": ("packing",),
    "caches": ("decoding", "chunks", "chunks-left-padded", "static-caches"),
    "generation": ("generation",),
    "training": ("gradients",),
    "router logits": ("router-logits",),
}
"""Features, and the checks that have to pass for each. What does not apply to any case is not claimed."""
PASSED = ("passed", "proven")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where a table is not current")
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob("*.json"))]
    if not reports:
        print(f"no reports in {REPORTS}: run the conformance tests with TEPATCH_CONFORMANCE={REPORTS}")
        return 1
    stale = [path for path in PAGES if path.is_file() and not update(path, table(reports), check=arguments.check)]
    for path in stale if arguments.check else ():
        print(f"{path.relative_to(ROOT)} is not current: run python scripts/supported.py")
    return 1 if arguments.check and stale else 0


def update(path: Path, text: str, *, check: bool) -> bool:
    """Puts ``text`` between the marks of a page; gives whether it was there already. A page without marks is left."""
    before = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    after = pattern.sub(lambda _: f"{BEGIN}\n{text}{END}", before)
    if before != after and not check:
        path.write_text(after, encoding="utf-8")
    return before == after


def table(reports: list[dict[str, Any]]) -> str:
    """The table in Markdown, a row for each patch."""
    head = "| patch | models | proven with | features | error on a CPU (float32) | on a GPU (bfloat16) |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, reports), ""])


def row(report: dict[str, Any]) -> str:
    """A patch's line: what it serves, what its cases cover, and the largest errors beside Hugging Face's own."""
    cases = list(report["cases"].values())
    models = ", ".join(sorted({f"`{case['model']}`" for case in cases}))
    traits = ", ".join(dict.fromkeys(trait for case in cases for trait in case["traits"]))
    cells = (f"`{report['patch']}`", models, traits, ", ".join(features(cases)), cpu(cases), gpu(cases))
    return f"| {' | '.join(cells)} |"


def features(cases: list[dict[str, Any]]) -> list[str]:
    """What the checks have shown; also that a check has failed somewhere, which no table may hide."""
    statuses: dict[str, set[str]] = {}
    for case in cases:
        for name, result in case["checks"].items():
            statuses.setdefault(name, set()).add(result["status"])
    failed = [name for name, found in statuses.items() if "failed" in found]
    out = [
        feature
        for feature, checks in FEATURES.items()
        if all(statuses.get(name, set()) & set(PASSED) and name not in failed for name in checks)
    ]
    return [*out, *(f"**{name} fails**" for name in failed)]


def cpu(cases: list[dict[str, Any]]) -> str:
    """The largest relative error of outputs, and Hugging Face's own in the same comparison."""
    figures = [result["figures"] for case in cases for result in case["checks"].values() if is_measured(result)]
    return pair(figures, "ours", "theirs") if figures else "not measured"


def is_measured(result: dict[str, Any]) -> bool:
    """Whether a check compared outputs in float32."""
    return result["status"] in PASSED and {"ours", "theirs", "largest"} <= result.get("figures", {}).keys()


def gpu(cases: list[dict[str, Any]]) -> str:
    """The same in bfloat16, of a batch without a mask, where there was a GPU."""
    results = [case["checks"].get("gpu", {}) for case in cases]
    figures = [result["figures"] for result in results if result.get("status") in PASSED]
    return pair(figures, "no mask, ours", "no mask, theirs") if figures else "not measured"


def pair(figures: list[dict[str, float]], ours: str, theirs: str) -> str:
    """The largest of ``ours``, with the one of ``theirs`` that belongs to it."""
    worst = max(figures, key=lambda each: each[ours])
    return f"{worst[ours]:.1e} (Hugging Face {worst[theirs]:.1e})"


if __name__ == "__main__":
    sys.exit(main())
