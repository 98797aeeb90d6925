"""The program as a whole: version, help and its page, what is imported, how it is interrupted."""

from __future__ import annotations

import resource
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tepatch

if TYPE_CHECKING:
    from conftest import Run, Site

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("plugins", "check", "plan", "verify", "schema")


def words(text: str) -> str:
    """The text without its line breaks, which depend on the width."""
    return " ".join(text.split())


def test_the_version_is_that_of_the_package(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"tepatch {tepatch.__version__}\n"


def test_no_command_prints_the_help_and_is_wrong_usage(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert all(command in result.output for command in COMMANDS)


def test_an_unknown_command_is_wrong_usage(run: Run) -> None:
    result = run("convince")
    assert result.exit_code == 2
    assert "convince" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("BAD",),
        ("--BAD",),
        ("plan", "--BAD"),
        ("plan", "llama", "there", "BAD"),
        ("plan", "llama", "there", "--dtype", "BAD"),
        ("plan", "llama", "there", "--json=BAD"),
        ("bench", "BAD"),
        ("bench", "layer", "--BAD"),
    ],
)
def test_nothing_in_an_error_of_wrong_usage_is_obeyed(arguments: tuple[str, ...], run: Run) -> None:
    # A colour, a line that writes over the one before, and text from right to left.
    result = run(*(each.replace("BAD", "a\x1b[31mb\rc\u202ed") for each in arguments))
    assert result.exit_code == 2
    assert result.stderr.replace("\n", "").isprintable()


def test_the_module_runs_like_the_script(site: Site) -> None:
    result = site.run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: tepatch ")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_of_each_command_stands_in_the_docs(command: str, run: Run) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert words(result.stdout) in words(page), "run scripts/update_docs.py"


def test_the_page_of_the_command_line_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_docs.py"))
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert words(script["page"]()) == words(page), "run scripts/update_docs.py"


@pytest.mark.parametrize("command", ["['plugins', '--json']", "['plugins']", "['check', 'llama']", "['schema']"])
def test_what_looks_at_no_model_imports_neither_torch_nor_transformers(command: str, site: Site) -> None:
    code = f"""
import sys
from tepatch.cli import app
app({command}, standalone_mode=False)
heavy = sorted({{"torch", "transformers", "transformer_engine", "numpy"}} & set(sys.modules))
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    result = site.python("-c", code)
    assert result.returncode == 0, result.stderr


def test_plugins_are_listed_at_once(site: Site) -> None:
    started = processor_seconds()
    assert site.run("plugins").returncode == 0
    assert processor_seconds() - started < 2  # about half a second


def processor_seconds() -> float:
    """Of the processes that have ended: other tests may keep the machine busy."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_an_interrupt_ends_with_130_and_no_traceback(site: Site) -> None:
    site.install("interrupted", "raise KeyboardInterrupt")
    result = site.run("plugins")
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
