"""What tepatch adds to a fused module: the Hugging Face modules that it is made of, as places for adapters.

PEFT, and much else, finds a layer by its name (``self_attn.q_proj``) and puts a module of its own in its place. In a
fused module Q, K and V are rows of one parameter, and the norm before them is another. So a ``StandIn`` stands at each
of the names: a ``Projection``, an ``nn.Linear`` without parameters whose weight is a view of these rows, or a ``Norm``.
As long as nobody touches it, it costs nothing and the fused kernel runs. When another module stands in a projection's
place, the fused module computes what it always does, hands each place its input (normed, as in the stock model)
together with its part of the output, and takes what comes back. What stands in a norm's place makes the normed input.
So each of q, k, v, gate, up and the norm has an adapter of its own, and it is the stock model's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.norms import LayerNorm, RMSNorm, layer_norm, rms_norm
from tepatch.te.nvidia.quantized import is_quantized
from tepatch.te.nvidia.weight_cache import forget
from tepatch.te.weak import Method, Weak

_OF_TORCH: Any = torch._C.TensorBase
"""Whose properties ``ShownTensor`` refines."""
_CONVERTS = "accelerate.utils.transformer_engine"
"""The module that walks down a model by ``named_children`` and exchanges what it finds."""


class ShownTensor(Tensor):
    """Rows of a fused parameter, as what ``weight`` and ``bias`` of a stand-in give.

    In operations it is an ordinary tensor, and gradients reach the parameter. Setting ``data`` copies into the
    parameter's memory: torch would exchange the memory of this view instead, and a merge would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _stand_in: StandIn
    _name: str

    @property
    def data(self) -> Tensor:
        # Whoever takes it may write to it, which changes no version: PEFT merges so.
        self._stand_in.rows.forget()
        plain: Tensor = _OF_TORCH.data.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        self._stand_in.write(self._name, value)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """Refuse to be an optimizer's, which would write to a parameter that it does not know."""
        if self.requires_grad:
            raise self._stand_in.refusal(
                f"the {self._name} is not a parameter of its own, which could be trained by itself",
                fix="train the parameter that it is a part of: tepatch.select_parameters finds it by this name",
            )
        return True

    @property
    def requires_grad(self) -> bool:
        return bool(_OF_TORCH.requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ShownTensor:
        """Change the parameter's, if this is all of it. Else refuse: the parameter would never learn of it."""
        if requires_grad != self.requires_grad:
            parameter = self._stand_in.rows.parameter(self._name)
            if parameter is not None and self._stand_in.rows.is_whole:
                parameter.requires_grad_(requires_grad)
                return self
            raise self._stand_in.refusal(
                f"the {self._name} is a part of a parameter, and can not be trained or frozen by itself",
                fix="train or freeze all of the parameter: tepatch.select_parameters finds it by this name",
            )
        return self

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The parameter's gradient for these rows."""
        return self._stand_in.rows_of_gradient(self._name)


class GatheredTensor(ShownTensor):
    """Rows that lie in another order in the parameter: a copy of them, whose changes in place are brought back.

    A part of it (``weight[0]``) can be read, but not changed: nobody would bring that back.
    """

    _is_part: bool = False

    @property
    def data(self) -> Tensor:
        return self._stand_in.shown(_plain(self), self._name)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._stand_in.write(self._name, value)

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        changed = [each for each in _changed(func, args, kwargs) if isinstance(each, GatheredTensor)]
        for each in changed:
            if each._is_part or len(changed) > 1:
                raise each._stand_in.refusal(
                    f"a part of the {each._name} can not be changed in place: its rows lie in another order",
                    fix=f"change a copy of it all, and set it: {each._stand_in.rows.path}.{each._name}.data = changed",
                )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if changed:  # one, and it is whole
            changed[0]._stand_in.write(changed[0]._name, _plain(changed[0]))
            return out if out is None else changed[0]
        return _marked(out, [each for each in (*args, *kwargs.values()) if isinstance(each, GatheredTensor)])


def _plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, as torch's own class and outside any graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operation of torch writes to."""
    out = kwargs.get("out")
    written = list(out) if isinstance(out, (tuple, list)) else [out]
    if args and _changes_in_place(func):
        written += list(args[0]) if isinstance(args[0], (tuple, list)) else [args[0]]
    return written


def _changes_in_place(func: Any) -> bool:
    """Whether this operation changes its first argument.

    >>> _changes_in_place(Tensor.add_), _changes_in_place(Tensor.__iadd__), _changes_in_place(Tensor.add)
    (True, True, False)
    """
    name = str(getattr(func, "__name__", ""))
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__init__", "__int__", "__invert__"))
    return name.endswith("_") and name not in ("requires_grad_", "retain_grad_")


def _marked(out: Any, given: list[GatheredTensor]) -> Any:
    """``out``, which may be views of ``given``: those can be read, and are no more than parts."""
    if isinstance(out, (tuple, list)):
        return type(out)(_marked(each, given) for each in out) if type(out) in (tuple, list) else out
    if not isinstance(out, Tensor):
        return out
    with torch._C.DisableTorchFunctionSubclass():
        plain = out.as_subclass(Tensor)
        for each in given:
            if plain.untyped_storage().data_ptr() == each.untyped_storage().data_ptr():
                part: GatheredTensor = plain.as_subclass(GatheredTensor)
                part._stand_in, part._name, part._is_part = each._stand_in, each._name, True
                return part
    return plain


class Rows:
    """Where a stand-in lies: rows ``start`` to ``stop`` of parameters of ``owner``, or those of ``order``.

    ``around`` is the innermost module that holds both the owner and the stand-in's place, ``path`` that place in the
    model, ``owner_path`` the owner's. ``weight`` is the parameter of ``owner`` [rows, in_features], or [features] of a
    norm, and ``bias`` that of [rows], None where there is none. ``order`` holds the numbers of rows that are no run
    [stop - start], on the CPU. The modules are not kept alive, and are None when they are gone; the parameters are.
    """

    def __init__(
        self,
        *,
        owner: Fused,
        around: nn.Module,
        path: str,
        owner_path: str,
        weight: str,
        bias: str | None,
        start: int,
        stop: int,
        order: Tensor | None = None,
    ) -> None:
        self._owner, self._around = Weak(owner), Weak(around)
        self._parameters = owner._parameters
        self.kind = type(owner).__name__
        self.path, self.owner_path, self.weight, self.bias = path, owner_path, weight, bias
        self.start, self.stop, self.order = start, stop, order

    @property
    def owner(self) -> Fused | None:
        """The module whose parameters these are."""
        return self._owner()

    @property
    def around(self) -> nn.Module | None:
        """The module with which the owner and the stand-in are copied."""
        return self._around()

    def parameter(self, name: str) -> Tensor | None:
        """The owner's parameter for "weight" or "bias", as it is now: parameters are replaced when a model moves."""
        own, owner = self.weight if name == "weight" else self.bias, self.owner
        if own is None:
            return None
        out: Tensor | None = self._parameters[own] if owner is None else getattr(owner, own)
        return out

    def is_copied_by(self, memo: dict[int, Any]) -> bool:
        """Whether the module around is among those that are being copied."""
        around = self.around
        return around is not None and id(around) in memo

    def forget(self) -> None:
        """Have the owner forget what it has computed of its weights, which are about to change."""
        if (owner := self.owner) is not None:
            forget(owner)

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the parameter, as they lie."""
        weight = self.parameter("weight")
        return self.order is None and weight is not None and (self.start, self.stop) == (0, weight.shape[0])

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.start if self.order is None else len(self.order)

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """These rows of a tensor: a view of it, or a copy where they are no run."""
        if self.order is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        return tensor.index_select(dim, self.order.to(tensor.device))

    def __str__(self) -> str:
        which = f"rows {self.start} to {self.stop}" if self.order is None else f"{self.count} rows, in another order,"
        return f"{which} of a {self.kind}'s {self.weight}"


class StandIn(nn.Module):
    """A module of the stock model, standing at its name: a view of parameters of a fused module.

    Owns no parameter, so that it is in no ``state_dict()`` and in ``parameters()`` of no module around it. ``weight``
    and ``bias`` (or None) are views of the owner's current parameters; what is copied into them, or set as their
    ``data``, is in the model. Assigning another tensor raises ``UnsupportedError``. A copy that is made without the
    owner is a module with parameters of its own.
    """

    def __init__(self, rows: Rows) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would create parameters
        self._rows = rows
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        out = self._view("weight")
        assert out is not None
        return out

    @property
    def bias(self) -> Tensor | None:
        return self._view("bias")

    @property
    def rows(self) -> Rows:
        """Where it lies."""
        return self._rows

    @property
    def training(self) -> bool:
        """The owner's."""
        owner = self._rows.owner if "_rows" in self.__dict__ else None
        return True if owner is None else owner.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    @training.deleter
    def training(self) -> None:
        """Nothing was set: for whoever sets it for a while (``unittest.mock``)."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., n]`` to what the stock module makes of it, with the parameters as they are now."""
        raise NotImplementedError

    def independent(self) -> nn.Module:
        """A module that computes the same, with parameters of its own."""
        raise NotImplementedError

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """The stock module's parameters, for whoever asks this very module for all that is in it.

        A parameter that is whole is the owner's own. One that is a part of the owner's is a view, and refuses to be
        frozen, or trained, by itself. None are given with ``recurse=False``, which asks what the module owns.
        """
        if not recurse:
            return
        for name in ("weight", "bias"):
            shown = self._rows.parameter(name) if self._rows.is_whole else self._view(name)
            if shown is not None:
                yield f"{prefix}.{name}" if prefix else name, shown

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """The stock module's tensors, for whoever asks this very module; nothing as a part of others."""
        out = super().state_dict(*args, **({} if destination is None else {"destination": destination}), **kwargs)
        if destination is None and not args:
            shown = {name: self._view(name) for name in ("weight", "bias")}
            prefix = kwargs.get("prefix", "")
            out.update({prefix + name: _plain(each) for name, each in shown.items() if each is not None})
        return out

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Take the stock module's tensors where nobody around has taken them: a part of a model is loaded."""
        found = {}
        for name in ("weight", "bias"):
            key = prefix + name
            if key not in state_dict or (shown := self._view(name)) is None:
                continue
            value = found[name] = state_dict[key]
            if not isinstance(value, Tensor) or value.shape != shown.shape:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                errors.append(f"size mismatch for {key}: {shape} of the checkpoint, {list(shown.shape)} of the model.")
                return
        for name, value in found.items():
            self.write(name, value.detach().to(self.weight.dtype))

    def called_through(self, standing: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        """What ``standing``, which stands in this place, makes of ``input``; this stand-in makes ``output`` of it."""
        self.__dict__["_held"] = (input, output)
        try:
            out: Tensor = standing(input)
        finally:
            self.__dict__["_held"] = None
        return out

    def held(self, input: Tensor) -> Tensor | None:
        """What the owner has just computed of this very tensor, if it has."""
        return self._held[1] if self._held is not None and self._held[0] is input else None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train or freeze the owner's parameters, if they are whole; else refuse a change by name."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def write(self, name: str, value: Tensor) -> None:
        """Copy ``value`` into the rows of the parameter for ``name`` ("weight" or "bias").

        Raises ``UnsupportedError`` if it has another shape or dtype, or if the parameter holds no plain numbers.
        """
        rows = self._rows
        parameter = rows.parameter(name)
        if parameter is None or not _is_plain(parameter):
            raise self.refusal(
                f"the {name} can not be written: the fused parameter holds no plain numbers",
                found="None" if parameter is None else type(parameter).__name__,
                fix="load the model without quantized weights (or gather sharded ones) to merge into it",
            )
        shape = (rows.count, *parameter.shape[1:])
        if (value.shape, value.dtype) != (shape, parameter.dtype):
            raise self.refusal(
                f"data of another shape or dtype can not be set as a {name}",
                expected=f"{list(shape)} {parameter.dtype}",
                found=f"{list(value.shape)} {value.dtype}",
            )
        # What the owner has computed is of the numbers before this: whoever has written may have done it in place.
        self.__dict__["_held"] = None
        rows.forget()
        value = _plain(value)
        with torch.no_grad():
            if rows.order is not None:
                parameter.data.index_copy_(0, rows.order.to(parameter.device), value.to(parameter.device))
                return
            place = rows.of(parameter.data)
            if (value.data_ptr(), value.stride()) != (place.data_ptr(), place.stride()):
                is_shared = value.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()
                place.copy_(value.clone() if is_shared else value)

    def rows_of_gradient(self, name: str) -> Tensor | None:
        """The part of the parameter's gradient that is for this stand-in."""
        parameter = self._rows.parameter(name)
        gradient = None if parameter is None else parameter.grad
        return None if gradient is None else self._rows.of(gradient)

    def refusal(self, what: str, *, expected: str = "", found: str = "", fix: str = "") -> UnsupportedError:
        """The error for something that a view can not do."""
        rows = self._rows
        lies = f"it is {rows} (and bias)" if rows.bias else f"it is {rows}"
        return UnsupportedError(
            Problem(where=rows.path, what=what, details=(lies,), expected=expected, found=found, fix=fix)
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse: a parameter of a stand-in would be one that the fused module does not use."""
        raise self.refusal(
            f"a stand-in takes no parameter ({name!r})",
            fix=f"copy into the weight: {self._rows.path}.weight.data.copy_(new)",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            raise self.refusal(
                "torch.ao's quantization exchanges layers by their exact class, and would pass this one by",
                fix="quantize the stock model, or load this one with precision= or weights='quantized'",
            )
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
        elif not self._is_current(name, value):
            raise self.refusal(
                f"another {name} can not be assigned: the fused module would not use it",
                fix=f"copy into it: with torch.no_grad(): {self._rows.path}.{name}.copy_(new); with "
                "torch.func.functional_call, give it dict(model.named_parameters()) instead of the state_dict()",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        if not self._rows.is_copied_by(memo):
            return self.independent()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def shown(self, tensor: Tensor, name: str) -> Tensor:
        """``tensor``, these rows of the parameter for ``name``, as what is handed out."""
        cls = ShownTensor if self._rows.order is None else GatheredTensor
        with torch._C.DisableTorchFunctionSubclass():
            view = tensor.as_subclass(cls)
        view._stand_in, view._name = self, name
        return view

    def _view(self, name: str) -> Tensor | None:
        parameter = self._rows.parameter(name)
        if parameter is None:
            return None
        is_initialized = getattr(parameter, "_is_hf_initialized", False)
        if not _is_plain(parameter):
            # A quantized weight's own numbers. What is set as data is refused, by ``write``.
            if not is_quantized(parameter):
                raise self.refusal(
                    f"the {name} can not be seen: the fused parameter is a {type(parameter).__name__}",
                    fix="gather sharded parameters first; add adapters before a model is sharded",
                )
            parameter = parameter.dequantize()
        view = self.shown(self._rows.of(parameter), name)
        view._is_hf_initialized = is_initialized  # type: ignore[attr-defined]  # its initialiser leaves these alone
        return view

    def _is_current(self, name: str, value: Any) -> bool:
        """Whether ``value`` is what ``name`` is already: PEFT assigns a layer's own weight to it when it unloads."""
        current = self._view(name)
        if current is None or not isinstance(value, Tensor):
            return current is value
        if isinstance(value, ShownTensor):
            return value._stand_in is self and value._name == name
        # Gradients for a tensor of its own would never arrive.
        is_same = (value.data_ptr(), value.shape, value.stride()) == (
            current.data_ptr(),
            current.shape,
            current.stride(),
        )
        return is_same and not value.requires_grad


class Projection(StandIn, nn.Linear):  # type: ignore[misc, override]
    """A linear layer of the stock model: ``weight`` [out_features, in_features], ``bias`` [out_features] or None."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        weight = rows.parameter("weight")
        assert weight is not None
        self.in_features = weight.shape[1]
        self.out_features = rows.count

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        held = self.held(input)
        if held is not None:
            return held
        owner = self._rows.owner
        return F.linear(input, self.weight, self.bias) if owner is None else owner.project(self, input)

    def independent(self) -> nn.Linear:
        weight, bias = self.weight, self.bias
        out = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        out.weight, own_bias = _own(weight), None if bias is None else _own(bias)
        if own_bias is not None:
            out.bias = own_bias
        return out.train(self.training)


class Norm(StandIn):
    """The stock model's norm that a fused module begins with: ``weight`` and ``bias`` (or None) [features]."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        owner: Any = rows.owner
        self.eps, self.zero_centered_gamma = owner.eps, owner.zero_centered_gamma

    def forward(self, input: Tensor) -> Tensor:
        """[..., features] to the same, normed."""
        owner: Any = self._rows.owner
        out: Tensor = self.independent()(input) if owner is None else owner.normed(input)
        return out

    def extra_repr(self) -> str:
        weight = self._rows.parameter("weight")
        return f"{0 if weight is None else len(weight)}, eps={self.eps:g}"

    def independent(self) -> nn.Module:
        weight, bias = self.weight, self.bias
        cls: Any = RMSNorm if bias is None else LayerNorm
        out: nn.Module = cls(weight.shape[0], eps=self.eps, zero_centered_gamma=self.zero_centered_gamma, device="meta")
        out.weight = _own(weight)
        if bias is not None:
            out.bias = _own(bias)
        return out.train(self.training)


class Absent(nn.Module):
    """A module of the stock model that no view can show: whoever looks it up by its name gets an error that says so."""

    def __init__(self, path: str, owner: str) -> None:
        super().__init__()
        self.path, self.owner = path, owner
        self._is_hf_initialized = True

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``UnsupportedError``."""
        raise UnsupportedError(
            Problem(
                where=self.path,
                what=f"this module of the stock model is a part of a {self.owner} here, and can not be shown by itself",
                details=("the mapping turns it, or stores other numbers for it",),
                fix="load the model with transformers to change this module by its name",
            )
        )

    forward = requires_grad_ = refuse

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """None of its own; ``UnsupportedError`` for whoever asks this very module for all that is in it."""
        return self.refuse() if recurse else iter(())

    @property
    def weight(self) -> Tensor:
        out: Tensor = self.refuse()
        return out

    @property
    def bias(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.path}: a part of a {self.owner} that can not be shown by itself"


def _own(shown: Tensor) -> nn.Parameter:
    return nn.Parameter(_plain(shown).clone(), requires_grad=shown.requires_grad)


class Place:
    """A name at which a stand-in was put, and where now something else may stand: ``attribute`` of ``parent``.

    The parent is not kept alive. Without it nothing stands there any more.
    """

    def __init__(self, *, stand_in: StandIn, parent: nn.Module, attribute: str) -> None:
        self.stand_in, self.attribute = stand_in, attribute
        self._parent = Weak(parent)

    def put(self) -> None:
        """Have the stand-in stand there."""
        parent = self._parent()
        assert parent is not None
        parent.add_module(self.attribute, self.stand_in)
        parent.named_children = Method(_children, parent)  # type: ignore[method-assign]

    @property
    def standing(self) -> nn.Module:
        """The module that stands there now."""
        parent = self._parent()
        standing = None if parent is None else parent._modules.get(self.attribute)
        return self.stand_in if standing is None else standing

    @property
    def is_plain(self) -> bool:
        """Whether the stand-in stands there, and nobody wants to know when it is called."""
        own = self.stand_in  # asked before each fused computation: as few steps as possible
        parent = self._parent()
        if parent is not None and parent._modules.get(self.attribute, own) is not own:
            return False
        hooks = own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks
        return not hooks

    def call(self, input: Tensor, output: Tensor) -> Tensor:
        """What stands there makes of ``input``, of which the stand-in itself makes ``output``."""
        return self.stand_in.called_through(self.standing, input, output)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's children. Those that are stand-ins are not shown to accelerate's conversion.

    For FP8 it puts a Transformer Engine layer with a copy of the weight in each linear layer's place, and there is one
    already.
    """
    found = type(module).named_children(module)
    caller = sys._getframe(2)  # behind ``Method.__call__``
    if caller.f_globals.get("__name__") != _CONVERTS:
        return found
    return ((name, child) for name, child in found if not isinstance(child, StandIn))


class Places:
    """The places of one fused module. Not a module: a fused module must not have its parent as a child."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._places = sorted(places, key=lambda place: place.stand_in.rows.start)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        # A fused module that is copied without the modules around it has no places: they are the original's.
        kept = [place for place in self._places if place.stand_in.rows.is_copied_by(memo)]
        return Places(copy.deepcopy(place, memo) for place in kept)

    @property
    def are_plain(self) -> bool:
        """Whether a stand-in stands in every place: nothing needs more than the fused computation."""
        return all(place.is_plain for place in self._places)

    def of(self, parameter: str) -> list[Place]:
        """Those in one parameter, by rows."""
        return [place for place in self._places if place.stand_in.rows.weight == parameter]


class Fused(nn.Module):
    """A module of several modules of the stock model, or of one that was renamed."""

    BIASES: ClassVar[dict[str, str]]
    """The parameters [rows, in_features] that projections may lie in, and [features] of the norm -> their biases."""

    caches_weights: bool = True
    """Whether quantized copies of the weights are kept while they are frozen. ``set_precision`` sets it."""

    _places: Places = Places()

    @property
    def places(self) -> Places:
        """Where stand-ins for parts of this module were put."""
        return self._places

    def add_place(self, place: Place) -> None:
        """Put ``place.stand_in``, a part of this module, at its name."""
        place.put()
        self._places = Places((*self._places, place))

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
        changed = [place for place in self._places.of(parameter) if not place.is_plain]
        rows = [place.stand_in.rows for place in changed]
        made = [place.call(input, each.of(output, -1)) for place, each in zip(changed, rows, strict=True)]
        for each, part in zip(rows, made, strict=True):
            if each.order is not None:
                output = output.index_copy(-1, each.order.to(output.device), part.to(output.dtype))
        parts, start = [], 0
        for each, part in zip(rows, made, strict=True):
            if each.order is None:
                parts += [output[..., start : each.start]] if each.start > start else []
                parts.append(part)
                start = each.stop
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
        if first.stand_in.rows.is_whole:
            out: Tensor = first.standing(inp)  # it asks ``project``, perhaps with an input of its own
            return out
        return self.through("weight", inp, self.compute(inp, *args, **kwargs))

    def project(self, projection: Projection, input: Tensor) -> Tensor:
        return self.compute(input) if projection.rows.is_whole else super().project(projection, input)


class FusedWithNorm(Fused):
    """A module that begins with a norm, in the parameters ``layernorm_weight`` and (or None) ``layernorm_bias``."""

    NORM: ClassVar = {"layernorm_weight": "layernorm_bias"}

    eps: float
    zero_centered_gamma: bool
    layernorm_weight: nn.Parameter
    layernorm_bias: nn.Parameter | None

    def normed(self, inp: Tensor) -> Tensor:
        """The norm alone, of [..., features] and by the reference; the dtype stays the input's."""
        # Transformer Engine's modules without a bias have no such attribute.
        weight, bias = self.layernorm_weight, self._parameters.get("layernorm_bias")
        if bias is None:
            out = rms_norm(inp, weight, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma)
        else:
            out = layer_norm(inp, weight, bias, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma)
        return out.to(inp.dtype)

    def normed_elsewhere(self, inp: Tensor) -> Tensor | None:
        """The normed input, where something else than the stand-in makes it."""
        for place in self._places.of("layernorm_weight"):
            if not place.is_plain:
                out: Tensor = place.standing(inp)
                return out
        return None


class FusedNormLinear(FusedWithNorm):
    """A norm and a linear layer: ``compute`` is its own function, the others are its steps."""

    BIASES: ClassVar = {"weight": "bias", **FusedWithNorm.NORM}
    return_layernorm_output: bool

    def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The layer without its places: [..., in_features] to [..., out_features]."""
        raise NotImplementedError

    def compute_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same and the normed input [..., in_features]."""
        raise NotImplementedError

    def compute_of_normed(self, normed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The linear layer alone, of the normed input."""
        raise NotImplementedError

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if self._places.are_plain:
            return self.compute(inp, *args, **kwargs)
        normed = self.normed_elsewhere(inp)
        if normed is None:
            out, normed = self.compute_with_normed(inp, *args, **kwargs)
        else:
            out = self.compute_of_normed(normed, *args, **kwargs)
        out = self.through("weight", normed, out)
        return (out, normed) if self.return_layernorm_output else out


class FusedMLP(FusedWithNorm):
    """A norm and a two-layer MLP: ``compute`` is its own function, the others are its steps."""

    BIASES: ClassVar = {"fc1_weight": "fc1_bias", "fc2_weight": "fc2_bias", **FusedWithNorm.NORM}

    def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The MLP without its places: [..., hidden_size] to [..., hidden_size]."""
        raise NotImplementedError

    def first_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The first layer's output, before the activation, and the normed input."""
        raise NotImplementedError

    def first_of_normed(self, normed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first layer's output alone, of the normed input."""
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
        normed = self.normed_elsewhere(inp)
        if normed is None:
            first, normed = self.first_with_normed(inp, *args, **kwargs)
        else:
            first = self.first_of_normed(normed, *args, **kwargs)
        activated = self.activate(self.through("fc1_weight", normed, first))
        places = self._places.of("fc2_weight")
        if len(places) == 1 and places[0].stand_in.rows.is_whole:
            out: Tensor = places[0].standing(activated)
            return out
        return self.through("fc2_weight", activated, self.second(activated, *args, **kwargs))

    def project(self, projection: Projection, input: Tensor) -> Tensor:
        rows = projection.rows
        is_second = rows.weight == "fc2_weight" and rows.is_whole
        return self.second(input) if is_second else super().project(projection, input)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
