"""What layers compute their matrix products in: the names, Transformer Engine's recipes, and whether they can be used.

A ``Precision`` is one answer to that; ``Request`` is what a user asked of a model, layer by layer. Reading a request
needs no Transformer Engine. Resolving it does, and says why this GPU can not do what was asked.

Nothing here is in force by itself: ``Precision.context`` gives the ``te.autocast`` that a layer enters.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tepatch.errors import BackendError, PlanError, Problem, UnsupportedError

HIGH = "bf16"
"""The precision in which nothing is quantized: matrix products are computed in the dtype of the parameters."""
DEFAULT = "default"
"""The key of a request for the layers that it does not name."""

RECIPES = {
    "fp8": "DelayedScaling",
    "fp8-current": "Float8CurrentScaling",
    "fp8-block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
"""tepatch's name of a precision -> the class of Transformer Engine's recipe."""
_PROBES = {
    "Float8BlockScaling": "is_fp8_block_scaling_available",
    "MXFP8BlockScaling": "is_mxfp8_available",
    "NVFP4BlockScaling": "is_nvfp4_available",
}
_MULTIPLES = {"MXFP8BlockScaling": 32, "NVFP4BlockScaling": 32}
_NAMES = ", ".join(repr(name) for name in (HIGH, *RECIPES))


@dataclass(frozen=True)
class Precision:
    """What matrix products are computed in. Layers share it, and so do copies of a model."""

    name: str
    recipe: Any = field(default=None, repr=False, hash=False)
    """A recipe of Transformer Engine; None where nothing is quantized."""

    @property
    def quantizes(self) -> bool:
        return self.recipe is not None

    @property
    def multiple(self) -> int:
        """What both sizes of every weight have to be divisible by."""
        return _MULTIPLES.get(kind_of(self.recipe), 16) if self.quantizes else 1

    def context(self) -> AbstractContextManager[Any]:
        """A context in which this precision is in force: an empty one where it already is."""
        current = recipe_in_force()
        if not self.quantizes:
            if current is None:
                return nullcontext()
            return _autocast(enabled=False, recipe=current)
        if current is self.recipe or current == self.recipe:
            return nullcontext()
        return _autocast(enabled=True, recipe=self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> Precision:
        return self  # one recipe for a model and its copies

    def __str__(self) -> str:
        kind = type(self.recipe).__name__
        return f"{self.name} ({kind})" if self.quantizes and self.name != kind else self.name


def recipe_in_force() -> Any | None:
    """The recipe by which Transformer Engine quantizes at this moment; None where it does not."""
    # Nobody can have entered an autocast of a package that was never imported, and importing it needs a GPU.
    module: Any = sys.modules.get("transformer_engine.pytorch.quantization")
    if module is None:
        return None
    manager = module.FP8GlobalStateManager
    return manager.get_fp8_recipe() if manager.is_fp8_enabled() else None


def kind_of(recipe: Any) -> str:
    """The class among those of ``RECIPES`` that a recipe is made of; empty for others, such as custom ones."""
    return _kind_of_class(type(recipe))  # type: ignore[arg-type]


@functools.cache
def _kind_of_class(cls: type) -> str:
    names = {each.__name__ for each in cls.__mro__}
    return next((kind for kind in RECIPES.values() if kind in names), "")


@dataclass(frozen=True)
class Request:
    """What was asked for: a value (a name, a recipe, or None) for most layers, and values for some."""

    default: Any
    layers: Mapping[int, Any]
    """By the number of the layer, from 0, or from the end with -1."""

    def for_layers(self, count: int) -> list[Any]:
        """The value of each of ``count`` layers. Raises ``PlanError`` for numbers that are not there, or said twice."""
        out: list[Any] = [self.default] * count
        problems: list[Problem] = []
        seen: dict[int, int] = {}
        for index, value in self.layers.items():
            place = index if index >= 0 else count + index
            if not 0 <= place < count:
                problems.append(
                    _problem(f"there is no layer {index}", expected=f"0 to {count - 1}, or -1 to -{count} from the end")
                )
            elif place in seen:
                problems.append(_problem(f"layer {place} is named twice", found=f"{seen[place]} and {index}"))
            else:
                out[place], seen[place] = value, index
        if problems:
            raise PlanError(problems)
        return out


def read_precision(asked: Any) -> Request:
    """Understand what a user passed as ``precision``, without a need for Transformer Engine.

    ``asked`` is None, a name, a recipe, or a mapping from ``"default"`` and numbers of layers to these. Raises
    ``PlanError`` with every key and value that is not one.
    """
    given = asked if isinstance(asked, Mapping) else {DEFAULT: asked}
    problems = []
    for key, value in given.items():
        is_layer = isinstance(key, int) and not isinstance(key, bool)
        if not is_layer and key != DEFAULT:
            problems.append(
                _problem(
                    "a key is neither the number of a layer nor 'default'",
                    expected="a mapping such as {'default': 'fp8', 0: 'bf16', -1: 'bf16'}",
                    found=repr(key),
                )
            )
        place = f"layer {key}: " if isinstance(asked, Mapping) and is_layer else ""
        if not (value is None or _is_recipe(value) or (isinstance(value, str) and value in (HIGH, *RECIPES))):
            problems.append(
                _problem(
                    f"{place}no precision of this name" if isinstance(value, str) else f"{place}not a precision",
                    expected=f"one of {_NAMES}, a recipe of transformer_engine.common.recipe, or None",
                    found=repr(value),
                    fix=f"make one: {value.__name__}()" if isinstance(value, type) else "",
                )
            )
    layers = {key: value for key, value in given.items() if key != DEFAULT}
    default = given.get(DEFAULT)
    values = (default, *layers.values())
    if not problems and None in values and any(value not in (None, HIGH) for value in values):
        problems.append(
            _problem(
                "some layers are quantized, and it is not said what the others compute in",
                expected=f"'default' among the keys, and for every layer one of {_NAMES} or a recipe",
                fix="add 'default': 'bf16' to quantize the named layers only",
            )
        )
    if problems:
        raise PlanError(problems)
    return Request(default, {int(key): value for key, value in layers.items()})


def resolve(values: Sequence[Any], *, has_te: bool) -> list[Precision | None]:
    """Make the values of layers into precisions: recipes of Transformer Engine that this GPU can compute.

    ``has_te`` says whether the layers are Transformer Engine's. Raises ``BackendError`` if one has to quantize and
    they are not, or this GPU can't; ``UnsupportedError`` for a recipe that the layers can't follow.
    """
    quantizing = [value for value in values if value is not None and value != HIGH]
    if quantizing and not has_te:
        raise BackendError(
            _problem(
                "the layers are the reference modules, which quantize nothing",
                found=_title(quantizing[0]),
                fix="use backend='te' on a GPU, or precision='bf16'",
            )
        )
    made: dict[Any, Precision] = {}
    problems = []
    for value in values:
        key = value if isinstance(value, str) else id(value)
        if value is None or key in made:
            continue
        made[key] = _precision(value)
        if reason := _reason_against(made[key]):
            problems.append(
                _problem(
                    f"this GPU can not compute in {made[key]}",
                    details=(reason,),
                    fix="choose another precision, or a GPU that has it",
                )
            )
    if problems:
        raise BackendError(problems)
    return [None if value is None else made[value if isinstance(value, str) else id(value)] for value in values]


def size_problems(shapes: Iterable[tuple[str, Sequence[int], Precision]], config: Any = None) -> list[Problem]:
    """What is wrong with the sizes of quantized weights: one problem for each precision that they do not fit.

    ``shapes`` are names, shapes ``[out, in]`` and precisions of the weights. ``config`` serves to name the sizes.
    """
    wrong: dict[Precision, list[tuple[str, Sequence[int]]]] = {}
    for name, shape, precision in shapes:
        if any(size % precision.multiple for size in shape):
            wrong.setdefault(precision, []).append((name, shape))
    return [
        _problem(
            f"weights do not have sizes that {precision} can take ({len(found)})",
            details=(*(f"{name} {list(shape)}" for name, shape in found[:8]), *(["..."] if len(found) > 8 else [])),
            expected=f"both sizes of a weight divisible by {precision.multiple}",
            found=_fields(config, {size for _, shape in found for size in shape if size % precision.multiple}),
            fix="keep these layers in 'bf16'; models are made for FP8 by sizes divisible by 128",
        )
        for precision, found in wrong.items()
    ]


def describe(precisions: Sequence[Precision | None]) -> str:
    """One line on what layers compute in; empty if all of them follow the autocast around them."""
    texts = ["as the autocast around it says" if each is None else str(each) for each in precisions]
    if not any(precisions):
        return ""
    first = max(dict.fromkeys(texts), key=texts.count)
    others = [text for text in dict.fromkeys(texts) if text != first]
    places = (f"; {text} in {_places([i for i, t in enumerate(texts) if t == text])}" for text in others)
    return first + "".join(places)


def _precision(value: Any) -> Precision:
    if value == HIGH:
        return Precision(HIGH)
    if isinstance(value, str):
        return Precision(value, getattr(importlib.import_module("transformer_engine.common.recipe"), RECIPES[value])())
    if getattr(value, "fp8_mha", False):
        raise UnsupportedError(
            _problem(
                "fp8_mha hands FP8 tensors from module to module, which only te.MultiheadAttention can",
                found=_title(value),
                fix="make the recipe with fp8_mha=False",
            )
        )
    return Precision(type(value).__name__, value)


def _reason_against(precision: Precision) -> str:
    if not precision.quantizes:
        return ""
    te = importlib.import_module("transformer_engine.pytorch")
    probe = _PROBES.get(kind_of(precision.recipe), "is_fp8_available")
    available, reason = getattr(te, probe)(return_reason=True)
    return "" if available else reason or f"transformer_engine.pytorch.{probe}() says no"


def _is_recipe(value: Any) -> bool:
    module = sys.modules.get("transformer_engine.common.recipe")
    return module is not None and isinstance(value, module.Recipe)


def _autocast(*, enabled: bool, recipe: Any) -> AbstractContextManager[Any]:
    te = importlib.import_module("transformer_engine.pytorch")
    context: AbstractContextManager[Any] = te.autocast(enabled=enabled, recipe=recipe)
    return context


def _problem(what: str, **more: Any) -> Problem:
    return Problem(where="precision", what=what, **more)


def _title(value: Any) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__


def _fields(config: Any, sizes: set[int]) -> str:
    """The fields of ``config`` that have one of these sizes."""
    fields = vars(config).items() if config is not None else ()
    return ", ".join(f"config.{name} = {value}" for name, value in fields if type(value) is int and value in sizes)


def _places(indices: Sequence[int]) -> str:
    """Numbers of layers as text, neighbours as ranges."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer {text}" if len(indices) == 1 else f"layers {text}"
