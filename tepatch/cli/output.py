"""How commands answer: results on stdout, everything else on stderr, errors as text and exit codes.

Libraries below print and log as they like. A script that reads ``--json`` must get JSON and nothing else, so
while a command works, stdout is lent to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.errors import PluginError, TepatchError, visible

if TYPE_CHECKING:
    from tepatch.patch import Patch

FAILED = 1
USAGE = 2

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.")]


@contextlib.contextmanager
def reporting(as_json: bool, *, exit_code: int = FAILED) -> Iterator[None]:
    """Do the work of a command: nothing inside can print to stdout, and a ``TepatchError`` ends the program.

    The error's text goes to stderr as it is, so that ``file:line:column`` can be clicked; with ``as_json`` it
    is printed as JSON too.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except TepatchError as error:
        if as_json:
            print_json({"error": error_json(error)})
        say(str(error), err=True)
        raise typer.Exit(exit_code) from None


def find_patch(name: str, *, as_json: bool, heading: str = "") -> Patch:
    """The patch of that name. A name that no plugin offers is wrong usage, and ends the program."""
    with reporting(as_json):
        from tepatch.plugins import default_host

        host = default_host()
    # A name that two plugins offer is spelt right: what is installed is wrong, not how it was called.
    is_offered = any(name in record.patches for record in host.records)
    with reporting(as_json, exit_code=FAILED if is_offered else USAGE):
        try:
            return host.patch(name)
        except PluginError as error:
            raise PluginError(error.problems, heading=heading) from error


def say(text: str = "", *, err: bool = False) -> None:
    """Print text: all that commands print for people goes through here, or through a table. Nothing in it is obeyed."""
    typer.echo(visible(text), err=err)


def print_json(value: Any) -> None:
    """Print JSON-ready data as standard JSON, which has no NaN and no infinity: those become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def error_json(error: TepatchError) -> dict[str, Any]:
    """An error as JSON-ready data: its class and its problems, with the fields of ``Problem``."""
    return {
        "type": type(error).__name__,
        "heading": error.heading,
        "problems": [dataclasses.asdict(problem) for problem in error.problems],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
