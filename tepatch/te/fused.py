"""What tepatch adds to a fused module: the Hugging Face modules that it is made of, as places for adapters.

PEFT, and much else, finds a linear layer by its name (``self_attn.q_proj``) and puts a module of its own in its place.
In a fused module Q, K and V are rows of one parameter. So a ``Projection`` stands at each of the names: an
``nn.Linear`` without parameters, whose weight is a view of these rows. As long as nobody touches it, it costs nothing
and the fused kernel runs. When another module stands in its place, the fused module computes what it always does, hands
each place its input (normed, as in the stock model) together with its part of the output, and takes what comes
back. So each of q, k, v, gate and up has an adapter of its own, and it is the stock model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.frozen import forget
from tepatch.te.quantized import is_quantized

_OF_TORCH: Any = torch._C.TensorBase
"""Whose properties ``ProjectedTensor`` refines."""


class ProjectedTensor(Tensor):
    """Rows of a fused parameter, as what ``projection.weight`` and ``projection.bias`` give.

    In operations it is an ordinary tensor, and gradients reach the parameter. Setting ``data`` copies into the
    parameter's memory: torch would exchange the memory of this view instead, and a merge would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _projection: Projection
    _name: str

    @property
    def data(self) -> Tensor:
        # Whoever takes it may write to it, which changes no version: PEFT merges so.
        forget(self._projection.rows.owner)
        plain: Tensor = _OF_TORCH.data.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        self._projection.write(self._name, value)

    @property
    def requires_grad(self) -> bool:
        return bool(_OF_TORCH.requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ProjectedTensor:
        """Refuse a change: it would be one of this view, and the parameter would never learn."""
        if requires_grad != self.requires_grad:
            raise self._projection.refusal(
                f"the {self._name} of a projection can not be trained or frozen by itself",
                fix="train or freeze the parameter that it is a part of: named_parameters() lists it",
            )
        return self

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The parameter's gradient for these rows."""
        return self._projection.rows_of_gradient(self._name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Where a projection lies: rows ``start`` to ``stop`` of parameters of ``owner``."""

    owner: Fused
    around: nn.Module
    """The innermost module that holds both the owner and the projection's place."""
    path: str
    """The projection's place in the model, for messages."""
    weight: str
    """The parameter of ``owner`` [rows, in_features]."""
    bias: str | None
    """The parameter of ``owner`` [rows]; None where there is none."""
    start: int
    stop: int

    def parameter(self, name: str) -> Tensor | None:
        """The owner's parameter for "weight" or "bias", as it is now: parameters are replaced when a model moves."""
        own = self.weight if name == "weight" else self.bias
        return None if own is None else getattr(self.owner, own)

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the parameter."""
        return (self.start, self.stop) == (0, getattr(self.owner, self.weight).shape[0])


class Projection(nn.Linear):
    """A linear layer of the stock model, standing at its name: a view of rows of a fused parameter.

    Owns no parameter, so that it is in no ``state_dict()`` and no ``parameters()``. ``weight`` [out_features,
    in_features] and ``bias`` [out_features] or None are views of the owner's current parameters; what is copied into
    them, or set as their ``data``, is in the model. Assigning another tensor raises ``UnsupportedError``. A copy
    that is made without the owner is an ``nn.Linear`` with parameters of its own.
    """

    def __init__(self, rows: Rows) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would create parameters
        weight = getattr(rows.owner, rows.weight)
        self._rows = rows
        self._held: tuple[Tensor, Tensor] | None = None
        self.in_features = weight.shape[1]
        self.out_features = rows.stop - rows.start

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        out = self._view("weight")
        assert out is not None
        return out

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self._view("bias")

    @property
    def rows(self) -> Rows:
        """Where it lies."""
        return self._rows

    @property
    def training(self) -> bool:
        """The owner's: ``eval()`` goes down by ``named_children``, which leaves projections out."""
        return self._rows.owner.training if "_rows" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    @training.deleter
    def training(self) -> None:
        """Nothing was set: for whoever sets it for a while (``unittest.mock``)."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features].

        What the owner has just computed of this very tensor, if it has; else a product with the weight as it is now.
        """
        held = self._held
        if held is not None and held[0] is input:
            return held[1]
        return self._rows.owner.project(self, input)

    def called_through(self, standing: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        """What ``standing``, which stands in this place, makes of ``input``; this projection makes ``output`` of it."""
        self.__dict__["_held"] = (input, output)
        try:
            out: Tensor = standing(input)
        finally:
            self.__dict__["_held"] = None
        return out

    def requires_grad_(self, requires_grad: bool = True) -> Projection:
        """Refuse a change: the rows of a parameter are trained or frozen together."""
        self.weight.requires_grad_(requires_grad)
        return self

    def write(self, name: str, value: Tensor) -> None:
        """Copy ``value`` into the rows of the parameter for ``name`` ("weight" or "bias").

        Raises ``UnsupportedError`` if it has another shape or dtype, or if the parameter holds no plain numbers.
        """
        parameter = self._rows.parameter(name)
        if parameter is None or not _is_plain(parameter):
            raise self.refusal(
                f"the {name} can not be written: the fused parameter holds no plain numbers",
                found="None" if parameter is None else type(parameter).__name__,
                fix="load the model without quantized weights (or gather sharded ones) to merge into it",
            )
        place = parameter.data[self._rows.start : self._rows.stop]
        if (value.shape, value.dtype) != (place.shape, place.dtype):
            raise self.refusal(
                f"data of another shape or dtype can not be set as a {name}",
                expected=f"{list(place.shape)} {place.dtype}",
                found=f"{list(value.shape)} {value.dtype}",
            )
        # What the owner has computed is of the numbers before this: whoever has written may have done it in place.
        self.__dict__["_held"] = None
        forget(self._rows.owner)
        if (value.data_ptr(), value.stride()) != (place.data_ptr(), place.stride()):
            is_shared = value.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()
            with torch.no_grad():
                place.copy_(value.clone() if is_shared else value)

    def rows_of_gradient(self, name: str) -> Tensor | None:
        """The part of the parameter's gradient that is for this projection."""
        parameter = self._rows.parameter(name)
        gradient = None if parameter is None else parameter.grad
        return None if gradient is None else gradient[self._rows.start : self._rows.stop]

    def refusal(self, what: str, *, expected: str = "", found: str = "", fix: str = "") -> UnsupportedError:
        """The error for something that a view can not do."""
        rows = self._rows
        lies = f"it is rows {rows.start} to {rows.stop} of a {type(rows.owner).__name__}'s {rows.weight} (and bias)"
        return UnsupportedError(
            Problem(where=rows.path, what=what, details=(lies,), expected=expected, found=found, fix=fix)
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse: a parameter of a projection would be one that the fused module does not use."""
        raise self.refusal(
            f"a projection takes no parameter ({name!r})", fix="copy into the weight: projection.weight.data.copy_(new)"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
        elif not self._is_current(name, value):
            raise self.refusal(
                f"another {name} can not be assigned to a projection: the fused module would not use it",
                fix=f"copy into it: with torch.no_grad(): projection.{name}.copy_(new)",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        if id(self._rows.around) not in memo:
            return self._independent()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _independent(self) -> nn.Linear:
        weight, bias = self.weight, self.bias
        out = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        out.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        if bias is not None:
            out.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return out.train(self.training)

    def _view(self, name: str) -> Tensor | None:
        parameter = self._rows.parameter(name)
        if parameter is None:
            return None
        is_initialized = getattr(parameter, "_is_hf_initialized", False)
        if not _is_plain(parameter):
            # A quantized weight's own numbers. What is set as data is refused, by ``write``.
            if not is_quantized(parameter):
                raise self.refusal(
                    f"the {name} of a projection can not be seen: the fused parameter is a {type(parameter).__name__}",
                    fix="gather sharded parameters first; add adapters before a model is sharded",
                )
            parameter = parameter.dequantize()
        view = parameter[self._rows.start : self._rows.stop].as_subclass(ProjectedTensor)
        view._projection, view._name = self, name
        view._is_hf_initialized = is_initialized  # type: ignore[attr-defined]  # its initialiser leaves these alone
        return view

    def _is_current(self, name: str, value: Any) -> bool:
        """Whether ``value`` is what ``name`` is already: PEFT assigns a layer's own weight to it when it unloads."""
        current = self._view(name)
        if current is None or not isinstance(value, Tensor):
            return current is value
        return (value.data_ptr(), value.shape, value.stride()) == (current.data_ptr(), current.shape, current.stride())


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A name at which a projection was put, and where now something else may stand."""

    projection: Projection
    parent: nn.Module
    attribute: str

    @property
    def standing(self) -> nn.Module:
        """The module that stands there now."""
        standing = self.parent._modules.get(self.attribute, self.projection)
        return self.projection if standing is None else standing

    @property
    def is_plain(self) -> bool:
        """Whether the projection stands there, and nobody wants to know when it is called."""
        own = self.projection  # asked before each fused computation: as few steps as possible
        if self.parent._modules.get(self.attribute, own) is not own:
            return False
        hooks = own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks
        return not hooks

    def call(self, input: Tensor, output: Tensor) -> Tensor:
        """What stands there makes of ``input``, of which the projection itself makes ``output``."""
        return self.projection.called_through(self.standing, input, output)


class Places:
    """The places of one fused module. Not a module: a fused module must not have its parent as a child."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._places = sorted(places, key=lambda place: place.projection.rows.start)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        # A fused module that is copied without the modules around it has no places: they are the original's.
        kept = [place for place in self._places if id(place.projection.rows.around) in memo]
        return Places(
            replace(
                place,
                projection=copy.deepcopy(place.projection, memo),
                parent=copy.deepcopy(place.parent, memo),
            )
            for place in kept
        )

    @property
    def are_plain(self) -> bool:
        """Whether a projection stands in every place: nothing needs more than the fused computation."""
        return all(place.is_plain for place in self._places)

    def of(self, parameter: str) -> list[Place]:
        """Those in one parameter, by rows."""
        return [place for place in self._places if place.projection.rows.weight == parameter]


class Fused(nn.Module):
    """A module of several linear layers of the stock model, or of one that was renamed."""

    BIASES: ClassVar[dict[str, str]]
    """The parameters [rows, in_features] that projections may lie in -> their biases."""

    caches_weights: bool = True
    """Whether quantized copies of the weights are kept while they are frozen. ``set_precision`` sets it."""

    _places: Places = Places()

    @property
    def places(self) -> Places:
        """Where projections of this module were put."""
        return self._places

    def add_place(self, place: Place) -> None:
        """Put ``place.projection``, rows of a parameter of this module, at its name."""
        place.parent.add_module(place.attribute, place.projection)
        self._places = Places((*self._places, place))
        # Whoever walks down by children moves, casts or exchanges what it finds (accelerate's and torchao's
        # conversions make copies of the weights); a projection has nothing to be moved. Names still lead to it.
        place.parent.named_children = partial(_children_but_projections, place.parent)  # type: ignore[method-assign]

    def project(self, projection: Projection, input: Tensor) -> Tensor:
        """What a projection makes of another input than the fused module's.

        Raises ``UnsupportedError`` while the weight is elsewhere: accelerate brings it for the fused module only.
        """
        if projection.weight.is_meta and not input.is_meta:
            raise projection.refusal(
                "the weight is on the meta device: an offloaded layer brings it back for its own forward only",
                fix="call the layer, or keep it on a device",
            )
        return F.linear(input, projection.weight, projection.bias)

    def through(self, parameter: str, input: Tensor, output: Tensor) -> Tensor:
        """``output``, the product of ``input`` and ``parameter``, as those make it who stand in its places."""
        parts, start = [], 0
        for place in self._places.of(parameter):
            if place.is_plain:
                continue
            rows = place.projection.rows
            parts += [output[..., start : rows.start]] if rows.start > start else []
            parts.append(place.call(input, output[..., rows.start : rows.stop]))
            start = rows.stop
        if not parts:
            return output
        parts += [output[..., start:]] if start < output.shape[-1] else []
        return torch.cat(parts, dim=-1)


class FusedLinear(Fused):
    """A linear layer: ``compute`` is its own function."""

    BIASES: ClassVar = {"weight": "bias"}

    def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer without its places: [..., in_features] to [..., out_features]."""
        raise NotImplementedError

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._places.are_plain:
            return self.compute(inp, *args, **kwargs)
        first = next(iter(self._places))
        if first.projection.rows.is_whole:
            out: Tensor = first.standing(inp)  # it asks ``project``, perhaps with an input of its own
            return out
        return self.through("weight", inp, self.compute(inp, *args, **kwargs))

    def project(self, projection: Projection, input: Tensor) -> Tensor:
        return self.compute(input) if projection.rows.is_whole else super().project(projection, input)


class FusedNormLinear(Fused):
    """A norm and a linear layer: ``compute`` is its own function."""

    BIASES: ClassVar = {"weight": "bias"}
    return_layernorm_output: bool

    def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The layer without its places: [..., in_features] to [..., out_features]."""
        raise NotImplementedError

    def compute_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same and the normed input [..., in_features]."""
        raise NotImplementedError

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if self._places.are_plain:
            return self.compute(inp, *args, **kwargs)
        out, normed = self.compute_with_normed(inp, *args, **kwargs)
        out = self.through("weight", normed, out)
        return (out, normed) if self.return_layernorm_output else out


class FusedMLP(Fused):
    """A norm and a two-layer MLP: ``compute`` is its own function, the others are its steps."""

    BIASES: ClassVar = {"fc1_weight": "fc1_bias", "fc2_weight": "fc2_bias"}

    def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The MLP without its places: [..., hidden_size] to [..., hidden_size]."""
        raise NotImplementedError

    def first_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The first layer's output, before the activation, and the normed input."""
        raise NotImplementedError

    def activate(self, first: Tensor) -> Tensor:
        """The activation: [..., n] to [..., ffn_hidden_size]."""
        raise NotImplementedError

    def second(self, activated: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The second layer: [..., ffn_hidden_size] to [..., hidden_size]."""
        raise NotImplementedError

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._places.are_plain:
            return self.compute(inp, *args, **kwargs)
        first, normed = self.first_with_normed(inp, *args, **kwargs)
        activated = self.activate(self.through("fc1_weight", normed, first))
        places = self._places.of("fc2_weight")
        if len(places) == 1 and places[0].projection.rows.is_whole:
            out: Tensor = places[0].standing(activated)
            return out
        return self.through("fc2_weight", activated, self.second(activated, *args, **kwargs))

    def project(self, projection: Projection, input: Tensor) -> Tensor:
        rows = projection.rows
        is_second = rows.weight == "fc2_weight" and rows.is_whole
        return self.second(input) if is_second else super().project(projection, input)


def _children_but_projections(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in nn.Module.named_children(module) if not isinstance(child, Projection))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
