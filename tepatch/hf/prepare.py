"""Everything that is settled before a byte of a weight moves, for loading, converting and comparing alike.

``opened`` opens a checkpoint; ``prepare`` reads its config, finds the patch, builds the model on the meta device and
plans.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tepatch.checkpoint import Checkpoint, open_checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.dtypes import FLOATS, dtype_code, is_convertible, torch_dtype
from tepatch.errors import PlanError, Problem, TepatchError
from tepatch.hf.config import AutoClass, ConfigFields, blamed, model_class, read_config, text_config
from tepatch.hf.fit import Fitting
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.heads import completed
from tepatch.hf.locate import Locator, without_prefix
from tepatch.hf.model import build_on_meta, keep_in_float32, target_specs
from tepatch.hf.model_plan import ModelPlan
from tepatch.hf.names import Renaming, has_conversions
from tepatch.mapping import read_mapping
from tepatch.patch import Patch
from tepatch.planning import Plan
from tepatch.planning.requirements import count_problems, requirement_problems
from tepatch.plugins import PluginHost, default_host
from tepatch.te import BackendName, Modules, use_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tepatch.mapping import Mapping as Rules

AUTO: Final = "auto"
Source = str | PathLike[str] | FolderCheckpoint
"""A folder, a file, a hub id in the local cache; or what ``tepatch.checkpoint.open_checkpoint`` gave for one."""


@dataclass(kw_only=True)
class Prepared:
    """A planned load: everything is settled, nothing is read."""

    patch: Patch
    config: PreTrainedConfig
    """The config that was passed, or the checkpoint's."""
    model: PreTrainedModel
    """On the meta device, with the patch's layers in it."""
    plan: ModelPlan
    modules: Modules
    checkpoint: Checkpoint
    """What is read: the checkpoint, perhaps completed by fresh tensors, or fresh weights alone."""
    fresh: FreshWeights | None
    """What makes the fresh tensors, if there may be any."""
    relation: Plan
    """The original checkpoint and the parameters, as ``plan.relation``, in the names of the checkpoint."""
    reading: Plan
    """This checkpoint and the parameters. The same object as ``relation`` when this checkpoint is in that layout."""
    layout: str
    """``hf``, ``te``, or the name of one of the patch's other layouts."""
    replaced: str
    dtype: torch.dtype
    seconds: dict[str, float]


def prepare(
    patch: str | Patch,
    checkpoint: Checkpoint | None,
    *,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str = AUTO,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    auto_class: AutoClass = None,
    fresh: Iterable[str] = (),
    drop: Iterable[str] = (),
    plugins: PluginHost | None = None,
) -> Prepared:
    """Find the patch, build on the meta device and plan. Arguments and errors are those of ``load``.

    Without a ``checkpoint``, fresh weights take its place.
    """
    config = given_config(config, checkpoint)
    patch = find_patch(patch, config, plugins)
    wanted = parameter_dtype(dtype, config, checkpoint)
    # A user's file is named as the user named it, so that file:line:column can be clicked.
    path = patch.mapping_path() if mapping is None else Path(mapping)
    rules = read_mapping(path, name=None if mapping is None else str(mapping))
    is_wrapped = serves_inside(patch, config)
    fields = ConfigFields(text_config(config) if is_wrapped else config)
    _check_served(patch, rules, fields, config, checkpoint, auto_class, has_fresh=bool(fresh))
    # Parameters are of the class that they were converted for, whatever a config says or does not say.
    manifest = None if checkpoint is None else checkpoint.manifest
    with blamed("config.json", "no class of a model can be found by this config"):
        cls = model_class(config, auto_class, stated="" if manifest is None else manifest.model_class)
    started = time.perf_counter()
    made = None
    if checkpoint is None or fresh or drop:
        made = FreshWeights(build_on_meta(cls, config, dtype=wanted)[0], dtype=wanted)
    with use_backend(backend) as modules:
        model, replaced = build_on_meta(
            cls, config, dtype=wanted, replacements=patch.replacements(), ignores=patch.ignores
        )
    built = time.perf_counter()
    targets, ties = target_specs(model, wanted)
    locator = Locator(rules, (*targets, *ties), Renaming(model), where=cls.__name__)
    if isinstance(checkpoint, FolderCheckpoint) and cls.__name__ in (config.architectures or (cls.__name__,)):
        checkpoint = without_prefix(locator, rules, checkpoint)
    dropped: list[str] = []
    notes: tuple[str, ...] = ()
    if checkpoint is None:
        assert made is not None
        checkpoint = made
    elif made is not None:
        checkpoint, dropped, notes = completed(locator, rules, checkpoint, made, fresh, drop)
    fitting = Fitting(
        patch=patch,
        rules=rules,
        fields=fields,
        checkpoint=checkpoint,
        locator=locator,
        targets=targets,
        ties=ties,
        dropped=dropped,
        choices=notes,
        has_own_rules=mapping is None,
    )
    fit = fitting.run()
    spelling, stock_names = locator.spelled(rules, fit.relation)
    kept = keep_in_float32(model, targets, fit.relation.renamed(stock_names), wanted)
    if kept != targets:
        fit = replace(fitting, targets=kept).run()
    relation = fit.relation if fit.relation is fit.reading else replace(fit.relation, notes=fit.reading.notes)
    return Prepared(
        patch=patch,
        config=config,
        model=model,
        plan=ModelPlan(
            patch=patch,
            rules=locator.stock(rules),
            relation=relation.renamed(stock_names),
            # A class that is not the config's own has other names than the checkpoint that it is read from.
            spelling=spelling if cls.__name__ in (config.architectures or ()) else {},
            model_class=cls,
            config=copy.deepcopy(config),
            is_wrapped=is_wrapped,
            has_conversions=has_conversions(model),
            has_own_rules=mapping is None,
            locator=locator,
        ),
        modules=modules,
        checkpoint=checkpoint,
        fresh=made,
        relation=relation,
        reading=fit.reading,
        layout=fit.layout,
        replaced=str(replaced),
        dtype=wanted,
        seconds={"build": built - started, "plan": time.perf_counter() - built},
    )


def opened(
    source: Source,
    *,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
) -> FolderCheckpoint:
    """The checkpoint at ``source``. Raises ``PlanError`` for an argument that says how to open what is open already."""
    if not isinstance(source, FolderCheckpoint):
        return open_checkpoint(
            source, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
        )
    given = {"variant": variant, "subfolder": subfolder, "revision": revision, "use_safetensors": use_safetensors}
    if said := [name for name, value in given.items() if value not in (None, "")]:
        raise PlanError(
            Problem(
                where=", ".join(said),
                what="says how a checkpoint is opened, and this one is open already",
                found=source.location,
                fix=f"leave it out here: open_checkpoint(folder, {said[0]}={given[said[0]]!r})",
            )
        )
    return source


def _check_served(
    patch: Patch,
    rules: Rules,
    fields: Mapping[str, Any],
    config: PreTrainedConfig,
    checkpoint: Checkpoint | None,
    auto_class: AutoClass,
    *,
    has_fresh: bool,
) -> None:
    """Raise ``PlanError`` for a config that the rules can not serve, or that can not be of this checkpoint."""
    problems = requirement_problems(rules, fields)
    if checkpoint is not None and not has_fresh and not problems:
        problems = count_problems(
            rules,
            fields,
            len(checkpoint.tensors),
            is_converted=checkpoint.manifest is not None,
            where=checkpoint.location,
        )
        if problems:
            raise PlanError(problems, heading=f"{rules.name} does not fit {checkpoint.location}")
    if problems:
        where = checkpoint.location if checkpoint else "config"
        told = [_with_advice(problem, config, checkpoint, auto_class) for problem in problems]
        raise PlanError(told, heading=f"{where}: the patch '{patch.name}' can not serve this model")


def _with_advice(
    problem: Problem, config: PreTrainedConfig, checkpoint: Checkpoint | None, auto_class: AutoClass
) -> Problem:
    """A requirement that does not hold, with what can be done: transformers may not take this config either."""
    if "quantization_config" in problem.expected and checkpoint is not None:
        stored = sorted({info.dtype for info in checkpoint.tensors.values()})
        if not all(is_convertible(code, "F64") for code in stored):
            fix = "dequantize it with what has quantized it, and save it without quantization_config"
            return replace(problem, fix=fix)
        return replace(
            problem,
            what=f"the config says that weights are quantized, and those stored are not ({', '.join(stored)})",
            fix="if they were merged or dequantized, take quantization_config out of config.json",
        )
    try:
        build_on_meta(model_class(config, auto_class), config, dtype=torch.float32)
    except TepatchError:
        return replace(problem, fix="correct this field: transformers can not make a model of this config either")
    return replace(problem, fix=f"{problem.fix}; load it with transformers")


def given_config(config: Any, checkpoint: Checkpoint | None) -> PreTrainedConfig:
    """The config that was passed, or else the checkpoint's own."""
    from transformers import PreTrainedConfig

    if config is None and checkpoint is not None:
        return read_config(checkpoint.config_folder, checkpoint.tensors)
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
    """The patch of that name, or with "auto" the one for the config's type.

    For a model that wraps a language model and has no patch of its own, that is the patch for what it wraps.
    """
    inside = text_config(config).model_type
    if not isinstance(patch, Patch):
        host = plugins if plugins is not None else default_host()
        if patch == AUTO:
            served = {kind for each in host.patches.values() for kind in each.model_types}
            is_inside = config.model_type not in served and inside in served
            return host.patch_for_model_type(inside if is_inside else config.model_type)
        patch = host.patch(patch)
    if patch.model_types and config.model_type not in patch.model_types and not serves_inside(patch, config):
        # Look-alikes load without an error and compute something else (a window, a scale, a norm).
        raise PlanError(
            Problem(
                where="config.model_type",
                what=f"the patch '{patch.name}' is not made for models of this type",
                expected=" or ".join(patch.model_types),
                found=config.model_type + (f", which wraps {inside}" if inside != config.model_type else ""),
                fix="use the patch for this type (tepatch plugins lists them), or 'auto'",
            )
        )
    return patch


def serves_inside(patch: Patch, config: PreTrainedConfig) -> bool:
    """Whether a patch is not for models of this config, but for the language model that they wrap."""
    return config.model_type not in patch.model_types and text_config(config).model_type in patch.model_types


def parameter_dtype(
    dtype: torch.dtype | str, config: PreTrainedConfig, checkpoint: Checkpoint | None = None
) -> torch.dtype:
    """The parameters' dtype; "auto" is the config's, else that of the checkpoint's first floating tensor."""
    if isinstance(dtype, str) and dtype == AUTO:
        stated: Any = config.dtype
        if stated is None and checkpoint is not None:
            found = (torch_dtype(info.dtype) for info in checkpoint.tensors.values())
            stated = next((each for each in found if each is not None and each.is_floating_point), None)
        dtype = stated if stated is not None else torch.float32
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or dtype_code(chosen) not in FLOATS:
        raise PlanError(
            Problem(
                where="dtype",
                what=f"parameters can not be held in '{dtype}'",
                expected=", ".join(str(torch_dtype(code)).removeprefix("torch.") for code in FLOATS) + " or 'auto'",
            )
        )
    return chosen
