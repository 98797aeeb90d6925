"""Names of tensors outside the part of a model that a mapping is about, as checkpoints have spelt them.

For a head, a vision tower or a projector there is no rule that would say what older checkpoints call them. transformers
knows: it renames a checkpoint's names when it loads them. Only names are asked for here. What becomes of the tensors
is the plan's affair, and a name that finds no parameter this way is told as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def spelt_names(
    model: PreTrainedModel, wanted: Collection[str], names: Iterable[str], *, around: str = ""
) -> dict[str, str]:
    """For each of the ``wanted`` names of a model that the checkpoint's ``names`` have otherwise, what they have.

    ``around`` is where the whole model sits in the checkpoint, if that is of a model that wraps it. A name is never
    taken for another if it is wanted itself, and of several that mean the same the first is taken.
    """
    given = list(names)
    open_names = set(wanted).difference(given)
    out: dict[str, str] = {}
    if not open_names:
        return out
    rename = _Renaming(model, f"{around}.")
    for name in given:
        if name in wanted:
            continue
        for candidate in rename.candidates(name):
            if candidate in open_names:
                out[candidate] = name
                open_names.discard(candidate)
                break
    return out


def memory_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """For each name of a checkpoint, that of the stock model's parameter which it becomes, or a part of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    conversions = [each for each in rules if isinstance(each, WeightConverter)]
    return {name: rename_source_key(name, renamings, conversions)[0] for name in names}


def are_found(model: PreTrainedModel, spelling: Mapping[str, str]) -> bool:
    """Whether transformers finds the tensors of ``model`` in a checkpoint that spells them so (the model's -> its)."""
    alike = {tuple(_NUMBER.sub("#", name) for name in pair): pair for pair in spelling.items()}  # layers are alike
    if not alike:
        return True
    rename = _Renaming(model, "")
    return all(rename.target(ours) in rename.targets(theirs) for ours, theirs in alike.values())


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls tensors of a checkpoint in ``model``, for those of ``names`` that it renames."""
    rename = _Renaming(model, "")
    return {name: new for name in names if (new := rename.target(name)) != name}


def keep_renamings(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Keep with ``model`` what transformers renames of a checkpoint's ``names`` when it loads them.

    It does so itself for a model that it loads, and turns it round when that is saved.
    """
    rename = _Renaming(model, "")
    for name in {_NUMBER.sub("0", name) for name in names}:  # layers are alike
        rename.target(name)  # which marks what it uses
    kept = [each for each in rename.renamings if each.was_used()]
    model._weight_conversions = kept  # type: ignore[assignment]


class _Renaming:
    """What transformers may make of a checkpoint's name before it looks for it in ``model``."""

    def __init__(self, model: PreTrainedModel, around: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        # Conversions of tensors (fused experts) are left out: a name that stands for a part of a parameter is no name.
        self.renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        self._prefix = f"{model.base_model_prefix}."
        self._around = around

    def target(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self.renamings, [])
        return renamed

    def targets(self, name: str) -> tuple[str, ...]:
        """Where a tensor may go: with the base model's prefix, or without."""
        renamed = self.target(name)
        return renamed, renamed.removeprefix(self._prefix), self._prefix + renamed

    def candidates(self, name: str) -> Iterator[str]:
        for each in dict.fromkeys((self.target(name), name)):
            yield each
            yield each.removeprefix(self._prefix)
            yield self._prefix + each
        yield name.removeprefix(self._around)
