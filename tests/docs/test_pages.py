"""The pages are run: what they show is what happens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "run_docs.py"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    """One process that imports torch and transformers once, and forks for each page."""
    command = [sys.executable, str(SCRIPT), "--check", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_happens(page: str, runner: subprocess.Popen[str], request: pytest.FixtureRequest) -> None:
    if ".demo/" in (ROOT / page).read_text(encoding="utf-8"):
        request.getfixturevalue("smollm2")  # skips where there is no real checkpoint
    assert runner.stdin is not None
    assert runner.stdout is not None
    print(ROOT / page, file=runner.stdin, flush=True)
    code, printed = json.loads(runner.stdout.readline())
    assert code == 0, f"{printed}\nrun: python scripts/run_docs.py {page}"
