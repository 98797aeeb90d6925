"""Everything that has to be settled before a byte of a weight moves: for loading, converting and certifying alike.

``settle`` finds the layout that a checkpoint is in and makes two plans. ``relation`` is how the original checkpoint's
tensors and the model's parameters belong together: what it is converted back by. ``reading`` is what is executed to
fill the parameters: the same plan, unless the checkpoint is in another layout than the original's.

A checkpoint may spell names otherwise than the stock model in memory does (a prefix more or less). ``relation`` and
``reading`` have the checkpoint's names; ``stock``, which a model speaks and is saved by, has the stock model's.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tepatch.checkpoint import Checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.checkpoint.listing import MAX_NAMED
from tepatch.checkpoint.manifest import MANIFEST, Manifest
from tepatch.dtypes import FLOATS, dtype_code, is_convertible, torch_dtype
from tepatch.errors import PlanError, Problem, TepatchError
from tepatch.hf.config import AutoClass, ConfigFields, blamed, model_class, read_config, text_config
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.heads import Completed, chosen
from tepatch.hf.model import build_on_meta, keep_in_float32, target_specs
from tepatch.hf.names import are_found, spelt_names
from tepatch.mapping import read_mapping
from tepatch.mapping.names import fold, listed
from tepatch.mapping.relocate import Spelling, below, find_base, joined, move_base, spell
from tepatch.mapping.rules import is_below, source_names
from tepatch.patch import Patch
from tepatch.planning import Plan, make_export_plan, make_plan
from tepatch.planning.identity import make_identity_plan
from tepatch.planning.requirements import count_problems, requirement_problems
from tepatch.plugins import PluginHost, default_host
from tepatch.te import BackendName, Modules, use_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tepatch.mapping import Mapping as Rules
    from tepatch.planning import TensorSpec

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
    stock: Plan
    """Parameters and the stock model's own tensors: ``relation`` in the names that transformers has in memory."""
    spelling: Mapping[str, str]
    """The stock model's name -> the checkpoint's, where they differ and transformers finds the checkpoint's."""
    is_wrapped: bool
    """Whether the mapping reads the config of the language model that a model wraps."""
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
    auto_class: AutoClass = None,
    fresh: Iterable[str] = (),
    drop: Iterable[str] = (),
) -> Iterator[Job]:
    """Build on meta and plan, with the backend in force for as long as the block lasts.

    Without a checkpoint, fresh weights take its place. ``auto_class``, ``fresh`` and ``drop`` are as ``load`` has them.
    """
    wanted = parameter_dtype(dtype, config, checkpoint)
    # A user's file is named as the user named it, so that file:line:column can be clicked.
    path = patch.mapping_path() if mapping is None else Path(mapping)
    rules = read_mapping(path, name=None if mapping is None else str(mapping))
    is_wrapped = serves_inside(patch, config)
    fields = ConfigFields(text_config(config) if is_wrapped else config)
    problems = requirement_problems(rules, fields)
    if checkpoint is not None and not fresh and not problems:
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
    # Parameters are of the class that they were converted for, whatever a config says or does not say.
    manifest = None if checkpoint is None else checkpoint.manifest
    stated = "" if manifest is None else manifest.model_class
    with blamed("config.json", "no class of a model can be found by this config"):
        cls = model_class(config, auto_class, stated=stated)
    with use_backend(backend) as modules:
        started = time.perf_counter()
        if checkpoint is None:
            checkpoint = FreshWeights(build_on_meta(cls, config, dtype=wanted)[0], dtype=wanted)
        model, replaced = build_on_meta(
            cls, config, dtype=wanted, replacements=patch.replacements(), ignores=patch.ignores
        )
        built = time.perf_counter()
        targets, ties = target_specs(model, wanted)
        places = _Places(model, rules, targets, ties)
        if isinstance(checkpoint, FolderCheckpoint) and cls.__name__ in (config.architectures or (cls.__name__,)):
            checkpoint = _without_prefix(places, rules, checkpoint)
        dropped: list[str] = []
        notes: tuple[str, ...] = ()
        if fresh or drop:
            stock = FreshWeights(build_on_meta(cls, config, dtype=wanted)[0], dtype=wanted)
            checkpoint, dropped, notes = _completed(places, rules, checkpoint, stock, fresh, drop)
        planner = _Planner(patch, rules, fields, checkpoint, places, dropped, notes, is_own=mapping is None)
        relation, reading, layout = planner.plans()
        names, stock_names = places.spelled(rules, relation)
        places.targets = keep_in_float32(model, targets, relation.renamed(stock_names), wanted)
        if places.targets != targets:
            relation, reading, layout = planner.plans()
        if relation is not reading:
            relation = replace(relation, notes=reading.notes)
        yield Job(
            patch=patch,
            model=model,
            modules=modules,
            rules=places.stock(rules),
            relation=relation,
            reading=reading,
            stock=relation.renamed(stock_names),
            spelling=names,
            is_wrapped=is_wrapped,
            layout=layout,
            others=planner.others,
            checkpoint=checkpoint,
            replaced=str(replaced),
            dtype=wanted,
            seconds={"build": built - started, "plan": time.perf_counter() - built},
        )


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


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Rules where their base sits in one checkpoint and in the model."""

    rules: Rules
    source: str
    """The base's path in the checkpoint."""
    around: str
    """Where the whole model is in the checkpoint, if that is of a model that wraps it."""
    rest: Mapping[str, str]
    """The checkpoint's name of each parameter outside the base that has another there."""
    spelling: Spelling


class _Places:
    """Where in a model the part is that rules are about, and where it is in a checkpoint."""

    def __init__(
        self, model: PreTrainedModel, rules: Rules, targets: Mapping[str, TensorSpec], ties: Mapping[str, str]
    ) -> None:
        self._model = weakref.ref(model)  # it carries this, for plans that are made when they are asked for
        self.targets = targets
        self.ties = ties
        names = (*targets, *ties)
        where = type(model).__name__
        self.base = find_base(rules, names, side="target", default=rules.base or "", where=where)
        self._outside = [name for name in names if not is_below(name, self.base)]

    def seen(self, rules: Rules, names: Collection[str], where: str = "") -> _Seen:
        """``rules`` for a checkpoint with these ``names``. Raises ``PlanError`` if the base may be in two places."""
        source = find_base(rules, names, side="source", default=self.base, where=where)
        inside = below(rules, names, source)
        others = [name for name in names if name not in inside]
        # In a checkpoint of a model that wraps this one, the head is beside the base: where the base's path begins.
        around = source.removesuffix(f".{self.base}") if self.base and source.endswith(f".{self.base}") else ""
        rest: dict[str, str] = {}
        if rules.rest and others:
            model = self._model()
            assert model is not None  # a checkpoint has been read: there is still the job
            rest = spelt_names(model, self._outside, others, around=around)
        return _Seen(
            rules=move_base(rules, source=source, target=self.base),
            source=source,
            around=around,
            rest=rest,
            spelling=spell(rest, inside, target=self.base if rules.base is not None else None),
        )

    def are_found(self, spelling: Spelling) -> bool:
        """Whether transformers finds the model's tensors by these names."""
        model = self._model()
        assert model is not None
        return are_found(model, spelling.names)

    def spelled(self, rules: Rules, relation: Plan) -> tuple[dict[str, str], dict[str, str]]:
        """The stock model's name -> that of a tensor in ``relation``, and back, where they differ."""
        other = {entry.note: name for name, entry in relation.sources.items() if entry.state == "used" and entry.note}
        spelling = self.seen(rules, [*relation.sources, *other]).spelling
        stock = spelling.stock()
        # A tied tensor that is stored under its other name goes by the first in memory.
        tied = {stock.get(first, first): name for first, name in other.items()}
        own = spelling.names if self.are_found(spelling) else {}  # else what is saved would be found by nobody
        return {**own, **tied}, {**stock, **{name: first for first, name in tied.items()}}

    def stock(self, rules: Rules) -> Rules:
        """``rules`` in the stock model's own names."""
        return move_base(rules, source=self.base, target=self.base)


def _without_prefix(places: _Places, rules: Rules, checkpoint: FolderCheckpoint) -> FolderCheckpoint:
    """The checkpoint by the stock model's names, if all of its names begin with something that nobody looks for."""
    if checkpoint.manifest is not None:
        return checkpoint
    seen = places.seen(rules, checkpoint.tensors, checkpoint.location)
    if places.are_found(seen.spelling):
        return checkpoint
    names = {}
    for name in checkpoint.tensors:
        path, place = next(
            ((path, place) for path, place in ((seen.source, places.base), (seen.around, "")) if is_below(name, path)),
            ("", ""),
        )
        names[name] = joined(place, name[len(path) + 1 :]) if path else name
    if len({*names.values()}) < len(names):
        return checkpoint  # making the plan tells what is wrong with it
    prefix = seen.around or seen.source
    return replace(
        checkpoint,
        tensors={names[name]: replace(info, name=names[name]) for name, info in checkpoint.tensors.items()},
        wrappers=(*checkpoint.wrappers, prefix),
    )


def _completed(
    places: _Places,
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
    aliases = places.seen(rules, checkpoint.tensors, where).spelling.stock()
    known = (*checkpoint.tensors, *checkpoint.others, *checkpoint.absent)
    names = {name: aliases.get(name, name) for name in known}
    dropped = chosen(drop, names, argument="drop", of="the checkpoint")
    made = chosen(fresh, {name: name for name in stock.tensors}, argument="fresh", of=model_class)
    kept = [name for name in checkpoint.tensors if name not in dropped]
    seen = places.seen(rules, kept, where)
    inside = below(rules, made, places.base)
    here: dict[str, str] = {}  # a rule looks for a tensor at the checkpoint's place of the base
    for name in made:
        here[joined(seen.source, inside[name]) if name in inside else seen.rest.get(name, name)] = name
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


@dataclass(frozen=True)
class _Planner:
    patch: Patch
    rules: Rules
    fields: ConfigFields
    checkpoint: Checkpoint
    places: _Places
    dropped: Collection[str]
    """Tensors of the checkpoint that the caller does not want."""
    choices: tuple[str, ...]
    """What the caller has chosen, as notes."""
    is_own: bool
    """Whether the rules are the patch's own, and its other layouts may be tried."""

    def plans(self) -> tuple[Plan, Plan, str]:
        """Relation, reading and layout. Raises ``PlanError`` when the checkpoint is in none that is known."""
        if self.checkpoint.manifest is not None:
            relation = self._relation_of(self.checkpoint.manifest)
            where = str(self.checkpoint.config_folder / MANIFEST)
            native = make_identity_plan(
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

    def _seen(self, rules: Rules) -> _Seen:
        names = [name for name in self.checkpoint.tensors if name not in self.dropped]
        return self.places.seen(rules, names, self.checkpoint.location)

    def _plan(self, rules: Rules) -> Plan:
        seen = self._seen(rules)
        wanted, unwanted = self._no_tensors(seen.rules)
        try:
            plan = make_plan(
                seen.rules,
                config=self.fields,
                sources=self.checkpoint.tensors,
                targets=self.places.targets,
                ties=self.places.ties,
                spelling=seen.rest,
                dropped=self.dropped,
                patch=self.patch.name,
                location=self.checkpoint.location,
                notes=(*self._notes(), *unwanted),
            )
        except PlanError as error:
            raise PlanError([*error.problems, *wanted, *self._lost(seen.rules)], heading=error.heading) from None
        if wanted:
            raise PlanError(wanted, heading=f"{seen.rules.name} does not fit {self.checkpoint.location}")
        return plan

    def _no_tensors(self, rules: Rules) -> tuple[list[Problem], list[str]]:
        """Of the checkpoint's entries that are no tensors: those that nothing leaves out, and notes on the others."""
        problems, left = [], []
        for name, kind in self.checkpoint.others.items():
            if name in self.dropped or any(each.source.pattern.match(name) for each in rules.ignored):
                left.append(name)
                continue
            problems.append(
                Problem(
                    where=f"{self.checkpoint.location}: {name}",
                    what="this entry is no tensor" + (f", but bytes in a {kind}" if kind == "BytesIO" else ""),
                    found=kind,
                    fix=f"leave it out: drop=['{name}'], or list it under 'ignore' with the reason",
                )
            )
        if len(problems) > MAX_NAMED:
            more = f"{len(problems) - MAX_NAMED:,} more entries are no tensors"
            problems = [*problems[:MAX_NAMED], Problem(where=self.checkpoint.location, what=more)]
        notes = [f"{len(left)} entries are no tensors, and are left out: {', '.join(fold(left, 3))}"] if left else []
        return problems, notes

    def _lost(self, rules: Rules) -> list[Problem]:
        """What the index names, no file holds, and rules are for."""
        patterns = [name.pattern for name in source_names(rules)] if self.checkpoint.absent else []
        lost = [name for name in self.checkpoint.absent if any(pattern.match(name) for pattern in patterns)]
        what, fix = "the index names tensors that no file holds", "download or copy the checkpoint again"
        where = self.checkpoint.location
        return [Problem(where=where, what=what, details=tuple(fold(lost, 12)), fix=fix)] if lost else []

    def _export(self, like: Mapping[str, TensorSpec], rules: Rules | None = None) -> Plan:
        seen = self.places.seen(rules or self.rules, like, self.checkpoint.location)
        return make_export_plan(
            seen.rules,
            config=self.fields,
            targets=self.places.targets,
            ties=self.places.ties,
            spelling=seen.rest,
            like=like,
            keep_dtypes=True,
            patch=self.patch.name,
            location=self.checkpoint.location,
        )

    def _notes(self) -> tuple[str, ...]:
        unread = (f"{name} is also in the folder and was not read" for name in self.checkpoint.also_present)
        absent = self.checkpoint.absent
        names = ", ".join(fold(absent, 3))
        gone = (f"the index names {len(absent)} tensors that no file holds: {names}",) if absent else ()
        taken = ", ".join(f"'{part}'" for part in self.checkpoint.wrappers)
        stripped = (f"{taken} of wrappers around modules left out of names, and not saved again",) if taken else ()
        return (*self.choices, *unread, *gone, *stripped)

    def _layout_rules(self, layout: str) -> Rules:
        return read_mapping(self.patch.mapping_path(layout))

    def _likeliest_layout(self) -> str:
        """The layout that knows the most of the checkpoint's names; the original's if none knows more."""
        candidates = {ORIGINAL: self.rules}
        if self.is_own:
            candidates |= {layout: self._layout_rules(layout) for layout in self.patch.layouts}
        known = {}
        for layout, rules in candidates.items():
            patterns = [name.pattern for name in source_names(self._seen(rules).rules)]
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
