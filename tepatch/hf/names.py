"""Names of tensors outside the part of a model that a mapping is about, as checkpoints have spelt them.

For a head, a vision tower or a projector there is no rule that would say what older checkpoints call them. transformers
knows: it renames a checkpoint's names when it loads them. Only names are asked for here. What becomes of the tensors
is the plan's affair, and a name that finds no parameter this way is told as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def memory_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """For each name of a checkpoint, that of the stock model's parameter which it becomes, or a part of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    conversions = [each for each in rules if isinstance(each, WeightConverter)]
    return {name: rename_source_key(name, renamings, conversions)[0] for name in names}


def has_conversions(model: PreTrainedModel) -> bool:
    """Whether transformers has other tensors in memory than in checkpoints of this model's class."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def keep_renamings(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Keep with ``model`` what transformers renames of a checkpoint's ``names`` when it loads them.

    It does so itself for a model that it loads, and turns it round when that is saved.
    """
    renaming = Renaming(model)
    for name in {_NUMBER.sub("0", name) for name in names}:  # layers are alike
        renaming.target(name)  # which marks what it uses
    kept = [each for each in renaming.rules if each.was_used()]
    model._weight_conversions = kept  # type: ignore[assignment]


class Renaming:
    """What transformers may make of a checkpoint's name before it looks for it in a model. Holds no model."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        # Conversions of tensors (fused experts) are left out: a name that stands for a part of a parameter is no name.
        self.rules = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        self._prefix = f"{model.base_model_prefix}."

    def target(self, name: str) -> str:
        """What the model has in memory for ``name``."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self.rules, [])
        return renamed

    def changed(self, names: Iterable[str]) -> dict[str, str]:
        """What the model has for those of a checkpoint's ``names`` that it renames."""
        return {name: new for name in names if (new := self.target(name)) != name}

    def finds(self, spelling: Mapping[str, str]) -> bool:
        """Whether transformers finds the model's tensors in a checkpoint that spells them so (the model's -> its)."""
        alike = {tuple(_NUMBER.sub("#", name) for name in pair): pair for pair in spelling.items()}  # layers are alike
        return all(self.target(ours) in self._places(self.target(theirs)) for ours, theirs in alike.values())

    def spelt(self, wanted: Collection[str], names: Iterable[str], *, around: str = "") -> dict[str, str]:
        """For each of the ``wanted`` names of the model that the checkpoint's ``names`` have otherwise, what they have.

        ``around`` is where the whole model sits in the checkpoint, if that is of a model that wraps it. A name is never
        taken for another if it is wanted itself, and of several that mean the same the first is taken.
        """
        given = list(names)
        open_names = set(wanted).difference(given)
        out: dict[str, str] = {}
        for name in given if open_names else ():
            if name in wanted:
                continue
            meant = (*self._places(self.target(name)), *self._places(name), name.removeprefix(f"{around}."))
            found = next((each for each in meant if each in open_names), None)
            if found is not None:
                out[found] = name
                open_names.discard(found)
        return out

    def _places(self, name: str) -> tuple[str, str, str]:
        """Where a tensor may go: with the base model's prefix, or without."""
        return name, name.removeprefix(self._prefix), self._prefix + name
