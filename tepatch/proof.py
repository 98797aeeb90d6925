"""Whether a patch is proven with the libraries that are installed here; if not, the first load proves it.

Where the plugin does not say that a combination was proven (``tepatch.proven``), a small model of the user's own config
is compared with Hugging Face's, on the CPU with the reference modules, before a weight is read. What was found is
remembered in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import PlanError, Problem, ProofError, TepatchError, first_line
from tepatch.hf.config import model_class, text_config
from tepatch.hf.prepare import given_config, serves_inside
from tepatch.patch import Patch
from tepatch.proven import (
    FORMAT,
    Versions,
    combinations,
    digest_of,
    files_of,
    installed,
    is_proven,
    packaged,
    text_of,
    without_source,
    write_whole,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VARIABLE = "TEPATCH_PROVE"
"""The environment variable that says "0" where nothing is to be proven."""

_CHECKS = ("no-mask", "left-padding", "packing", "chunks", "static-caches", "gradients")
"""The kit's checks that a proof is made of: logits, padding, packed rows, caches in steps, gradients."""
_MOST_NUMBERS = 50_000_000
"""Of a config's model made small. One that stays larger would take too long."""

_logger = logging.getLogger("tepatch")


def ensure_proven(
    patch: Patch, config: PreTrainedConfig, cls: type[PreTrainedModel], *, is_wrapped: bool, prove: bool | None
) -> tuple[str, ...]:
    """Have the patch proven for a model of this config, unless it is; gives notes for the report.

    ``cls`` is the model's class; ``is_wrapped`` says that the patch is for the language model inside it. With ``prove``
    False (None: unless the environment variable ``TEPATCH_PROVE`` is "0") nothing is proven, and a note says so. Raises
    ``ProofError`` with what differs.
    """
    versions = installed(patch)
    if is_proven(patch, versions):
        return ()
    described = _described(patch, versions)
    if prove is False or (prove is None and os.environ.get(VARIABLE) == "0"):
        return (f"the patch '{patch.name}' was not proven with {described}, and was not tried",)
    config, cls = _own(config, cls, is_wrapped=is_wrapped)
    path = cache_folder() / f"{_digest(patch, config, cls, versions)}.json"
    if path.is_file():
        return ()
    _logger.info("the patch '%s' was not proven with %s: trying it", patch.name, described)
    started = time.perf_counter()
    tried = try_patch(patch, config, cls)
    seconds = time.perf_counter() - started
    found = {
        "patch": patch.name,
        "versions": dict(versions),
        "model": cls.__name__,
        "checks": tried,
        "seconds": seconds,
    }
    notes = [f"proven with {described} by a small model of this config, in {seconds:.1f} s: {', '.join(tried)}"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"format": FORMAT, **found}, indent=1) + "\n")
    except OSError as error:
        notes.append(f"the proof could not be remembered: {first_line(error)}")
    return tuple(notes)


def prove_now(patch: Patch, location: str | None = None) -> tuple[list[str], float]:
    """Prove a patch for the config of a checkpoint, or for the default one of its type of models.

    Gives the checks that were passed, and seconds. Raises ``ProofError``, and what reading a config raises.
    """
    from transformers import CONFIG_MAPPING

    started = time.perf_counter()
    if location is not None:
        config = given_config(None, open_checkpoint(location))
    else:
        kind = next((kind for kind in patch.model_types if kind in CONFIG_MAPPING), None)
        if kind is None:
            fix = "name a checkpoint whose config is to be used: tepatch doctor PATCH --config LOCATION"
            raise PlanError(
                Problem(where=f"patch '{patch.name}'", what="no type of models has a default config", fix=fix)
            )
        config = CONFIG_MAPPING[kind]()
    is_wrapped = serves_inside(patch, config)
    own, cls = _own(config, None, is_wrapped=is_wrapped)
    return try_patch(patch, own, cls), time.perf_counter() - started


def cache_folder() -> Path:
    """Where proofs made on this machine are remembered, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tepatch" / "proofs"


def remembered() -> list[dict[str, Any]]:
    """The proofs made on this machine: each with ``patch``, ``versions``, ``model``, ``checks`` and ``seconds``."""
    out = []
    for path in sorted(cache_folder().glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            data = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(data, dict) and data.get("format") == FORMAT:
                out.append(data)
    return out


def try_patch(patch: Patch, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> list[str]:
    """Compare a small model of ``config`` with layers of the patch with Hugging Face's; gives the checks it passed.

    On the CPU in float32, with the reference modules; the state of random numbers stays what it is. Raises
    ``ProofError`` with what differs, or why nothing could be compared.
    """
    from tepatch.testing.cases import Bench, Case
    from tepatch.testing.results import Broken, NotApplicable
    from tepatch.testing.sizes import shrunk
    from tepatch.testing.suite import CHECKS, quietly

    passed: list[str] = []
    failed: dict[str, Exception] = {}
    with _undisturbed(), quietly(), tempfile.TemporaryDirectory() as folder:
        try:
            small: Any = shrunk(config)
            small.architectures = [cls.__name__]
            bench = Bench(patch, Case("a small model of this config", small), Path(folder), has_truth=False)
            if (numbers := _size(cls, bench.config)) > _MOST_NUMBERS:
                raise Broken(f"a small model of this config would have {numbers:,} parameters")
            if bench.stock.can_generate() and not bench.has_cache:
                raise Broken("the model generates text, and no cache of it was found")
            _ = bench.models  # an error here is one, and not one of every check
            for name in _CHECKS:
                try:
                    CHECKS[name](bench)
                    passed.append(name)
                except NotApplicable:
                    continue
                except Exception as error:
                    failed[name] = error
        except Exception as error:  # transformers and the layers may raise anything
            failed["a small model"] = error
    if failed:
        own = [error for error in failed.values() if isinstance(error, TepatchError)]
        told = dict.fromkeys(problem for error in own for problem in error.problems)
        others = [(name, error) for name, error in failed.items() if error not in own]
        raise ProofError([*told, *([_differs(others)] if others else [])], heading=_heading(patch))
    return passed


def _heading(patch: Patch) -> str:
    versions = installed(patch)
    verb = "was proven" if is_proven(patch, versions) else "was not proven"
    return f"'{patch.name}' {verb} with {_described(patch, versions)}: a small model was tried"


def _described(patch: Patch, versions: Versions) -> str:
    """Versions as text, which may be those of a proof although the files are others."""
    own = without_source(versions)
    is_changed = not is_proven(patch, versions) and any(own.items() <= each.items() for each in combinations(patch))
    return text_of(versions) + (" (with changes in the files of transformers)" if is_changed else "")


def _differs(found: Iterable[tuple[str, Exception]]) -> Problem:
    lines = [(name, [line.strip() for line in str(error).splitlines() if line.strip()], error) for name, error in found]
    return Problem(
        where="proof",
        what="the patched model does not compute what transformers' own does, or can not be compared with it",
        details=tuple(f"{name}: {told[0] if told else type(error).__name__}" for name, told, error in lines),
        fix="install versions that the patch was proven with (tepatch doctor lists them); to go on without a proof, "
        f"pass prove=False or set {VARIABLE}=0",
    )


def _own(
    config: PreTrainedConfig, cls: type[PreTrainedModel] | None, *, is_wrapped: bool
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config and the class of the part of a model that a patch is for; None for the class that the config says."""
    from transformers import AutoModel

    if cls is not None and not is_wrapped:
        return config, cls
    config = text_config(config) if is_wrapped else config
    models: Any = AutoModel._model_mapping
    try:
        return config, model_class(config)
    except PlanError:
        if type(config) not in models:
            raise
        return config, models[type(config)]


def _size(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(config).parameters())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A proof is made in float32 on the CPU with gradients, whatever is around the load, and leaves no trace."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)


def _digest(patch: Patch, config: PreTrainedConfig, cls: type[PreTrainedModel], versions: Versions) -> str:
    """Of everything that a proof depends on: the config, versions, and the files of the layers."""
    parents = {each.__module__ for layer in patch.replacements().values() for each in layer.__mro__}
    own = {name for name in parents if name.partition(".")[0] not in ("builtins", "torch", "transformers")}
    fields = {**config.to_dict(), "_name_or_path": "", "transformers_version": ""}
    sources = (packaged("tepatch"), digest_of(files_of(own)), dict(versions))
    parts = (*sources, patch.name, dict(patch.replace), dict(patch.ignores), cls.__name__, fields)
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())
