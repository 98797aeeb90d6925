"""Commands: ``tepatch plugins``, ``doctor``, ``check``, ``plan``, ``convert``, ``certify``, ``verify`` and more.

A command reads its arguments, calls the library and prints. What is heavy (torch, transformers, pydantic) is
imported inside commands, so that listing plugins takes no longer than it must.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tepatch.cli.benching import bench
from tepatch.cli.certifying import certify
from tepatch.cli.checking import check
from tepatch.cli.converting import convert
from tepatch.cli.diagnosing import doctor
from tepatch.cli.listing import plugins, schema
from tepatch.cli.output import say
from tepatch.cli.planning import plan
from tepatch.cli.verifying import verify
from tepatch.errors import visible

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """The commands. What is said of wrong usage repeats what was typed, and a terminal is to obey none of it."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _escaped():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _escaped():
            return super().invoke(*args, **kwargs)


@contextlib.contextmanager
def _escaped() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Of whichever Click this typer has, its own or the installed one.
        if isinstance(error, typer.BadParameter.__mro__[1]):
            error.message = visible(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    # Plain help and plain tracebacks: a box around a message breaks the lines that editors and scripts read.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (plugins, doctor, check, plan, convert, certify, verify, schema):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line and exit with its code."""
    app(prog_name="tepatch")


def _print_version(wanted: bool) -> None:
    if wanted:
        from tepatch import __version__

        say(f"tepatch {__version__}")
        raise typer.Exit


@app.callback()
def _tepatch(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hugging Face models with accelerated layers, and their checkpoints with them.

    Exit codes: 0 fine, 1 the checkpoint or the mapping is wrong (or verify, certify or plan --diff found what they
    look for), 2 wrong usage, such as an unknown option or an unknown patch. Errors go to stderr; with --json they are
    JSON on stdout as well.
    """
