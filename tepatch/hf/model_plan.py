"""``ModelPlan``: how the parameters of a patched model belong to the tensors of its checkpoints.

There is one relation between the two. What loads, saves, translates state dicts or exports asks it for the plan that it
needs, and each is made once, when it is first asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

from tepatch.errors import PlanError
from tepatch.hf.config import ConfigFields, text_config
from tepatch.hf.locate import Locator
from tepatch.hf.model import stock_specs
from tepatch.mapping import Mapping as Rules
from tepatch.mapping import read_mapping
from tepatch.planning import Plan, Spec, TensorSpec, make_export_plan
from tepatch.planning.groups import Names, names_in

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from tepatch.patch import Patch

ATTRIBUTE: Final = "tepatch_plan"
"""Where a patched model keeps its ``ModelPlan``, beside the report."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The relation of a model's parameters and the stock model's tensors. Holds no model and no checkpoint.

    Nothing in it ever changes: copies of a model share it.
    """

    patch: Patch
    rules: Rules
    """The mapping, in the stock model's own names."""
    relation: Plan
    """The parameters and the original checkpoint's tensors, by the stock model's names for these."""
    spelling: Mapping[str, str]
    """The stock model's name -> the checkpoint's, where they differ and transformers finds the checkpoint's."""
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    """The model's config when it was loaded."""
    is_wrapped: bool
    """Whether the rules read the config of the language model inside the model's own."""
    has_conversions: bool
    """Whether transformers has other tensors in memory than in checkpoints of this class."""
    has_own_rules: bool
    """Whether the rules are the patch's, so that its other layouts are of the same parameters."""
    locator: Locator | None = field(repr=False, compare=False)
    """None in another process, which has the plans of other layouts already."""

    def fields(self, config: PreTrainedConfig) -> ConfigFields:
        """The fields of the model's ``config`` as the rules read them."""
        return ConfigFields(text_config(config) if self.is_wrapped else config)

    @cached_property
    def names(self) -> Names:
        """What has to be translated between the model and its checkpoint."""
        return names_in(self.relation)

    @cached_property
    def memory_names(self) -> Names:
        """The same with the stock model's parameters in the place of the checkpoint's tensors.

        As ``names`` where transformers converts nothing between the two, or the mapping does not know what it makes.
        """
        if not self.has_conversions:
            return self.names
        specs, _ = stock_specs(self.model_class, self.config)
        try:
            plan = self.export(*self._parameters, config=self.config, like=specs)
        except PlanError:
            return self.names
        return names_in(plan) if plan.sources.keys() == specs.keys() else self.names

    @cached_property
    def other_layouts(self) -> tuple[Plan, ...]:
        """A plan for each of the patch's other layouts that has a place for all of this model."""
        out: list[Plan] = []
        if not self.has_own_rules or self.locator is None:
            return ()
        targets, ties = self._parameters
        for layout in self.patch.layouts:
            rules = read_mapping(self.patch.mapping_path(layout))
            with contextlib.suppress(PlanError):
                located = self.locator.at(rules, {}, self.relation.location)
                out.append(
                    make_export_plan(
                        located.rules,
                        config=self.fields(self.config),
                        targets=targets,
                        ties=ties,
                        spelling=located.rest,
                        keep_dtypes=True,
                        patch=self.patch.name,
                        location=self.relation.location,
                    )
                )
        return tuple(out)

    def names_for(self, given: Set[str]) -> Names:
        """The names by which a dict of tensors with the names ``given`` is to be understood.

        Those of the plan, unless there are some that it does not know, and more of them are another layout's.
        """
        names = self.names
        if not given - names.ours - names.theirs - names.plan.sources.keys() - names.plan.targets.keys():
            return names
        candidates = [names, *map(names_in, self.other_layouts)]
        return max(candidates, key=lambda each: len(given & each.theirs))  # the first of equals

    def export(
        self,
        targets: Mapping[str, TensorSpec],
        ties: Mapping[str, str],
        *,
        config: PreTrainedConfig,
        like: Mapping[str, TensorSpec],
        dtype: str = "",
    ) -> Plan:
        """The plan for the parameters ``targets`` of a model with this ``config``, which may have changed since.

        ``like`` are tensors to be like, see ``make_export_plan``. Raises ``PlanError`` for parameters that the rules do
        not know or do not find.
        """
        return make_export_plan(
            self.rules,
            config=self.fields(config),
            targets=targets,
            ties=ties,
            like=like,
            dtype=dtype,
            patch=self.patch.name,
            location=self.relation.location,
        )

    @property
    def _parameters(self) -> tuple[dict[str, Spec], dict[str, str]]:
        entries = self.relation.targets
        targets = {name: Spec(each.shape, each.dtype) for name, each in entries.items() if each.state != "tied"}
        return targets, {name: each.tied_to for name, each in entries.items() if each.state == "tied"}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPlan:
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.other_layouts  # noqa: B018  # the plugin's files need not be where this is read
        return {**self.__dict__, "locator": None}


def plan_of(model: nn.Module) -> ModelPlan:
    """The ``ModelPlan`` of a patched model."""
    return cast("ModelPlan", getattr(model, ATTRIBUTE))
