"""``scripts/run_docs.py``: a page that shows something else than what happens is found."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_docs.py"
FIND = "from importlib.metadata import entry_points\nnames = [each.name for each in entry_points(group='tepatch')]"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


@pytest.fixture
def run(page: Path) -> Run:
    """Writes a page and runs it."""

    def run(text: str, *options: str) -> subprocess.CompletedProcess[str]:
        page.write_text(text)
        return subprocess.run([sys.executable, SCRIPT, *options, page], capture_output=True, text=True, check=False)

    return run


def block(head: str, body: str) -> str:
    return f"```{head}\n{body}\n```\n"


def test_a_page_that_shows_what_happens_passes(run: Run) -> None:
    text = block("python", "x = 1") + block("python", "print(x + 1)") + block("text output", "2")
    assert run(text, "--check").returncode == 0


def test_another_output_fails_and_is_shown(run: Run, page: Path) -> None:
    text = block("python", "print('new')") + block("text output", "old")
    done = run(text, "--check")
    assert done.returncode == 1
    assert "-old" in done.stdout
    assert "+new" in done.stdout
    assert page.read_text() == text


def test_without_check_the_page_is_rewritten(run: Run, page: Path) -> None:
    assert run(block("python", "print('new')") + block("text output", "old")).returncode == 0
    assert page.read_text() == block("python", "print('new')") + block("text output", "new")


def test_an_exception_in_a_block_fails_with_the_line_of_the_page(run: Run) -> None:
    done = run("Text.\n\n" + block("python", "x = 1\nraise LookupError('gone')"), "--check")
    assert done.returncode == 1
    assert "page.md:4" in done.stderr
    assert "LookupError: gone" in done.stderr


def test_commands_are_run_and_what_they_print_is_compared(run: Run) -> None:
    right = block("console", "$ echo one\none\n$ echo two >&2\ntwo")
    assert run(right, "--check").returncode == 0
    assert run(right.replace("\ntwo\n", "\nthree\n"), "--check").returncode == 1


def test_a_block_with_a_file_is_written_before_later_blocks(run: Run) -> None:
    text = block("yaml file: a/b.yaml", "c: 1") + block("console", "$ cat a/b.yaml\nc: 1")
    assert run(text, "--check").returncode == 0


@pytest.mark.parametrize("head", ["python not run: no GPU", "console not run: no network"])
def test_what_is_marked_is_not_run(run: Run, head: str) -> None:
    assert run(block(head, "$ false\n1 / 0"), "--check").returncode == 0


def test_python_that_says_so_itself_is_not_run(run: Run) -> None:
    assert run(block("python", "# not run: no GPU\n1 / 0"), "--check").returncode == 0


@pytest.mark.parametrize("head", ["python not run:", "text ouptut", "yaml flie: a.yaml"])
def test_a_mark_that_means_nothing_is_refused(run: Run, head: str) -> None:
    done = run(block(head, "x"), "--check")
    assert done.returncode == 1
    assert "page.md:2: what is" in done.stderr


def test_hidden_blocks_are_run(run: Run) -> None:
    assert (
        run("<!-- run\nx = 3\n-->\n" + block("python", "print(x)") + block("text output", "3"), "--check").returncode
        == 0
    )


def test_a_package_is_found_by_its_entry_point_after_an_editable_installation(run: Run) -> None:
    project = '[project]\nname = "tepatch-odd"\nversion = "0.3"\n[project.entry-points.tepatch]\nodd = "tepatch_odd"'
    text = (
        block("toml file: odd/pyproject.toml", project)
        + block("python file: odd/src/tepatch_odd/__init__.py", "NAME = 'odd'")
        + block("console", "$ pip install -e odd\n$ python -c 'import tepatch_odd; print(tepatch_odd.NAME)'\nodd")
        + block("python", FIND + "\nprint('odd' in names)")
        + block("text output", "True")
    )
    done = run(text, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\nb", "a\nb", True),
        ("a\nb", "a\nc", False),
        ("a\nb", "a\nb\nc", False),
        ("a\n...", "a\nb\nc", True),
        ("...\nc", "a\nb\nc", True),
        ("a\n  ...\nc", "a\nb\nc", True),
        ("a\n...\nd", "a\nb\nc", False),
        ("a\n...\na", "a", False),
        ("took 1.23 s", "took 0.9 s", True),
        ("took 1.23 s", "took 12 s", False),
        ("error 1.2e-7", "error 3e-06", True),
        ("torch 2.13.0+cpu, transformers 5.23.0", "torch 2.14.1, transformers 5.17.0", True),
        ("x (sha256 12ab)", "x (sha256 9f00)", True),
        ("a    b", "a  b", True),
        ("  a", "a", False),
        ("a(b", "a(b", True),
    ],
)
def test_outputs_are_compared_but_for_what_varies(
    script: dict[str, Any], shown: str, printed: str, expected: bool
) -> None:
    assert script["same"](shown, printed) is expected
