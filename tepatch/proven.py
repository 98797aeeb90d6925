"""What the plugins' patches were proven with: versions of libraries, in a file ``proven.json`` beside the mapping.

A release of transformers may change what a layer is called with, what a mask means, or what a cache does, under the
names that it had. So each plugin says with which versions its patches were proven. The conformance kit writes the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from tepatch import __version__
from tepatch.errors import PluginError, Problem, first_line
from tepatch.patch import Patch
from tepatch.te import probe

LIBRARIES = ("transformers", "torch", "transformer-engine", "peft", "accelerate")
"""What a proof is bound to, by the names of packages."""
SOURCE = "source"
"""The digest of those files of transformers that a patch builds on: a version that somebody has changed is another."""
_SHARED = (
    *("activations", "cache_utils", "generation.utils", "integrations.sdpa_attention", "masking_utils"),
    *("modeling_layers", "modeling_outputs", "modeling_rope_utils", "modeling_utils", "utils.generic"),
)
"""The modules of transformers that every patched model runs through, besides its own modelling file."""
FILE = "proven.json"
FORMAT = "tepatch-proven-1"


Versions = Mapping[str, str]
"""By the names of ``LIBRARIES``, of those that are installed, without a part such as ``+cu130``; and ``source``."""


def installed(patch: Patch) -> dict[str, str]:
    """What the patch has to be proven with here: versions, as imported libraries say them, and the digest of sources.

    Raises ``PluginError`` if the classes that the patch names can not be imported.
    """
    found = {name: version_of(name) for name in LIBRARIES}
    out = {name: version.partition("+")[0] for name, version in found.items() if version}
    modules = {f"transformers.{name}" for name in _SHARED} | {target.__module__ for target in patch.replacements()}
    return {**out, SOURCE: digest_of(files_of(modules))}


def files_of(modules: Iterable[str]) -> list[str]:
    """The source files of modules, in a fixed order; of modules that have one."""
    found = (importlib.import_module(name) for name in modules)
    return sorted(file for module in found if (file := getattr(module, "__file__", None)) and os.path.isfile(file))


def digest_of(files: Iterable[str]) -> str:
    """A digest of what is in these files."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def version_of(name: str) -> str:
    """The version of one of ``LIBRARIES``, as it says itself if it is imported; empty if it is not installed."""
    module = sys.modules.get(name)
    return str(getattr(module, "__version__", "")) or packaged(name)


@functools.cache
def packaged(name: str) -> str:
    """The version of an installed package; empty if there is none of that name."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on, by the name of the package."""
    import torch
    import transformers

    out = {"tepatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    status = probe()
    return {**out, "transformer-engine": status.version} if status.version else out


def text_of(versions: Versions) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in without_source(versions).items())


def record_path(patch: Patch) -> Path:
    """The file in which a patch's plugin says what it was proven with; it need not be there."""
    return patch.mapping_path().with_name(FILE)


def read_record(path: Path) -> dict[str, Any]:
    """What ``proven.json`` says, by the name of the patch; empty if there is none.

    For each patch ``with`` lists versions, and ``skipped`` says by case which checks do not apply to it, and why. All
    others were passed. Raises ``PluginError`` for a file that is something else.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        is_ours = data["format"] == FORMAT
        patches: dict[str, Any] = data["patches"]
        for entry in patches.values():
            is_ours = is_ours and all(_is_texts(versions) for versions in entry["with"])
            is_ours = is_ours and all(_is_texts(reasons) for reasons in entry["skipped"].values())
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise _no_record(path, f"{type(error).__name__}: {first_line(error)}") from error
    if not is_ours:
        raise _no_record(path, "other data")
    return patches


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _no_record(path: Path, found: str) -> PluginError:
    what = "this does not say what patches were proven with"
    return PluginError(Problem(where=str(path), what=what, expected=FORMAT, found=found, fix="reinstall the plugin"))


def write_record(patch: Patch, versions: Versions, skipped: Mapping[str, Mapping[str, str]]) -> Path:
    """Add a combination to a plugin's ``proven.json``: what the kit does when all of its checks have passed."""
    path = record_path(patch)
    with _alone_in(path.parent):  # kits of several environments may end at the same time
        patches = read_record(path)
        known = [
            each
            for each in patches.get(patch.name, {"with": []})["with"]
            if without_source(each) != without_source(versions)
        ]
        combinations = sorted([*known, dict(versions)], key=_order)
        patches[patch.name] = {"with": combinations, "skipped": {case: dict(why) for case, why in skipped.items()}}
        data = {"format": FORMAT, "patches": dict(sorted(patches.items()))}
        write_whole(path, json.dumps(data, indent=1) + "\n")
    return path


def without_source(versions: Versions) -> dict[str, str]:
    """The versions of libraries alone."""
    return {name: version for name, version in versions.items() if name != SOURCE}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _order(versions: Versions) -> list[tuple[int, ...]]:
    return [tuple(int(part) for part in versions.get(name, "0").split(".") if part.isdigit()) for name in LIBRARIES]


def combinations(patch: Patch) -> list[dict[str, str]]:
    """What the plugin says that the patch was proven with, oldest versions first."""
    found: list[dict[str, str]] = read_record(record_path(patch)).get(patch.name, {"with": []})["with"]
    return found


def is_proven(patch: Patch, versions: Versions) -> bool:
    """Whether the plugin says that the patch was proven with these versions; of what is not installed, with any."""
    return any(all(each.get(name) == version for name, version in versions.items()) for each in combinations(patch))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
