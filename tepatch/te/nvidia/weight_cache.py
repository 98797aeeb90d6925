"""Quantized copies of weights that do not change: made once, and used by every step of an evaluation.

Transformer Engine quantizes each weight at each call, unless it is told (``is_first_microbatch=False``) to take the
copy that it has made before. Whether that copy is still of the weight's numbers is for the caller to know. Here it is
known from what torch and Transformer Engine tell:

- the parameter is the same object, over the same storage, and no operation has written to it (its ``_version``);
- no optimizer has taken a step, if the parameter can be trained: fused optimizers write without a new ``_version``;
- the recipe, its quantizers and, with delayed scaling, the scales are those that the copy was made by.

Where one of these can not be known, weights are quantized at each call as ever. A write through ``parameter.data`` of
a fused parameter is the one thing that nobody tells; through the ``data`` of a projection's weight, as PEFT merges, it
is seen.

Copies are kept by modules in evaluation mode with gradients off only: they lack the transposed weight that a backward
pass multiplies by. They lie in a place of their own, which Transformer Engine sees during the call: the copies that
it may have been told to keep by somebody else are not touched.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions
from torch.optim.optimizer import register_optimizer_step_post_hook

from tepatch.te.nvidia.precision import kind_of
from tepatch.te.tracing import outside_graphs


@dataclass(slots=True)
class _Events:
    """How often something has happened in this process that changes numbers without a trace in the tensors."""

    optimizer_steps: int = 0
    scale_updates: int = 0
    """Calls after which Transformer Engine may have updated the scales of delayed scaling, of all modules."""


_events = _Events()
_weak_storage: Any = reductions.StorageWeakRef
_scales_rest: ContextVar[bool] = ContextVar("tepatch_te_scales_rest", default=False)


@contextmanager
def resting_scales() -> Iterator[None]:
    """To be entered around an outermost autocast with gradients off: its end updates no scales.

    The end of an autocast that somebody else has entered may update them, by whether gradients are on there.
    """
    token = _scales_rest.set(True)
    try:
        yield
    finally:
        _scales_rest.reset(token)


class Copies(dict[str, Any]):
    """The quantized weights of one of Transformer Engine's modules, by its names for them. A copied module has none."""

    made_of: _State | None = None

    def clear(self) -> None:
        super().clear()
        self.made_of = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Copies, ())

    @property
    def nbytes(self) -> int:
        """The bytes of the numbers and their scales."""
        parts = (part for copy in self.values() for part in copy.get_metadata().values())
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))


class _State:
    """What copies are made of: weights at one moment, and what they were quantized by."""

    def __init__(self, copies: Copies, module: nn.Module, weights: Sequence[Tensor], recipe: Any) -> None:
        itself = weakref.ref(copies)

        def forget_them(_: Any) -> None:  # a layer was offloaded, or its parameters exchanged: do not hold memory
            if (found := itself()) is not None:
                found.clear()

        _watch_optimizers()
        self._recipe = recipe
        self._quantizers = _quantizers(module)
        self._scales = _scales(module, recipe)
        self._weights = [weakref.ref(weight, forget_them) for weight in weights]
        # A weak reference to a storage keeps its identity, but not its memory, from being used again.
        self._storages: list[Any] = [_weak_storage(weight.untyped_storage()) for weight in weights]
        self._moments = [_moment(weight) for weight in weights]

    def is_of(self, module: nn.Module, weights: Sequence[Tensor], recipe: Any) -> bool:
        return (
            (recipe is self._recipe or recipe == self._recipe)
            and _quantizers(module) is self._quantizers
            and _scales(module, recipe) == self._scales
            and len(weights) == len(self._weights)
            and all(
                reference() is weight and storage.cdata == weight.untyped_storage()._cdata and moment == _moment(weight)
                for weight, reference, storage, moment in zip(
                    weights, self._weights, self._storages, self._moments, strict=True
                )
            )
        )


def compute(
    forward: Callable[..., Any],
    owner: nn.Module,
    module: nn.Module,
    weights: Sequence[Tensor],
    recipe: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``forward(module, *args, **kwargs)`` in the recipe in force, without quantizing weights that are as they were.

    ``module`` is Transformer Engine's, ``weights`` are the parameters that its matrices are made of, and ``owner`` is
    the module that they belong to: its mode counts, and its ``caches_weights``.
    """
    if not torch.is_grad_enabled() and not owner.training and owner.caches_weights:
        return _from_copies(forward, module, weights, recipe, args, kwargs)
    if not torch.compiler.is_compiling():
        _note_call()
        forget(module)
    return forward(module, *args, **kwargs)


@outside_graphs
def _from_copies(
    forward: Callable[..., Any],
    module: nn.Module,
    weights: Sequence[Tensor],
    recipe: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    _note_call()
    if not _can_keep(module, weights, recipe):
        forget(module)
        return forward(module, *args, **kwargs)
    copies: Copies = module.__dict__.setdefault("_weight_copies", Copies())
    if copies.made_of is None or not copies.made_of.is_of(module, weights, recipe):
        copies.clear()
    own = module.__dict__["_fp8_workspaces"]
    module.__dict__["_fp8_workspaces"] = copies
    try:
        out = forward(module, *args, is_first_microbatch=False, **kwargs)  # it makes the copies that are not there
    finally:
        module.__dict__["_fp8_workspaces"] = own
    if copies.made_of is None:  # only now: a module makes its quantizers in its first call
        copies.made_of = _State(copies, module, weights, recipe)
    return out


def forget(module: nn.Module) -> None:
    """Free the copies that a module and its steps keep."""
    module.__dict__.pop("_weight_copies", None)
    for step in module.__dict__.get("_steps", {}).values():
        forget(step)


def forget_all(model: nn.Module) -> None:
    """Free the copies that all modules of a model keep."""
    for module in model.modules():
        forget(module)


def held_bytes(module: nn.Module) -> int:
    """The bytes of the copies that a module itself and its steps keep."""
    copies: Copies = module.__dict__.get("_weight_copies", Copies())
    return copies.nbytes + sum(held_bytes(step) for step in module.__dict__.get("_steps", {}).values())


def _note_call() -> None:
    if not _scales_rest.get():
        _events.scale_updates += 1


def _can_keep(module: nn.Module, weights: Sequence[Tensor], recipe: Any) -> bool:
    kind = kind_of(recipe)
    return (
        bool(kind)  # what the quantizers of a custom recipe do is not known
        and (kind != "DelayedScaling" or _scales_rest.get())
        and "_fp8_workspaces" in module.__dict__
        and all(_tells_changes(weight) for weight in weights)
        # A CUDA graph that reads a copy would do so after the weight has changed.
        and not (weights[0].is_cuda and torch.cuda.is_current_stream_capturing())
        and not _shards_parameters()
    )


def _tells_changes(weight: Tensor) -> bool:
    """Whether this is a parameter with plain numbers of its own: no view, nothing quantized, no sharded tensor.

    Tensors that were made in inference mode have no version.
    """
    return type(weight) is nn.Parameter and not weight.is_inference()


def _shards_parameters() -> bool:
    """Whether ``fully_shard`` manages modules of this process.

    It gathers other numbers into the same parameter, and copies of all shards are what it is there to avoid.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    states = sys.modules.get("torch.distributed._composable_state")
    return bool(getattr(states, "_module_state_mapping", True))


def _moment(weight: Tensor) -> tuple[int, int, int]:
    """What differs after a change of a parameter in place."""
    steps = _events.optimizer_steps if weight.requires_grad else -1
    return weight._version, int(weight.storage_offset()), steps


def _quantizers(module: nn.Module) -> Any:
    return module.__dict__.get("quantizers", {}).get("scaling_fwd")


def _scales(module: nn.Module, recipe: Any) -> tuple[int, int] | None:
    """What differs after a change of the scales, which only delayed scaling keeps from step to step.

    Transformer Engine's own update gives them no new version. It comes after calls with gradients, of any module in
    the process, which are counted; after those that are none of tepatch's, a copy keeps the scale it was made by.
    """
    if kind_of(recipe) != "DelayedScaling":
        return None
    scale = getattr(module.__dict__.get("fp8_meta", {}).get("scaling_fwd"), "scale", None)
    return _events.scale_updates, scale._version if isinstance(scale, Tensor) and not scale.is_inference() else -1


@cache
def _watch_optimizers() -> None:
    """Count the steps of all optimizers from now on."""
    register_optimizer_step_post_hook(_count_step)


@outside_graphs
def _count_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    _events.optimizer_steps += 1
