"""The pages are run: what they show is what happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "run_docs.py"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_happens(page: str, request: pytest.FixtureRequest) -> None:
    if ".demo/" in (ROOT / page).read_text(encoding="utf-8"):
        request.getfixturevalue("smollm2")  # skips where there is no real checkpoint
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check", ROOT / page], capture_output=True, text=True, timeout=280, check=False
    )
    fix = f"run: python scripts/run_docs.py {page}"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}\n{fix}"
