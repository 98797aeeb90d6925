"""The text of a config, looked at before transformers makes anything of it.

What makes a model is not built to be handed anything: it calls whatever it finds, loops over a number of layers before
anybody asks whether there are so many, and logs texts as they are. So a config's form is settled first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tepatch.checkpoint import TensorInfo
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.listing import MAX_NAMED, parse_json
from tepatch.errors import CheckpointError, Problem

MAX_BYTES = 1 << 24
"""The names of some ten thousand classes take one MiB."""
MAX_DEPTH = 32
_COUNTS = re.compile(r"layer|label|expert|block|depth|stage|head|group")
MIN_COUNT = 4096
"""More layers, labels or experts than any model has: so many may be named whatever the checkpoint holds."""
_SIZES = re.compile(r"size|dim|rank|width|channel|feature")
MIN_SIZE = 1 << 24
"""As ``MIN_COUNT``, of a dimension."""
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, and halves of characters."""


def read_config_text(folder: Path, name: str, tensors: Mapping[str, TensorInfo] | None = None) -> dict[str, Any]:
    """A config file of a checkpoint with these ``tensors``, as JSON whose form is settled.

    Raises ``CheckpointError`` for a link out of the folder, for text that is no JSON object, too large or too deep, for
    control characters, and for numbers that are beyond what the tensors' number and sizes allow.
    """
    where = str(folder / name)
    path = file_inside(folder, name)
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise CheckpointError(Problem(where=where, what="cannot be read", found=str(error))) from error
    if size > MAX_BYTES:
        raise CheckpointError(Problem(where=where, what=f"is larger than {MAX_BYTES:,} bytes, and no config is"))
    data: dict[str, Any] = parse_json(text, where=where, subject="text")
    counts, sizes = _limits(tensors)
    problems = []
    for at, value in _walk(data, where):
        field = at.rpartition(".")[2]
        problem = None
        if isinstance(value, str) and _CONTROLS.search(value):
            problem = Problem(where=at, what="holds characters that a terminal would obey", found=ascii(value)[:80])
        elif type(value) is int and abs(value) > (limit := _limit(field, counts, sizes)):
            problem = Problem(
                where=at,
                what="is beyond anything that this checkpoint could hold",
                expected=f"at most {limit:,}",
                found=f"{value:,}" if abs(value) < 1 << 63 else f"a number of {value.bit_length()} bits",
                fix="check that config.json belongs to this checkpoint",
            )
        if problem is not None:
            problems.append(problem)
    problems += _forms(data, where)
    if problems:
        raise CheckpointError(problems[:MAX_NAMED])
    return data


def _forms(data: dict[str, Any], where: str) -> Iterator[Problem]:
    """Fields of a form that transformers takes for granted."""

    def wrong(field: str, expected: str) -> Problem:
        return Problem(
            where=f"{where}: {field}",
            what="is not what a config has here",
            expected=expected,
            found=_shown(data[field]),
        )

    for field in ("model_type", "transformers_version"):
        if not isinstance(data.get(field), str | None):
            yield wrong(field, "text")
    for field in ("architectures", "configuration_files"):
        value = data.get(field)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            yield wrong(field, "a list of texts")
    if not isinstance(data.get("text_config"), dict | None):
        yield wrong("text_config", "a JSON object")


def _walk(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Every value that is no object or list, with where it is. ``CheckpointError`` for what is nested too deep."""
    todo = [(value, f"{at}: ", 0)]
    while todo:
        each, path, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(Problem(where=at, what=f"is nested deeper than {MAX_DEPTH} levels"))
        if isinstance(each, dict):
            dot = "" if path.endswith(": ") else "."
            todo += [(inner, f"{path}{dot}{key}", depth + 1) for key, inner in each.items()]
        elif isinstance(each, list):
            todo += [(inner, path, depth + 1) for inner in each]
        else:
            yield path, each


def _limits(tensors: Mapping[str, TensorInfo] | None) -> tuple[int, int]:
    """The largest count and the largest size that tensors allow; without any, what every model has room in."""
    shapes = [info.shape for info in tensors.values()] if tensors is not None else []
    largest = max((size for shape in shapes for size in shape), default=0)
    return max(MIN_COUNT, len(shapes), largest), max(MIN_SIZE, largest)


def _limit(field: str, counts: int, sizes: int) -> int:
    name = field.rpartition(" ")[2].lower()
    if _COUNTS.search(name):
        return counts
    return sizes if _SIZES.search(name) else (1 << 63) - 1


def _shown(value: Any) -> str:
    try:
        return ascii(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
