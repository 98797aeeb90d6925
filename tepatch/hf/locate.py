"""Where the part of a model that rules are about sits in the model, and where it sits in a checkpoint.

A checkpoint may spell names otherwise than the stock model in memory does: a prefix more or less, or what older
checkpoints called a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.hf.names import Renaming
from tepatch.mapping import Mapping as Rules
from tepatch.mapping.relocate import Spelling, below, find_base, joined, move_base, spell
from tepatch.mapping.rules import is_below
from tepatch.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Located:
    """Rules where their base sits in one checkpoint and in the model."""

    rules: Rules
    source: str
    """The base's path in the checkpoint."""
    around: str
    """Where the whole model is in the checkpoint, if that is of a model that wraps it."""
    rest: Mapping[str, str]
    """The checkpoint's name of each parameter outside the base that has another there."""
    spelling: Spelling


class Locator:
    """Finds the base of rules in a checkpoint of one model. Holds the model's names, and no model."""

    def __init__(self, rules: Rules, names: Iterable[str], renaming: Renaming, *, where: str) -> None:
        """``names`` are those of the model's parameters; ``where`` is the model's class, for messages."""
        names = list(names)
        self.base = find_base(rules, names, side="target", default=rules.base or "", where=where)
        self._renaming = renaming
        self._outside = [name for name in names if not is_below(name, self.base)]

    def at(self, rules: Rules, names: Collection[str], where: str = "") -> Located:
        """``rules`` for a checkpoint with these ``names``. Raises ``PlanError`` if the base may be in two places."""
        source = find_base(rules, names, side="source", default=self.base, where=where)
        inside = below(rules, names, source)
        others = [name for name in names if name not in inside]
        # In a checkpoint of a model that wraps this one, the head is beside the base: where the base's path begins.
        around = source.removesuffix(f".{self.base}") if self.base and source.endswith(f".{self.base}") else ""
        rest = self._renaming.spelt(self._outside, others, around=around) if rules.rest and others else {}
        return Located(
            rules=move_base(rules, source=source, target=self.base),
            source=source,
            around=around,
            rest=rest,
            spelling=spell(rest, inside, target=self.base if rules.base is not None else None),
        )

    def is_found(self, spelling: Spelling) -> bool:
        """Whether transformers finds the model's tensors by these names."""
        return self._renaming.finds(spelling.names)

    def spelled(self, rules: Rules, relation: Plan) -> tuple[dict[str, str], dict[str, str]]:
        """The stock model's name -> that of a tensor in ``relation``, and back, where they differ."""
        other = {entry.note: name for name, entry in relation.sources.items() if entry.state == "used" and entry.note}
        spelling = self.at(rules, [*relation.sources, *other]).spelling
        stock = spelling.stock()
        # A tied tensor that is stored under its other name goes by the first in memory.
        tied = {stock.get(first, first): name for first, name in other.items()}
        own = spelling.names if self.is_found(spelling) else {}  # else what is saved would be found by nobody
        return {**own, **tied}, {**stock, **{name: first for first, name in tied.items()}}

    def stock(self, rules: Rules) -> Rules:
        """``rules`` in the stock model's own names."""
        return move_base(rules, source=self.base, target=self.base)


def without_prefix(locator: Locator, rules: Rules, checkpoint: FolderCheckpoint) -> FolderCheckpoint:
    """The checkpoint by the stock model's names, if all of its names begin with something that nobody looks for."""
    if checkpoint.manifest is not None:
        return checkpoint
    located = locator.at(rules, checkpoint.tensors, checkpoint.location)
    if locator.is_found(located.spelling):
        return checkpoint
    names, moves = {}, ((located.source, locator.base), (located.around, ""))
    for name in checkpoint.tensors:
        path, place = next((move for move in moves if is_below(name, move[0])), ("", ""))
        names[name] = joined(place, name[len(path) + 1 :]) if path else name
    if len({*names.values()}) < len(names):
        return checkpoint  # making the plan tells what is wrong with it
    prefix = located.around or located.source
    return replace(
        checkpoint,
        tensors={names[name]: replace(info, name=names[name]) for name, info in checkpoint.tensors.items()},
        wrappers=(*checkpoint.wrappers, prefix),
    )
