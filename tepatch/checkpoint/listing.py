"""Small things that the readers of headers and of indexes share: strict JSON, and short lists of names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tepatch.checkpoint.recognise import PEEK, recognised
from tepatch.errors import CheckpointError, Problem

# How many names or problems of one kind a message shows: enough to see the pattern.
MAX_NAMED = 12


def shortened(names: Sequence[str]) -> tuple[str, ...]:
    """The first names, then how many more there are."""
    if len(names) <= MAX_NAMED:
        return tuple(names)
    return (*names[:MAX_NAMED], f"... and {len(names) - MAX_NAMED:,} more")


def counted(number: int) -> str:
    """A number of tensors, in words.

    >>> counted(1), counted(1200)
    ('1 tensor', '1,200 tensors')
    """
    return f"{number:,} tensor{'' if number == 1 else 's'}"


def read_json(path: Path, *, where: str, subject: str, max_bytes: int) -> dict[str, object]:
    """The JSON object in a file of at most ``max_bytes``. Raises as ``parse_json``, and for a file of another kind.

    ``path`` is what ``file_inside`` gave.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise CheckpointError(Problem(where=where, what="is not a regular file"))
        if path.stat().st_size > max_bytes:
            what = f"is larger than {max_bytes:,} bytes: this is not the {subject} of a checkpoint"
            raise CheckpointError(Problem(where=where, what=what))
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error
    return parse_json(text, where=where, subject=subject)


def parse_json(text: bytes, *, where: str, subject: str) -> dict[str, object]:
    """A JSON object in which no key occurs twice; ``CheckpointError`` for anything else.

    ``subject`` is what the text is called in the message: "header", "index".
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        key = error.key if error.key.isprintable() else ascii(error.key)
        what = f"its {subject} lists {key!r} twice"
        raise CheckpointError(Problem(where=where, what=what)) from None
    except RecursionError as error:
        what = f"its {subject} is not JSON that can be read"
        raise CheckpointError(Problem(where=where, what=what, found="too many brackets")) from error
    except ValueError as error:
        if (known := recognised(text[:PEEK], Path(where))) is not None and not known[0].endswith("JSON"):
            what = f"its {subject} is not JSON: it is {known[0]}"
            raise CheckpointError(Problem(where=where, what=what, fix=known[1])) from None
        what = f"its {subject} is not JSON in UTF-8"
        raise CheckpointError(Problem(where=where, what=what, found=str(error))) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            Problem(where=where, what=f"its {subject} is not a JSON object", found=type(value).__name__)
        )
    return value


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result
