"""A checkpoint that is not quite the model's: tensors that the caller drops, and tensors that are drawn anew.

A head that a checkpoint does not have is never random without a word: ``fresh`` names it, and it is drawn as
transformers would draw it. What a checkpoint has and the class has no place for is named by ``drop``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tepatch.checkpoint import Checkpoint, ShardReader, TensorInfo
from tepatch.checkpoint.manifest import MANIFEST
from tepatch.errors import PlanError, Problem
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.locate import Locator
from tepatch.hf.model import target_specs
from tepatch.mapping import Mapping as Rules
from tepatch.mapping.names import fold, listed, meant_by
from tepatch.mapping.relocate import below, joined

if TYPE_CHECKING:
    from tepatch.checkpoint.manifest import Manifest
    from tepatch.checkpoint.stamp import FileStamp

_FRESH = "fresh:"
"""Begins the names of what is opened for fresh tensors, so that none is a file's."""


class Completed:
    """A ``Checkpoint`` with some of its tensors replaced, or joined, by fresh ones."""

    def __init__(self, checkpoint: Checkpoint, fresh: FreshWeights, names: Mapping[str, str]) -> None:
        """``names`` are those of the fresh tensors here, each with the stock model's own."""
        self._checkpoint = checkpoint
        self._fresh = fresh
        self._names = names

    @property
    def location(self) -> str:
        return self._checkpoint.location

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        stored = {name: info for name, info in self._checkpoint.tensors.items() if name not in self._names}
        made = {name: self._fresh.tensors[stock] for name, stock in self._names.items()}
        made = {name: replace(info, name=name, in_file=name, file=_FRESH + info.file) for name, info in made.items()}
        return {**stored, **dict(sorted(made.items(), key=lambda item: item[1].file))}

    @property
    def others(self) -> Mapping[str, str]:
        return self._checkpoint.others

    @property
    def absent(self) -> tuple[str, ...]:
        return self._checkpoint.absent

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def also_present(self) -> tuple[str, ...]:
        return self._checkpoint.also_present

    @property
    def wrappers(self) -> tuple[str, ...]:
        return self._checkpoint.wrappers

    @property
    def config_folder(self) -> Path:
        return self._checkpoint.config_folder

    @property
    def manifest(self) -> Manifest | None:
        return self._checkpoint.manifest

    def stamp(self, file: str, /) -> FileStamp | None:
        return None if file.startswith(_FRESH) else self._checkpoint.stamp(file)

    def open(self, file: str, /) -> AbstractContextManager[ShardReader]:
        if not file.startswith(_FRESH):
            return self._checkpoint.open(file)
        return _Renamed(self._fresh.open(file.removeprefix(_FRESH)), self._names)


class _Renamed(AbstractContextManager[ShardReader]):
    """Fresh tensors, asked for by the names that they have in the checkpoint."""

    def __init__(self, block: AbstractContextManager[ShardReader], names: Mapping[str, str]) -> None:
        self._block = block
        self._names = names

    def __enter__(self) -> ShardReader:
        self._reader = self._block.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._block.__exit__(*error)  # type: ignore[arg-type]

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        return self._reader.read(replace(info, name=self._names[info.name]))


def chosen(given: Iterable[str], names: Mapping[str, str], *, argument: str, of: str) -> list[str]:
    """The tensors that a caller means by ``given``: whole names, folded or not, or the paths of modules around them.

    ``names`` are those of all tensors, each with another that it may be called by. Raises ``PlanError`` for what
    means none; ``argument`` and ``of`` say in messages what was given and whose tensors these are.
    """
    if isinstance(given, str) or not all(isinstance(each, str) and each for each in given):
        raise PlanError(
            Problem(
                where=argument,
                what="not a list of tensors",
                expected=f"{argument}=['score.weight'], or the modules that they are in: ['score']",
                found=repr(given),
            )
        )
    found: dict[str, None] = {}
    problems = []
    for each in given:
        is_meant = meant_by(each)
        meant = [name for name, other in names.items() if is_meant(name) or is_meant(other)]
        if not meant:
            close = difflib.get_close_matches(each, list(names)[:20_000], n=1)
            what = f"no tensor of {of} has this name, or is in a module of it"
            fix = f"did you mean '{close[0]}'?" if close else ""
            problems.append(Problem(where=argument, what=what, found=repr(each), fix=fix))
        found |= dict.fromkeys(meant)
    if problems:
        raise PlanError(problems)
    return list(found)


def completed(
    locator: Locator,
    rules: Rules,
    checkpoint: Checkpoint,
    stock: FreshWeights,
    fresh: Iterable[str],
    drop: Iterable[str],
) -> tuple[Checkpoint, list[str], tuple[str, ...]]:
    """The checkpoint with what the caller wants to be fresh, what is dropped of it, and notes that say so."""
    if checkpoint.manifest is not None:
        raise PlanError(
            Problem(
                where="fresh, drop",
                what="a checkpoint in the layout of the layers holds the parameters of one model, all of them",
                found=str(checkpoint.config_folder / MANIFEST),
                fix="load the original with fresh and drop, or convert this one back to hf first",
            )
        )
    model_class, where = type(stock.stock).__name__, checkpoint.location
    aliases = locator.at(rules, checkpoint.tensors, where).spelling.stock()
    known = (*checkpoint.tensors, *checkpoint.others, *checkpoint.absent)
    names = {name: aliases.get(name, name) for name in known}
    dropped = chosen(drop, names, argument="drop", of="the checkpoint")
    made = chosen(fresh, {name: name for name in stock.tensors}, argument="fresh", of=model_class)
    kept = [name for name in checkpoint.tensors if name not in dropped]
    located = locator.at(rules, kept, where)
    inside = below(rules, made, locator.base)
    here: dict[str, str] = {}  # a rule looks for a tensor at the checkpoint's place of the base
    for name in made:
        here[joined(located.source, inside[name]) if name in inside else located.rest.get(name, name)] = name
    # A tied tensor may be stored under its other name as well, and would have to be equal to what is drawn.
    _, ties = target_specs(stock.stock, None)
    held = {name: here.get(name) or ties.get(names[name], "") for name in kept}
    if held := {name: first for name, first in held.items() if first in made}:
        raise PlanError(
            Problem(
                where="fresh",
                what="the checkpoint has these tensors",
                details=tuple(fold(held, 12)),
                fix=f"to load them, have fresh name none of {listed(dict.fromkeys(held.values()))}; "
                f"to replace them: drop={listed(held)}",
            )
        )
    notes = []
    if made:
        notes.append(f"not read but drawn, as a new {model_class} has them: {', '.join(fold(made, 12))}")
    if replaced := [name for name in dropped if name in here]:
        notes.append(f"the checkpoint's own of these were dropped by the caller: {', '.join(fold(replaced, 12))}")
    left = [name for name in dropped if name not in here]
    return (Completed(checkpoint, stock, here) if here else checkpoint), left, tuple(notes)
