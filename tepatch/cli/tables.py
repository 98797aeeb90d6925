"""Tables for people. Cells are plain text: a bracket in a plugin's message is a bracket, not markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from tepatch.errors import visible

PIPE_WIDTH = 1000
"""Columns when stdout is no terminal: wide enough that no cell is ever wrapped in a file or a pipe."""


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, red: Iterable[int] = (), numbers_from: int | None = None
) -> None:
    """Print a table on stdout; rows whose index is in ``red`` are red, columns from ``numbers_from`` on end right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        is_number = numbers_from is not None and index >= numbers_from
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    marked = set(red)
    for index, row in enumerate(rows):
        table.add_row(*(Text(visible(cell)) for cell in row), style="red" if index in marked else None)
    console.print(table)


def print_red(text: str) -> None:
    """Print a line in red on stdout, not wrapped, and plain where stdout takes no colours."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(visible(text), style="red"), soft_wrap=True)
