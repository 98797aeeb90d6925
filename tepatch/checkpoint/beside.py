"""Files beside the weights by which transformers makes another model of a folder than its weights alone are.

``from_pretrained`` applies an adapter that it finds in the folder of a model, takes the pieces of a distributed save
before any other weights, and takes the file that ``config.json`` names. To read past these would be another model
without a word. Which libraries are installed decides nothing here: a folder means the same on every machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.listing import read_json, shortened
from tepatch.errors import CheckpointError, Problem

ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder one of an adapter, for PEFT and for transformers."""
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..+")
MAX_CONFIG_BYTES = 1 << 25
"""Not less than the reader of the config takes: what is passed over here has to be refused there."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""What ``save_pretrained(distributed_checkpoint=True)`` calls its files."""


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name is a part of an adapter."""
    return _ADAPTER.fullmatch(name) is not None


def stated_weights(folder: Path) -> str:
    """The file that ``config.json`` names as the model's weights (``transformers_weights``); "" if it names none."""
    path = folder / "config.json"
    stated = _json_in(file_inside(folder, path.name)).get("transformers_weights") if path.is_file() else None
    if stated is None:
        return ""
    if isinstance(stated, str) and stated.endswith((".safetensors", ".safetensors.index.json")):
        return stated
    raise CheckpointError(
        Problem(
            where=str(path),
            what="its 'transformers_weights' names no file that can be read",
            expected="*.safetensors or *.safetensors.index.json",
            found=repr(stated)[:80],
            fix="correct the field, or take it out",
        )
    )


def refuse_what_changes_the_model(folder: Path, entry: str) -> None:
    """Raise ``CheckpointError`` if something beside the weights ``entry`` makes another model of the folder."""
    weights = str(folder / entry)
    if adapter := _adapter_files(folder):
        named = " and ".join(adapter)
        raise CheckpointError(
            Problem(
                where=str(folder),
                what="an adapter is in the folder of the model, and transformers would apply it",
                details=(*_both(weights, folder), f"is there: {', '.join(adapter)}"),
                fix="load the model by its file, and the adapter with PEFT, as above (the first line by itself: the "
                f"model alone); where a folder is needed, move {named} to a folder of their own",
            )
        )
    if pieces := _pieces(folder):
        raise CheckpointError(
            Problem(
                where=str(folder),
                what=f"beside {entry} there are pieces of a distributed save, and transformers would take those",
                details=tuple(f"is there: {name}" for name in shortened(pieces)),
                fix=f"name the file, if it is meant: {weights}; else {_whole(folder)}",
            )
        )


def only_beside(folder: Path) -> Problem | None:
    """What a folder without a model's weights is, if it is of an adapter or of a distributed save."""
    if adapter := _adapter_files(folder):
        base = _base_of(folder)
        return Problem(
            where=str(folder),
            what="this is the folder of an adapter, and not of a model",
            details=(*_both(base or "the model that it is for", folder), f"is there: {', '.join(adapter)}"),
            found="" if base else f"{ADAPTER_CONFIG} does not say what model the adapter is for",
            fix="load the model that the adapter is for, then the adapter with PEFT, as above",
        )
    if pieces := _pieces(folder):
        return Problem(
            where=str(folder),
            what="these are pieces of a distributed save, which tepatch does not read",
            details=tuple(f"is there: {name}" for name in shortened(pieces)),
            fix=_whole(folder),
        )
    return None


def refuse_adapter_file(path: Path) -> None:
    """Raise ``CheckpointError`` for a file that is a part of an adapter: no model can be made of it."""
    if is_adapter_file(path.name):
        base = _base_of(path.parent) or "the model that it is for"
        raise CheckpointError(
            Problem(
                where=str(path),
                what="this is a file of an adapter, and not of a model",
                details=_both(base, path.parent),
                fix="load the model that the adapter is for, then the adapter with PEFT, as above",
            )
        )


def _both(base: str, adapter: Path) -> tuple[str, str]:
    return f"model = tepatch.load('auto', {base!r})", f"model = peft.PeftModel.from_pretrained(model, {str(adapter)!r})"


def _whole(folder: Path) -> str:
    return (
        "write it whole with transformers (5.20 or newer): "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)"
    )


def _adapter_files(folder: Path) -> list[str]:
    """The files of an adapter; none without the config that transformers looks for."""
    names = _names(folder)
    return [name for name in names if is_adapter_file(name)] if ADAPTER_CONFIG in names else []


def _pieces(folder: Path) -> list[str]:
    return [name for name in _names(folder) if _DISTRIBUTED.fullmatch(name)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.isprintable())
    except OSError:
        return []  # a folder that is not there is reported by what was looked for in it


def _base_of(folder: Path) -> str:
    """The model that an adapter says it is for; "" if it says none."""
    try:
        base = _json_in(file_inside(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    except CheckpointError:  # a link that leads out of the folder
        return ""
    return base if isinstance(base, str) and base.isprintable() else ""


def _json_in(path: Path) -> dict[str, object]:
    """What a config says; nothing if it can not be read: whoever reads it as a config tells what is wrong with it."""
    try:
        return read_json(path, where=str(path), subject="config", max_bytes=MAX_CONFIG_BYTES)
    except CheckpointError:
        return {}
