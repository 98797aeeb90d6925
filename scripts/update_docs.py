"""Writes the pages of ``docs/`` that are made from the program itself: ``docs/reference/cli.md``.

    python scripts/update_docs.py

A test compares the page with what this script would write, so help and page never drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from tepatch.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
HEAD = """\
# Command line

<!-- Made by scripts/update_docs.py from the program's own help. -->

`python -m tepatch` does the same as `tepatch`.

| exit code | meaning |
|---|---|
| 0 | fine |
| 1 | the checkpoint or the mapping is wrong, they do not fit together, or something was found: by `verify` a missed \
bound, by `certify` a difference, by `plan --diff` two plans that differ |
| 2 | wrong usage: an unknown option or value, or a patch that no plugin offers |

Errors are printed to stderr. With `--json`, a command prints JSON and nothing else on stdout; an error is then
`{"error": {"type": ..., "heading": ..., "problems": [{"where": ..., "what": ..., "details": [...], "expected": ...,
"found": ..., "fix": ...}]}}`, and `null` stands for a number that is not finite.
"""


def main() -> None:
    """Writes the page."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of the page."""
    names = ["", *commands_of(get_command(app))]
    parts = [HEAD, *(f"## tepatch {name}".rstrip() + f"\n\n```text\n{help_of(name)}```\n" for name in names)]
    return "\n".join(parts)


def commands_of(group: Any) -> Iterator[str]:
    """The commands; those that are in a group of their own with its name before theirs."""
    for name, command in getattr(group, "commands", {}).items():
        inner = [f"{name} {each}" for each in commands_of(command)]
        yield from inner or [name]


def help_of(command: str) -> str:
    """What ``--help`` prints for a command, or for the program itself if it is empty."""
    # The runner has no terminal and a width of its own, so the page does not depend on who writes it.
    arguments = [*command.split(), "--help"]
    result = CliRunner().invoke(app, arguments, prog_name="tepatch", catch_exceptions=False)
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


if __name__ == "__main__":
    main()
