"""The index of a sharded checkpoint: which tensor is in which file.

An index is a JSON object whose ``weight_map`` maps names of tensors to names of files. Its ``metadata`` is
not used: totals that disagree with the files would help nobody, and many indexes have none.
"""

from __future__ import annotations

from pathlib import Path

from tepatch.checkpoint.containment import file_inside, name_fault
from tepatch.checkpoint.listing import read_json
from tepatch.errors import CheckpointError, Problem

# The index of a model with a hundred thousand tensors is about 10 MB.
MAX_INDEX_BYTES = 100_000_000


def index_suffix(name: str) -> str | None:
    """The suffix of the shards that an index of this name may list; None when it is not an index's name."""
    if not name.endswith(".json"):
        return None
    for suffix in (".safetensors", ".bin"):
        if f"{suffix}.index." in name:
            return suffix
    return None


def read_index(folder: Path, name: str) -> dict[str, str]:
    """The ``weight_map`` of one index file, with file names that are safe to look for.

    Raises ``CheckpointError`` with every name that is refused.
    """
    where = str(folder / name)
    index = read_json(file_inside(folder, name), where=where, subject="index", max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            Problem(
                where=where,
                what="has no weight_map",
                expected='{"weight_map": {"tensor name": "file name", ...}}',
            )
        )
    _check(weight_map, where=where, suffix=index_suffix(name) or "")
    return weight_map


def _check(weight_map: dict[str, object], *, where: str, suffix: str) -> None:
    problems: list[Problem] = []
    seen: set[str] = set()
    for tensor, file in weight_map.items():
        if not tensor.isprintable():
            what = "the name of a tensor holds characters that cannot be printed"
            problems.append(Problem(where=where, what=what, found=ascii(tensor)))
        elif not isinstance(file, str):
            what = f"the file of {tensor} is not a string"
            problems.append(Problem(where=where, what=what, found=type(file).__name__))
        elif file not in seen:
            seen.add(file)
            fault = name_fault(file)
            # With another suffix, an index of safetensors files could bring in a pickle.
            if not fault and not file.endswith(suffix):
                fault = f"it does not end in {suffix}"
            if fault:
                what = f"the file name of {tensor} is refused: {fault}"
                problems.append(Problem(where=where, what=what, found=ascii(file)))
    if problems:
        raise CheckpointError(problems)
