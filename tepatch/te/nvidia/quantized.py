"""Weights that a model holds quantized only, as ``te.quantized_model_init`` makes them, but filled from a checkpoint.

Transformer Engine quantizes a parameter when it initialises it, and a later ``copy_`` of a part would use a scale that
is not of the whole. So each weight is assembled in memory of its own, in the dtype that it has otherwise, quantized
once, and let go. The module is then what it would be had it been made under ``te.quantized_model_init``: with
gradients off, if the initial values are not kept (one copy of each weight, for inference); else with gradients on (a
transposed copy too, for the backward pass).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from tepatch.errors import PlanError, Problem
from tepatch.te.nvidia.precision import Precision, kind_of

PLAIN, QUANTIZED = "plain", "quantized"
WEIGHTS = (PLAIN, QUANTIZED)
"""How a model may hold the weights of its matrix products."""


def quantized_weights(model: nn.Module, weights: str, *, keep_initial: bool) -> QuantizedWeights | None:
    """What a caller's ``weights`` and ``keep_initial`` mean for ``model``; None for plain ones.

    Raises ``PlanError`` for what they can not mean.
    """
    if weights not in WEIGHTS:
        raise PlanError(
            Problem(where="weights", what="can not be held so", expected=" or ".join(WEIGHTS), found=repr(weights))
        )
    if weights == QUANTIZED:
        return QuantizedWeights(model, keeps_initial=keep_initial)
    if keep_initial:
        raise PlanError(
            Problem(
                where="keep_initial",
                what="there are other numbers to keep only where weights are held quantized",
                fix="pass weights='quantized' and a precision with it, or leave it out",
            )
        )
    return None


@dataclass(frozen=True, slots=True)
class _Weight:
    module: Any
    leaf: str
    precision: Precision


class QuantizedWeights:
    """The weights of a model on the meta device that will be held quantized, by the precision of their layers.

    ``keeps_initial`` is for training: the numbers that a weight was quantized from stay on the CPU, for an optimizer's
    master weights (``parameter.get_high_precision_init_val()``, as Transformer Engine has it). Raises ``PlanError`` if
    no layer quantizes, or nothing in them can be held so.
    """

    def __init__(self, model: nn.Module, *, keeps_initial: bool) -> None:
        self.keeps_initial = keeps_initial
        self._weights: dict[str, _Weight] = {}
        self._initial: dict[str, torch.Tensor] = {}
        for path, layer in model.named_modules():
            precision = getattr(layer, "precision", None)
            if isinstance(precision, Precision) and precision.quantizes:
                for inner, module in layer.named_modules():
                    for leaf in _places(module):
                        name = ".".join(part for part in (path, inner, leaf) if part)
                        self._weights[name] = _Weight(module, leaf, precision)
        if not self._weights:
            raise PlanError(
                Problem(
                    where="weights",
                    what="no weight can be held quantized",
                    expected="a precision that quantizes, for layers of Transformer Engine's modules",
                    fix="pass precision='fp8-current' (or another) with weights='quantized', and have a GPU",
                )
            )

    @property
    def names(self) -> frozenset[str]:
        """The parameters that will be quantized."""
        return frozenset(self._weights)

    def seal(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The quantized parameter for ``tensor``, ``[out, in]`` on a GPU, which is not needed afterwards."""
        weight = self._weights[name]
        if self.keeps_initial:
            self._initial[name] = tensor.cpu()
        with torch.cuda.device(tensor.device), torch.no_grad():
            return _quantized(weight, tensor, is_transposed_too=self.keeps_initial)

    def attach_initial(self, model: nn.Module) -> None:
        """Give each parameter of the finished model the numbers that it was quantized from."""
        for name, value in self._initial.items():
            parameter: Any = model.get_parameter(name)
            parameter._high_precision_init_val = value
            parameter.get_high_precision_init_val = MethodType(_initial_of, parameter)
            parameter.clear_high_precision_init_val = MethodType(_forget_initial, parameter)

    def __str__(self) -> str:
        kinds = sorted({str(weight.precision) for weight in self._weights.values()})
        return f"{len(self._weights)} weights are held quantized only ({', '.join(kinds)})"


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds quantized numbers and scales: Transformer Engine's have a ``dequantize`` of their own."""
    return type(tensor).dequantize is not torch.Tensor.dequantize


def _places(module: nn.Module) -> list[str]:
    """The parameters of one of Transformer Engine's modules that it can hold quantized."""
    notes = module.__dict__.get("param_init_meta")
    if not isinstance(notes, dict) or "fp8_meta" not in module.__dict__:
        return []
    return [leaf for leaf, note in notes.items() if note.fp8_meta_index is not None and leaf in module._parameters]


def _quantized(weight: _Weight, tensor: torch.Tensor, *, is_transposed_too: bool) -> torch.Tensor:
    module, recipe = weight.module, weight.precision.recipe
    if not module.primary_weights_in_fp8:
        te = importlib.import_module("transformer_engine.pytorch")
        module.primary_weights_in_fp8 = True
        with te.quantized_model_init(enabled=True, recipe=recipe):
            module.init_fp8_metadata(num_gemms=len(_places(module)))
    quantizer = module.quantizers["scaling_fwd"][module.param_init_meta[weight.leaf].fp8_meta_index]
    quantizer.set_usage(rowwise=True, columnwise=is_transposed_too)
    quantizer.internal = False
    if kind_of(recipe) == "DelayedScaling":
        # It starts with a scale of 1, which leaves weights of a usual size next to no bits. The formula is the recipe's
        # own: the largest number of the format, over the largest of the weight, over 2 ** margin.
        largest = tensor.abs().amax().float()
        scale = recipe.fp8_format.value.max_fwd / largest / 2**recipe.margin
        quantizer.scale.copy_(torch.where(largest > 0, scale, torch.ones_like(scale)).reshape(quantizer.scale.shape))
    out: torch.Tensor = quantizer(tensor)
    return out


def _initial_of(parameter: Any) -> torch.Tensor | None:
    return getattr(parameter, "_high_precision_init_val", None)


def _forget_initial(parameter: Any) -> None:
    parameter.__dict__.pop("_high_precision_init_val", None)
