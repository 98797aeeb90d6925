"""What every layer made of the backend's modules has: a precision of its own, and checkpoints that keep it.

A plugin's layer derives from ``AcceleratedLayer`` first and from Hugging Face's layer second. ``set_precision`` tells
the layers of a model what to compute in; from then on each call of a layer is in that precision, whoever calls it.

Recipes with delayed scaling want more. They update the scales of *all* modules whenever the outermost ``te.autocast``
ends, so that one such context for each layer would do it once for each layer, with histories rolled on as often.
Therefore the module that runs the layers enters the outermost context, and a layer enters one of its own only where
it differs, or is called alone. That module is given a subclass of its class: a ``with`` statement ends on any exit,
where a forward hook would be left out by a KeyboardInterrupt, and quantization would go on being in force everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import nn

from tepatch.errors import PlanError, Problem, UnsupportedError
from tepatch.report import Report
from tepatch.te.nvidia.precision import (
    Precision,
    Request,
    describe,
    kind_of,
    read_precision,
    recipe_in_force,
    resolve,
    size_problems,
)
from tepatch.te.nvidia.quantized import is_quantized
from tepatch.te.nvidia.weight_cache import forget_all, held_bytes, resting_scales
from tepatch.te.optimizers import watch
from tepatch.te.tracing import refuse_to_be_recorded, refuse_to_be_walked_for_export

_ARGUMENTS = ("use_reentrant", "context_fn", "determinism_check", "debug")
"""Of torch's ``checkpoint``, those that Transformer Engine's has too. It always restores the state of random numbers
(``preserve_rng_state``) and never stops early (``early_stop``)."""


class AcceleratedLayer(nn.Module):
    """A layer in a precision. Goes before Hugging Face's class: ``class Layer(AcceleratedLayer, hf.Layer)``."""

    precision: Precision | None = None
    """What the layer computes in, or None for what the ``te.autocast`` around it says. ``set_precision`` sets it."""

    def mark_as_initialized(self) -> None:
        """Keep Hugging Face's initialiser away from the layer's modules; to be called when all of them are there.

        The backend has initialised them as Hugging Face would. Its own initialiser would set every class with
        "LayerNorm" in its name to ones, and LayerNormLinear.weight is the fused QKV.
        """
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_to_be_recorded()
        if self.precision is None:
            return super().__call__(*args, **kwargs)
        return _call_in(self.precision, super().__call__, args, kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        refuse_to_be_walked_for_export()
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """Hugging Face's checkpoint function; Transformer Engine's instead where the layer is quantized.

        What Hugging Face sets computes the layer again in the backward pass, when no autocast is in force any more.
        """
        if "_gradient_checkpointing_func" not in self.__dict__:
            raise AttributeError("_gradient_checkpointing_func")
        function: Callable[..., Any] = self.__dict__["_gradient_checkpointing_func"]
        is_quantized = recipe_in_force() is not None if self.precision is None else self.precision.quantizes
        return _checkpoint_of_te(function) if is_quantized else function

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        self.__dict__["_gradient_checkpointing_func"] = function  # where it is in the stock layer

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        if self.__dict__.pop("_gradient_checkpointing_func", None) is None:
            raise AttributeError("_gradient_checkpointing_func")

    def train(self, mode: bool = True) -> Self:
        if mode:
            forget_all(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        forget_all(self)  # they would stay behind on the GPU
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register_again(self)
        watch(self)  # as the layer that this is a copy of

    def extra_repr(self) -> str:
        return f"precision={self.precision}" if self.precision is not None else ""


def set_precision(model: nn.Module, precision: Any, *, cache_weights: bool = True) -> None:
    """Change what the layers of a patched model compute their matrix products in.

    ``precision`` is as in ``load``: None (as the ``te.autocast`` around the model says), ``"bf16"`` (never quantized),
    ``"fp8"``, ``"fp8-current"``, ``"fp8-block"``, ``"mxfp8"``, ``"nvfp4"``, a recipe of Transformer Engine, or a
    mapping such as ``{"default": "fp8", 0: "bf16", -1: "bf16"}``. ``model`` is the model that ``load`` gave, or a
    wrapper around it. ``model.tepatch.precision`` says how it is now.

    In evaluation with gradients off, a quantized copy of each weight is kept until the weight changes, about a byte for
    each of its elements (``weight_copies`` tells): with ``cache_weights`` False there are none, and weights are
    quantized at each call. Copies that there are when this is called are freed.

    Raises ``PlanError`` (a name, layer or size that does not fit, a model without such layers), ``BackendError``
    (this GPU or the reference backend can't) or ``UnsupportedError``; the model is then as it was.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    loaded = [module for module in modules if isinstance(module.__dict__.get("tepatch"), Report)]
    if len(loaded) != 1:
        raise PlanError(
            Problem(
                where="precision",
                what="this is not a model that tepatch has made, or is a part of one, or holds several",
                expected="what tepatch.load or tepatch.build gave, or a wrapper around it",
                found=type(model).__name__,
            )
        )
    text = apply_precision(model, read_precision(precision))
    for module in model.modules():
        if hasattr(module, "caches_weights"):
            module.caches_weights = cache_weights  # type: ignore[assignment]
    report: Report = loaded[0].__dict__["tepatch"]
    loaded[0].__dict__["tepatch"] = dataclasses.replace(report, precision=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCopies:
    """What the quantized copies of a model's weights take, in bytes."""

    held: int
    """By the copies that there are now, with their scales."""
    full: int
    """By the copies of all weights, once the model has been called in evaluation; without their scales, which are a
    thirtieth of it (``"mxfp8"``), an eighth (``"nvfp4"``), or next to nothing."""

    def __str__(self) -> str:
        return f"{self.held / 2**20:,.1f} MiB of at most {self.full / 2**20:,.1f} MiB"


def weight_copies(model: nn.Module) -> WeightCopies:
    """What ``cache_weights`` of ``set_precision`` costs: the bytes that are held now, and those of all copies.

    Layers without a precision of their own are counted as if an autocast in FP8 was around them.
    """
    full = 0
    for layer in model.modules():
        if not isinstance(layer, AcceleratedLayer) or (layer.precision is not None and not layer.precision.quantizes):
            continue
        is_fp4 = layer.precision is not None and kind_of(layer.precision.recipe) == "NVFP4BlockScaling"
        elements = sum(
            parameter.numel()
            for module in layer.modules()
            if _is_quantizable(module) and getattr(module, "caches_weights", False)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() > 1 and type(parameter) is nn.Parameter  # others are quantized already, or sharded
        )
        full += elements // 2 if is_fp4 else elements
    return WeightCopies(held=sum(held_bytes(module) for module in model.modules()), full=full)


def apply_precision(model: nn.Module, request: Request) -> str:
    """Do what ``set_precision`` says, for a model that may still be on the meta device; gives the text about it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AcceleratedLayer)}
    if not layers:
        raise PlanError(
            Problem(
                where="precision",
                what="the model has no layers that take a precision",
                expected="layers of tepatch.te.layer:AcceleratedLayer",
                found=type(model).__name__,
                fix="load the model with tepatch.load",
            )
        )
    values = request.for_layers(len(layers))
    has_te = all(any(_is_quantizable(module) for module in layer.modules()) for layer in layers.values())
    precisions = resolve(values, has_te=has_te)
    chosen = dict(zip(layers, precisions, strict=True))
    weights = [
        (f"{name}.{inner}.{leaf}" if name else f"{inner}.{leaf}", tuple(parameter.shape[-2:]), precision)
        for name, precision in chosen.items()
        if precision is not None and precision.quantizes
        for inner, module in layers[name].named_modules()
        if _is_quantizable(module)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    problems = size_problems(weights, getattr(model, "config", None))
    held = [name for name, precision in chosen.items() if not _can_hold(layers[name], precision)]
    if held:
        problems.append(
            Problem(
                where="precision",
                what=f"{len(held)} layers hold their weights quantized, and for another precision only",
                details=tuple(f"{name}: {layers[name].precision}" for name in held[:8]),
                fix="load the model in that precision, or without weights='quantized'",
            )
        )
    if problems:
        raise PlanError(problems)
    for name, layer in layers.items():
        layer.precision = chosen[name]
        forget_all(layer)
    # The first quantized layer has to be in the outermost context itself: it is the one that has the scales of
    # gradients updated, when its backward pass ends.
    outermost = next((each for each in precisions if each is not None and each.quantizes), None)
    _set_outermost(model, _runner(model, list(layers)), outermost)
    return describe(precisions)


def _can_hold(layer: AcceleratedLayer, precision: Precision | None) -> bool:
    """Whether a layer's weights, as they are held, are some that ``precision`` computes with."""
    if layer.precision is None or not any(is_quantized(parameter) for parameter in layer.parameters()):
        return True
    return precision is not None and kind_of(precision.recipe) == kind_of(layer.precision.recipe)


class _Outermost(nn.Module):
    """Goes before the class of the module that runs the layers: every call of it is in one precision."""

    _outermost_precision: Precision | None = None
    _stock_class: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._outermost_precision is None:
            return super().__call__(*args, **kwargs)
        return _call_in(self._outermost_precision, super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle and copy look classes up by their names, and this one has the name of the class that it is made of.
        reduced = super().__reduce_ex__(protocol)
        return (_new_outermost, (type(self)._stock_class,), *reduced[2:])


@functools.cache
def _outermost_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Outermost, cls), {**names, "_stock_class": cls})


def _new_outermost(cls: type[nn.Module]) -> nn.Module:
    changed = _outermost_class(cls)  # type: ignore[arg-type]
    out: nn.Module = changed.__new__(changed)
    return out


def _set_outermost(model: nn.Module, runner: nn.Module | None, precision: Precision | None) -> None:
    for module in model.modules():
        if isinstance(module, _Outermost) and (module is not runner or precision is None):
            # A class made of ours, such as that of fully_shard, has to stay: it then enters nothing.
            module.__dict__.pop("_outermost_precision", None)
            if "_stock_class" in type(module).__dict__:
                module.__class__ = type(module)._stock_class  # type: ignore[assignment]
    if runner is not None and precision is not None:
        if not isinstance(runner, _Outermost):
            runner.__class__ = _outermost_class(type(runner))  # type: ignore[arg-type]
        runner.__dict__["_outermost_precision"] = precision


def _runner(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The innermost module that all of these layers are in and that is called itself, as a list is not."""
    paths = [name.split(".")[:-1] for name in names if name]
    if len(paths) < len(names):
        return None  # the layer was passed alone
    together = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    parts = [part for part, *_ in together]
    while True:
        module = model.get_submodule(".".join(parts))
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return module
        if not parts:
            return None
        parts = parts[:-1]


def _is_quantizable(module: nn.Module) -> bool:
    """Whether this is a module of Transformer Engine with matrix products, or computes by some."""
    return "fp8_meta" in module.__dict__ or getattr(module, "can_quantize", False) is True


# Whether an autocast is in force is state of the process that a compiled graph can not hold: what is around the call
# runs as it stands, what is inside is compiled.
@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call,untyped-decorator]
def _call_in(precision: Precision, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    ends_without_update = precision.quantizes and recipe_in_force() is None and not torch.is_grad_enabled()
    with precision.context(), resting_scales() if ends_without_update else nullcontext():
        return call(*args, **kwargs)


def _checkpoint_of_te(function: Callable[..., Any]) -> Callable[..., Any]:
    """Transformer Engine's ``checkpoint``, with the arguments that torch's was set with."""
    given: dict[str, Any] = {}
    inner = function
    while isinstance(inner, functools.partial):
        given = {**inner.keywords, **given}
        inner = inner.func
    if inner is not torch.utils.checkpoint.checkpoint:
        raise UnsupportedError(
            Problem(
                where="gradient checkpointing",
                what="quantized layers can be checkpointed by Transformer Engine's own function only",
                expected="torch.utils.checkpoint.checkpoint, in whose place it is used",
                found=f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', repr(inner))}",
                fix="enable gradient checkpointing without offloading or a function of your own, or use 'bf16'",
            )
        )
    arguments = {name: value for name, value in given.items() if name in _ARGUMENTS}
    if not arguments.setdefault("use_reentrant", True):
        arguments["context_fn"] = functools.partial(_contexts, arguments.get("context_fn"))
    te = importlib.import_module("transformer_engine.pytorch")
    return functools.partial(te.checkpoint, **arguments)


def _contexts(users: Callable[[], tuple[Any, Any]] | None) -> tuple[Any, Any]:
    """The contexts of a checkpointed forward pass and of its repetition.

    The repetition is inside an autocast of its own, which is the outermost in a backward pass: ended as such, it would
    roll the histories of all modules once more for every layer. (The other mode, ``use_reentrant``, needs it so: the
    modules to update gradients' scales are decided in the repetition.)
    """
    forward, repetition = users() if users is not None else (nullcontext(), nullcontext())
    return forward, _inside_another(repetition, recipe_in_force())


@contextmanager
def _inside_another(context: AbstractContextManager[Any], recipe: Any) -> Iterator[None]:
    te = importlib.import_module("transformer_engine.pytorch")
    with te.autocast(enabled=False, recipe=recipe), context:
        yield


def _register_again(copied: nn.Module) -> None:
    """Make the modules of a copy register their scales anew.

    A module notes in itself that Transformer Engine has its scales in the lists of those to be updated. A copy has
    the note, and scales that are in no list: they would never be updated. And pickle gives every tensor a memory of
    its own, so that a quantizer would record what it saw where no one looks.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is None:
        return
    registered = quantization.FP8GlobalStateManager.get_buffer_info()
    for module in copied.modules():
        if not isinstance(notes := module.__dict__.get("fp8_meta"), dict):
            continue
        notes.pop(registered, None)
        notes.pop("global_fp8_buffer_pos_fwd_recompute", None)
        quantizers: dict[str, Any] = module.__dict__.get("quantizers", {})
        for key in quantizers:
            state: Any = notes.get(key)
            if hasattr(state, "amax_history"):
                quantizers[key] = state.make_quantizers()
