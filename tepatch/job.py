"""Everything that has to be settled before a byte of a weight moves: for loading, converting and certifying alike.

``settle`` finds the layout that a checkpoint is in and makes two plans. ``relation`` is how the original checkpoint's
tensors and the model's parameters belong together: what a model is saved by. ``reading`` is what is executed to
fill the parameters: the same plan, unless the checkpoint is in another layout than the original's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.manifest import MANIFEST, Manifest
from tepatch.errors import PlanError, Problem
from tepatch.hf.config import ConfigFields, model_class, read_config
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.model import build_on_meta, target_specs
from tepatch.mapping import Plan, make_export_plan, make_plan, read_mapping
from tepatch.mapping.accounting import requirement_problems
from tepatch.mapping.names import fold
from tepatch.mapping.native import make_native_plan
from tepatch.mapping.rules import source_names
from tepatch.patch import Patch
from tepatch.plugins import PluginHost, default_host
from tepatch.te import BackendName, Modules, use_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tepatch.mapping import Mapping as Rules
    from tepatch.mapping import TensorSpec

AUTO: Final = "auto"
ORIGINAL: Final = "hf"
"""The layout of the patch's own mapping: the original checkpoint's."""
NATIVE: Final = "te"
"""The layout of the patched model's own parameters."""


@dataclass(kw_only=True)
class Job:
    """A planned load: everything is settled, nothing is read."""

    patch: Patch
    model: PreTrainedModel
    modules: Modules
    rules: Rules
    relation: Plan
    """Original checkpoint and parameters."""
    reading: Plan
    """This checkpoint and parameters. The same object as ``relation`` when this checkpoint is in that layout."""
    layout: str
    """``hf``, ``te``, or the name of one of the patch's other layouts."""
    others: Callable[[], tuple[Plan, ...]]
    """Plans of the parameters and the tensors of each of the patch's other layouts that can serve this model."""
    checkpoint: Checkpoint
    replaced: str
    dtype: torch.dtype
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def settle(
    patch: Patch,
    config: PreTrainedConfig,
    checkpoint: Checkpoint | None,
    *,
    dtype: torch.dtype | str,
    backend: BackendName,
    mapping: str | PathLike[str] | None,
) -> Iterator[Job]:
    """Build on meta and plan, with the backend in force for as long as the block lasts.

    Without a checkpoint, fresh weights take its place.
    """
    wanted = parameter_dtype(dtype, config, checkpoint)
    # A user's file is named as the user named it, so that file:line:column can be clicked.
    path = patch.mapping_path() if mapping is None else Path(mapping)
    rules = read_mapping(path, name=None if mapping is None else str(mapping))
    fields = ConfigFields(config)
    if problems := requirement_problems(rules, fields):
        where = checkpoint.location if checkpoint else "config"
        raise PlanError(problems, heading=f"{where}: the patch '{patch.name}' can not serve this model")
    cls = model_class(config)
    with use_backend(backend) as modules:
        started = time.perf_counter()
        if checkpoint is None:
            checkpoint = FreshWeights(build_on_meta(cls, config, dtype=wanted)[0], dtype=wanted)
        model, replaced = build_on_meta(cls, config, dtype=wanted, replacements=patch.replacements())
        built = time.perf_counter()
        targets, ties = target_specs(model, wanted)
        planner = _Planner(patch, rules, fields, checkpoint, targets, ties, is_own=mapping is None)
        relation, reading, layout = planner.plans()
        if relation is not reading:
            relation = replace(relation, notes=reading.notes)
        yield Job(
            patch=patch,
            model=model,
            modules=modules,
            rules=rules,
            relation=relation,
            reading=reading,
            layout=layout,
            others=planner.others,
            checkpoint=checkpoint,
            replaced=str(replaced),
            dtype=wanted,
            seconds={"build": built - started, "plan": time.perf_counter() - built},
        )


@dataclass(frozen=True)
class _Planner:
    patch: Patch
    rules: Rules
    fields: ConfigFields
    checkpoint: Checkpoint
    targets: Mapping[str, TensorSpec]
    ties: Mapping[str, str]
    is_own: bool
    """Whether the rules are the patch's own, and its other layouts may be tried."""

    def plans(self) -> tuple[Plan, Plan, str]:
        """Relation, reading and layout. Raises ``PlanError`` when the checkpoint is in none that is known."""
        if self.checkpoint.manifest is not None:
            relation = self._relation_of(self.checkpoint.manifest)
            where = str(self.checkpoint.config_folder / MANIFEST)
            native = make_native_plan(
                relation, self.checkpoint.tensors, location=self.checkpoint.location, where=where, notes=self._notes()
            )
            return relation, native, NATIVE
        try:
            plan = self._plan(self.rules)
        except PlanError:
            layout = self._likeliest_layout()
            if layout == ORIGINAL:
                raise
            reading = self._plan(self._layout_rules(layout))
            return self._export({}), reading, layout
        return plan, plan, ORIGINAL

    def others(self) -> tuple[Plan, ...]:
        """A plan for each of the patch's other layouts that has a place for all of this model."""
        out = []
        for layout in self.patch.layouts if self.is_own else ():
            with contextlib.suppress(PlanError):
                out.append(self._export({}, self._layout_rules(layout)))
        return tuple(out)

    def _plan(self, rules: Rules) -> Plan:
        return make_plan(
            rules,
            config=self.fields,
            sources=self.checkpoint.tensors,
            targets=self.targets,
            ties=self.ties,
            patch=self.patch.name,
            location=self.checkpoint.location,
            notes=self._notes(),
        )

    def _export(self, like: Mapping[str, TensorSpec], rules: Rules | None = None) -> Plan:
        return make_export_plan(
            rules or self.rules,
            config=self.fields,
            targets=self.targets,
            ties=self.ties,
            like=like,
            keep_dtypes=True,
            patch=self.patch.name,
            location=self.checkpoint.location,
        )

    def _notes(self) -> tuple[str, ...]:
        return tuple(f"{name} is also in the folder and was not read" for name in self.checkpoint.also_present)

    def _layout_rules(self, layout: str) -> Rules:
        return read_mapping(self.patch.mapping_path(layout))

    def _likeliest_layout(self) -> str:
        """The layout that knows the most of the checkpoint's names; the original's if none knows more."""
        candidates = {ORIGINAL: self.rules}
        if self.is_own:
            candidates |= {layout: self._layout_rules(layout) for layout in self.patch.layouts}
        known = {}
        for layout, rules in candidates.items():
            patterns = [name.pattern for name in source_names(rules)]
            known[layout] = sum(any(p.match(name) for p in patterns) for name in self.checkpoint.tensors)
        return max(known, key=lambda layout: known[layout])  # the first of equals

    def _relation_of(self, manifest: Manifest) -> Plan:
        if manifest.patch != self.patch.name:
            raise PlanError(
                Problem(
                    where=str(self.checkpoint.config_folder / MANIFEST),
                    what="this checkpoint was converted with another patch",
                    expected=manifest.patch,
                    found=self.patch.name,
                    fix=f"name the patch '{manifest.patch}'",
                )
            )
        try:
            relation = self._export(manifest.originals)
        except PlanError as error:
            raise PlanError([_other_layout(self, manifest), *error.problems]) from error
        if relation.layout_digest != manifest.layout_digest:
            raise PlanError(_other_layout(self, manifest))
        made = {name: e.shape for name, e in relation.sources.items()}
        said = {name: e.shape for name, e in manifest.originals.items()}
        if wrong := [name for name in (*said, *made) if said.get(name) != made.get(name)]:
            raise PlanError(
                Problem(
                    where=str(self.checkpoint.config_folder / MANIFEST),
                    what="its 'originals' are not what the parameters are made of",
                    details=tuple(fold(list(dict.fromkeys(wrong)), 12)),
                    fix="restore the file as it was written, or convert the original again",
                )
            )
        return relation


def _other_layout(planner: _Planner, manifest: Manifest) -> Problem:
    where = str(planner.checkpoint.config_folder / MANIFEST)
    if manifest.mapping_digest == planner.rules.digest:
        return Problem(
            where=where,
            what="the config is not the one that this was converted with, or this file has been changed since",
            details=(f"converted from {manifest.source}",),
            fix="restore config.json and tepatch.json as they were written, or convert the original again",
        )
    made_by = f"{manifest.plugin or 'a patch that was passed by hand'}, tepatch {manifest.tepatch}"
    package = manifest.plugin.replace(" ", "==")
    return Problem(
        where=where,
        what=f"'{planner.rules.name}' places tensors elsewhere than the mapping that this was converted with",
        details=(f"converted by {made_by}", f"from {manifest.source}"),
        expected=f"{manifest.mapping} (sha256 {manifest.mapping_digest[:12]})",
        found=f"{planner.rules.name} (sha256 {planner.rules.digest[:12]})",
        fix=f"install what converted it{f' (pip install {package})' if package else ''}, or pass its mapping file with "
        "mapping=... (--mapping), and convert it back to hf; or convert the original again",
    )


def given_config(config: Any, checkpoint: Checkpoint | None) -> PreTrainedConfig:
    """The config that was passed, or else the checkpoint's own."""
    from transformers import PreTrainedConfig

    if config is None and checkpoint is not None:
        return read_config(checkpoint.config_folder)
    if not isinstance(config, PreTrainedConfig):
        raise PlanError(
            Problem(
                where="config",
                what="not a config of transformers",
                expected="a PreTrainedConfig, such as LlamaConfig(...) or AutoConfig.from_pretrained(...)",
                found=type(config).__name__,
            )
        )
    return config


def find_patch(patch: str | Patch, config: PreTrainedConfig, plugins: PluginHost | None) -> Patch:
    if not isinstance(patch, Patch):
        host = plugins if plugins is not None else default_host()
        if patch == AUTO:
            return host.patch_for_model_type(config.model_type)
        patch = host.patch(patch)
    if patch.model_types and config.model_type not in patch.model_types:
        # Look-alikes load without an error and compute something else (a window, a scale, a norm).
        raise PlanError(
            Problem(
                where="config.model_type",
                what=f"the patch '{patch.name}' is not made for models of this type",
                expected=" or ".join(patch.model_types),
                found=config.model_type,
                fix="use the patch for this type (tepatch plugins lists them), or 'auto'",
            )
        )
    return patch


def parameter_dtype(
    dtype: torch.dtype | str, config: PreTrainedConfig, checkpoint: Checkpoint | None = None
) -> torch.dtype:
    """The parameters' dtype; "auto" is the config's, else that of the checkpoint's first floating tensor."""
    from tepatch.checkpoint import torch_dtype

    if isinstance(dtype, str) and dtype == AUTO:
        stated: Any = config.dtype
        if stated is None and checkpoint is not None:
            found = (torch_dtype(info.dtype) for info in checkpoint.tensors.values())
            stated = next((each for each in found if each is not None and each.is_floating_point), None)
        dtype = stated if stated is not None else torch.float32
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in _FLOATS:
        raise PlanError(
            Problem(
                where="dtype",
                what=f"parameters can not be held in '{dtype}'",
                expected=", ".join(str(each).removeprefix("torch.") for each in _FLOATS) + " or 'auto'",
            )
        )
    return chosen


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
