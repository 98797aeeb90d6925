"""From what a user names (a folder, a file, a hub id) to the file that a checkpoint starts with.

The order is that of ``from_pretrained`` in transformers: the file that the config names, safetensors before ``.bin``,
one file before an index; a variant's name stands before the last suffix (``model.safetensors.index.fp16.json``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tepatch.checkpoint.beside import (
    is_adapter_file,
    only_beside,
    refuse_adapter_file,
    refuse_what_changes_the_model,
    stated_weights,
)
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.index import index_suffix
from tepatch.checkpoint.listing import shortened
from tepatch.checkpoint.manifest import MANIFEST, STEM
from tepatch.checkpoint.recognise import unfinished
from tepatch.errors import CheckpointError, Problem

CONVERTED = (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
"""A patched model's own parameters, beside their manifest."""
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
# What a Trainer leaves beside a model, with the suffixes of weights.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")

# Weights for other programs, and what says nothing without weights or folders that are never copied.
_OTHERS = re.compile(
    r".*\.(onnx|onnx_data|ort|ot|tflite|pdparams|npz|nemo|distcp)|(openvino|ov)_[\w.-]*\.xml|params\.json"
    r"|modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json|model_index\.json"
)
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece|sentencepiece|normalizer"
    r"|preprocessor_config|processor_config|video_preprocessor_config|image_processor)[\w.-]*|[\w.-]+\.(model|tiktoken|jinja)"
)


def find_weights(
    location: str | os.PathLike[str],
    *,
    variant: str | None,
    subfolder: str,
    revision: str | None,
    use_safetensors: bool | None,
) -> tuple[Path, str]:
    """The folder of a checkpoint, and the name in it of its only file or of its index."""
    path = _path(location)
    subfolder = os.fspath(subfolder)
    if path.is_file():
        options = {"variant": variant, "subfolder": subfolder, "revision": revision}
        _refuse_options(path, options, reason="the path names one file")
        return path.parent, _chosen_file(path, use_safetensors=use_safetensors)
    if path.is_dir():
        _refuse_options(path, {"revision": revision}, reason="the path is a folder, not a hub id")
    else:
        path = _cached_snapshot(os.fspath(location), revision=revision)
    if subfolder:
        file_inside(path, subfolder)
        path = path / subfolder
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        what, fix = "this folder can not be read", "check its permissions (ls -ld)"
        raise CheckpointError(Problem(where=str(path), what=what, fix=fix))
    wanted = _candidates(variant, use_safetensors=use_safetensors)
    if os.path.lexists(path / MANIFEST):
        # Converted weights are safetensors: True restricts nothing, and False would be ignored.
        given = {"variant": variant, "use_safetensors": None if use_safetensors else use_safetensors}
        _refuse_options(path, given, reason=f"{MANIFEST} says that there is one form of the weights")
        wanted = list(CONVERTED)
        _refuse_two_checkpoints(path)
    elif stated := stated_weights(path):
        given = {"variant": variant, "use_safetensors": None if use_safetensors else use_safetensors}
        _refuse_options(path, given, reason=f"config.json names the file of the weights, {stated}")
        wanted = [stated]
    for name in wanted:
        # A link counts even when it is broken: to fall through to another file would be silent.
        if os.path.lexists(path / name):
            refuse_what_changes_the_model(path, name)
            return path, name
    if (problem := only_beside(path)) is not None:
        raise CheckpointError(problem)
    raise CheckpointError(_nothing_found(path, wanted, variant=variant))


def _refuse_two_checkpoints(folder: Path) -> None:
    """Raise ``CheckpointError`` for a manifest beside weights that transformers would load: which are meant?"""
    ordinary = [name for name in (*_SAFETENSORS, *_PICKLED) if os.path.lexists(folder / name)]
    if not ordinary:
        return
    is_whole = any(os.path.lexists(folder / name) for name in CONVERTED)
    raise CheckpointError(
        Problem(
            where=str(folder),
            what=f"{MANIFEST} says that tepatch has converted this checkpoint, and {ordinary[0]} that it has not",
            fix="move one of the two checkpoints to another folder, or name the file that is meant"
            if is_whole
            else f"remove {MANIFEST}, if {ordinary[0]} is meant; restore {CONVERTED[0]}, if that was",
        )
    )


def _path(location: object) -> Path:
    """A location as a path. An empty one is refused: it would be the current folder."""
    what = ""
    if not isinstance(location, str | os.PathLike) or not isinstance(os.fspath(location), str):
        what = "this is no location of a checkpoint"
    elif not os.fspath(location):
        what = "the location is empty"
    else:
        path = Path(location)
        try:
            path.is_file()
        except PermissionError:
            what, fix = "a folder on the way to it can not be entered", "check permissions (namei -l)"
            raise CheckpointError(Problem(where=str(path), what=what, fix=fix)) from None
        except (OSError, ValueError) as error:  # too long, or a NUL in it
            what = f"this is no location of a checkpoint: {error.args[-1]}"
    if what:
        where = repr(location)[:80]
        raise CheckpointError(Problem(where=where, what=what, fix="give a folder, a file, or a hub id (org/name)"))
    return path


def weight_files(folder: Path) -> list[str]:
    """The names in a folder that look like weights, or like an index of weights; sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        # A folder that is not there is reported by what was looked for in it.
        return []
    return [name for name in names if _is_weight_name(name)]


def _is_weight_name(name: str) -> bool:
    if _NOT_WEIGHTS.fullmatch(name) or not name.isprintable():
        return False
    return name.endswith(_WEIGHT_SUFFIXES) or index_suffix(name) is not None


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to the model, and stands for itself.

    Its config and weights of any kind do not, nor what is nothing without them (an adapter's config, the list of the
    modules of a sentence transformer), nor what a Trainer leaves behind.
    """
    config = ("config.json", "generation_config.json", MANIFEST)
    is_hidden = name.startswith(".") and name != ".gitattributes"
    leftover = _NOT_WEIGHTS.fullmatch(name) or name.startswith("trainer_state") or name.startswith("tepatch-cert")
    part = _OTHERS.fullmatch(name) or is_adapter_file(name)
    return not (name in config or is_hidden or leftover or part or not name.isprintable() or _is_weight_name(name))


def is_tokenizer(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer or of another processor of a model's input."""
    return is_companion(name) and _TOKENIZER.fullmatch(name) is not None


def _refuse_options(path: Path, options: Mapping[str, str | bool | None], *, reason: str) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value not in (None, "")]
    if given:
        raise CheckpointError(Problem(where=str(path), what=f"{', '.join(given)} has no meaning: {reason}"))


def _chosen_file(path: Path, *, use_safetensors: bool | None) -> str:
    refuse_adapter_file(path)
    suffix = index_suffix(path.name) or path.suffix
    if suffix not in (".safetensors", ".bin"):
        raise CheckpointError(
            Problem(
                where=str(path),
                what="is not a checkpoint file that tepatch reads",
                expected="*.safetensors, *.bin, *.safetensors.index.json or *.bin.index.json",
            )
        )
    if use_safetensors is not None and use_safetensors != (suffix == ".safetensors"):
        raise CheckpointError(Problem(where=str(path), what=f"is not allowed by use_safetensors={use_safetensors}"))
    return path.name


def _candidates(variant: str | None, *, use_safetensors: bool | None) -> list[str]:
    names = [
        *(_SAFETENSORS if use_safetensors is not False else ()),
        *(_PICKLED if use_safetensors is not True else ()),
    ]
    if not variant:
        return names
    stems = [name.rpartition(".") for name in names]
    return [f"{stem}.{variant}.{suffix}" for stem, _, suffix in stems]


def _cached_snapshot(location: str, *, revision: str | None) -> Path:
    """The folder of a hub id in the local cache. The network is never used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    at = f" --revision {revision}" if revision else ""
    try:
        # No pattern is asked for: the hub's own check would want every format that the repository offers,
        # while what is missing here is found, and named, from the index.
        return Path(snapshot_download(location, revision=revision, local_files_only=True, allow_patterns=[]))
    except HFValidationError as error:
        what = "there is no such file or folder, and this cannot be a hub id"
        raise CheckpointError(Problem(where=location, what=what)) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            Problem(
                where=location,
                what="there is no such file or folder, and no such model in the local Hugging Face cache",
                fix=f"check the path, or run: hf download {location}{at}",
            )
        ) from error


def _nothing_found(folder: Path, wanted: list[str], *, variant: str | None) -> Problem:
    if not folder.is_dir():
        return Problem(where=str(folder), what="there is no such folder")
    present = weight_files(folder)
    details = [f"looked for: {name}" for name in wanted]
    details += [f"is there: {name}" for name in shortened(present)]
    partial = [name for name in unfinished(folder) if not name.startswith(".")]
    details += [f"is there, and its download has not ended: {name}" for name in shortened(partial)]
    return Problem(
        where=str(folder),
        what="no checkpoint was found in this folder",
        details=tuple(details),
        fix=_suggestion(present, wanted, variant=variant, partial=partial),
    )


def _suggestion(present: list[str], wanted: list[str], *, variant: str | None, partial: list[str]) -> str:
    if any(name in present for name in _candidates(variant, use_safetensors=None)):
        return "what is there is left out by use_safetensors: leave that option away"
    variants = _variants_in(present)
    if variants:
        return " or ".join(f"did you mean variant={name!r}?" for name in variants)
    if any(name in present for name in CONVERTED):
        return f"these weights were converted by tepatch, and {MANIFEST}, which belongs to them, is gone: restore it"
    if partial:
        return "let the download end, or start it again"
    if any(name.endswith(".gguf") for name in present):
        return "tepatch does not read GGUF: convert it to safetensors with transformers"
    if present:
        return f"name the file itself, if one of these is the checkpoint: {', '.join(shortened(present))}"
    return "check the path and the subfolder; for a hub id, download its weights"


def _variants_in(present: list[str]) -> list[str | None]:
    """The values of ``variant`` for which there is a checkpoint."""
    found: dict[str | None, None] = {}
    for name in (*_SAFETENSORS, *_PICKLED):
        stem, _, suffix = name.rpartition(".")
        pattern = re.compile(rf"{re.escape(stem)}(?:\.([A-Za-z0-9_]+))?\.{suffix}")
        found |= {match[1]: None for match in map(pattern.fullmatch, present) if match}
    return list(found)
