"""Transformer Engine's own modules as the factories of a ``Modules`` value.

They differ from Transformer Engine's classes in two defaults and one name. Its classes create parameters on "cuda"
whatever torch's default device is, and defer them only when given the *string* "meta" (a
``torch.device("meta")`` compares unequal to it and is then filled from the GPU); so inside a meta context,
where Hugging Face builds a model, the factories pass that string. And the parameter dtype is torch's default,
as everywhere in torch. The norm's weight in a fused module is called ``layernorm_weight`` (see ``NORM_NAMES``).
Where products are quantized, batches are padded to what the kernels take. And the linear layers are those of
``tepatch.te.projections``: other modules may stand at the places of their projections.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.te import reference
from tepatch.te.backend import Modules
from tepatch.te.nvidia import weight_cache as frozen
from tepatch.te.nvidia.alignment import alignment_of, check_features, with_padded_rows
from tepatch.te.nvidia.precision import recipe_in_force
from tepatch.te.projections import FusedLinear, FusedMLP, FusedNormLinear
from tepatch.te.reference.mlp import activate
from tepatch.te.rope import fused_rotary
from tepatch.te.tracing import outside_graphs

if TYPE_CHECKING:
    from tepatch.te.experts import Experts

NORM_NAMES = {"layer_norm_weight": "layernorm_weight", "layer_norm_bias": "layernorm_bias"}
"""Transformer Engine's names for a fused norm -> tepatch's.

By its name Hugging Face's Trainer (and most code that groups parameters) decides which parameters get no weight
decay: those with "layernorm" in it do, "layer_norm_weight" would get one.
"""


def load() -> Modules:
    """Give the factories of the installed Transformer Engine; ``probe()`` must have found it usable."""
    te = importlib.import_module("transformer_engine.pytorch")
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")
    linear, norm_linear, mlp, attention = _classes()
    return Modules(
        name="te",
        default_device="cuda",
        Linear=_factory(linear, dtype_argument="params_dtype"),
        LayerNormLinear=_factory(norm_linear, dtype_argument="params_dtype"),
        LayerNormMLP=_factory(mlp, dtype_argument="params_dtype"),
        RMSNorm=_factory(te.RMSNorm, dtype_argument="dtype"),
        LayerNorm=_factory(te.LayerNorm, dtype_argument="dtype"),
        DotProductAttention=partial(_attention, attention),
        apply_rotary=partial(fused_rotary, rope.apply_rotary_pos_emb),
        moe_permute=moe_permute,
        moe_unpermute=moe_unpermute,
        grouped_mlp=grouped_mlp,
    )


def moe_permute(hidden_states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Transformer Engine's ``moe_permute``: tokens ``[tokens, n]`` to rows ``[tokens * k, n]`` by expert, and how."""
    te = importlib.import_module("transformer_engine.pytorch")
    rows, order = te.moe_permute(hidden_states.contiguous(), index.int(), index.numel(), map_type="index")
    return rows, order


def moe_unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Transformer Engine's ``moe_unpermute``: each token's rows weighted and added up, ``[tokens, n]``."""
    te = importlib.import_module("transformer_engine.pytorch")
    out: Tensor = te.moe_unpermute(rows, order, weights.float(), map_type="index")
    return out


def grouped_mlp(experts: Experts, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Each expert's MLP of its rows ``[sum(counts), hidden_size]``, by two grouped products.

    Where they are quantized, each expert's rows are padded with zeros to what the kernels take, and cut again.
    """
    te = importlib.import_module("transformer_engine.pytorch")
    given, splits = rows, list(counts)
    recipe = recipe_in_force()
    if recipe is not None:
        alignment = alignment_of(recipe)
        sizes = {"hidden_size": experts.hidden_size, "ffn_hidden_size": experts.ffn_hidden_size}
        check_features("Experts", sizes, alignment.features)
        rows, splits = te.Fp8Padding(experts.num_experts, alignment.rows)(rows, splits)
    first = _grouped_step(experts, te, "gate_up_proj", recipe)(rows, splits)
    out: Tensor = _grouped_step(experts, te, "down_proj", recipe)(activated(first, experts.activation), splits)
    if rows is not given:
        out = te.Fp8Unpadding(experts.num_experts, alignment.rows)(out, list(counts))
    return out


def placement(device: str | torch.device | None) -> str | torch.device:
    """Give the device to ask Transformer Engine for: "meta" in a meta context, else as given, else a GPU."""
    default = torch.get_default_device()
    if default.type == "meta":
        return "meta"
    if device is None:
        return default if default.type == "cuda" else "cuda"
    return "meta" if torch.device(device).type == "meta" else device


def __getattr__(name: str) -> Any:
    """The classes that are made when Transformer Engine is there: pickled models name them as this module's."""
    if name in ("Linear", "LayerNormLinear", "LayerNormMLP", "DotProductAttention"):
        return next(cls for cls in _classes() if cls.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> tuple[type[nn.Module], ...]:
    te = importlib.import_module("transformer_engine.pytorch")
    made = (
        _linear(te.Linear),
        _norm_linear(_named(te.LayerNormLinear), te),
        _mlp(_named(te.LayerNormMLP), te),
        _exact_attention(te.DotProductAttention),
    )
    for cls in made:
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
    return made


def _linear(cls: type[nn.Module]) -> type[nn.Module]:
    class Linear(FusedLinear, _picklable(cls)):  # type: ignore[misc]
        """Transformer Engine's ``Linear``, with places for adapters and for any number of tokens."""

        def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = _padded(self, self, cls.forward, inp, *args, **kwargs)
            return out

    return Linear


def _norm_linear(cls: type[nn.Module], te: Any) -> type[nn.Module]:
    class LayerNormLinear(FusedNormLinear, _picklable(cls)):  # type: ignore[misc]
        """Transformer Engine's ``LayerNormLinear``, with places for adapters and for any number of tokens."""

        def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
            if _is_wide(inp) and not self.return_layernorm_output:
                return self.compute_with_normed(inp, *args, **kwargs)[0]
            out: Tensor | tuple[Tensor, ...] = _padded(self, self, cls.forward, inp, *args, **kwargs)
            return out

        def compute_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if _is_wide(inp):
                normed = _normed_in_float32(self, inp)
                return self.compute_of_normed(normed, *args, **kwargs), normed
            as_it_was = self.return_layernorm_output
            self.return_layernorm_output = True
            try:
                out, normed = _padded(self, self, cls.forward, inp, *args, **kwargs)
            finally:
                self.return_layernorm_output = as_it_was
            return out, normed

        def compute_of_normed(self, normed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = _linear_step(self, te, "weight", "bias")
            out: Tensor = _padded(self, step, nn.Module.__call__, normed, *args, **kwargs)
            return out

    return LayerNormLinear


def _mlp(cls: type[nn.Module], te: Any) -> type[nn.Module]:
    class LayerNormMLP(FusedMLP, _picklable(cls)):  # type: ignore[misc]
        """Transformer Engine's ``LayerNormMLP``, with places for adapters and for any number of tokens."""

        def compute(self, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if _is_wide(inp):
                first, _ = self.first_with_normed(inp, *args, **kwargs)
                return self.second(self.activate(first), *args, **kwargs)
            out: Tensor = _padded(self, self, cls.forward, inp, *args, **kwargs)
            return out

        def first_with_normed(self, inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if _is_wide(inp):
                normed = _normed_in_float32(self, inp)
                return self.first_of_normed(normed, *args, **kwargs), normed
            step = _norm_linear_step(self, te)
            out, normed = _padded(self, step, nn.Module.__call__, inp, *args, **kwargs)
            return out, normed

        def first_of_normed(self, normed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = _linear_step(self, te, "fc1_weight", "fc1_bias")
            out: Tensor = _padded(self, step, nn.Module.__call__, normed, *args, **kwargs)
            return out

        def activate(self, first: Tensor) -> Tensor:
            return activated(first, str(self.activation))

        def second(self, activated: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = _linear_step(self, te, "fc2_weight", "fc2_bias")
            out: Tensor = _padded(self, step, nn.Module.__call__, activated, *args, **kwargs)
            return out

    return LayerNormMLP


def _picklable(cls: type[nn.Module]) -> type[nn.Module]:
    class Picklable(cls):  # type: ignore[misc,valid-type]
        """A module whose initialisers of norms and biases are no local functions, which pickle can not name."""

        def register_parameter(self, name: str, param: nn.Parameter | None, **kwargs: Any) -> None:
            if "<locals>" in getattr(kwargs.get("init_fn"), "__qualname__", ""):
                if name.endswith("bias"):
                    kwargs["init_fn"] = partial(nn.init.constant_, val=0.0)
                elif name in NORM_NAMES:
                    kwargs["init_fn"] = partial(nn.init.constant_, val=float(not self.zero_centered_gamma))
            super().register_parameter(name, param, **kwargs)

    return Picklable


def _is_wide(inp: Tensor) -> bool:
    """Whether a float32 residual stream meets 16-bit products, under ``torch.autocast``.

    Hugging Face's layers then norm in float32. Transformer Engine would round before its norm too.
    """
    return inp.dtype == torch.float32 and torch.is_autocast_enabled("cuda") and recipe_in_force() is None


def _normed_in_float32(module: Any, inp: Tensor) -> Tensor:
    """The module's norm of float32 ``inp`` [..., n], in float32."""
    weight = module.layernorm_weight.float()
    if module.zero_centered_gamma:
        weight = weight + 1
    with torch.autocast("cuda", enabled=False):
        if module.normalization == "RMSNorm":
            return F.rms_norm(inp, weight.shape, weight, module.eps)
        return F.layer_norm(inp, weight.shape, weight, module.layernorm_bias.float(), module.eps)


def _padded(
    owner: nn.Module, module: nn.Module, forward: Callable[..., Any], inp: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``forward`` of ``module``, with rows of zeros where a quantized product needs more than ``inp`` has.

    ``module`` is ``owner`` or a step of it. Weights are not quantized again while they are frozen, unless the caller
    has said himself (``is_first_microbatch``) when they are.
    """
    recipe = recipe_in_force()
    if recipe is None:
        if not torch.compiler.is_compiling():
            frozen.forget(module)
        return forward(module, inp, *args, **kwargs)
    alignment = alignment_of(recipe)
    weights = []
    for name, parameter in owner._parameters.items():
        if parameter is not None and parameter.dim() == 2:
            rows, columns = parameter.shape
            sizes = {"out_features": rows, "in_features": columns}
            check_features(f"{type(owner).__name__}.{name}", sizes, alignment.features)
            weights.append(parameter)
    if args or "is_first_microbatch" in kwargs:
        return with_padded_rows(lambda rows: forward(module, rows, *args, **kwargs), inp, alignment.rows)
    return with_padded_rows(
        lambda rows: frozen.compute(forward, owner, module, weights, recipe, rows, **kwargs), inp, alignment.rows
    )


class Steps(dict[str, nn.Module]):
    """Parts of a fused module as modules of their own, over its parameters.

    They are no children of it, which would list its parameters twice, and a copy of it makes its own.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return Steps()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Steps, ())


def _linear_step(owner: Any, te: Any, weight: str, bias: str) -> nn.Module:
    """Transformer Engine's ``Linear`` over these parameters of ``owner``."""

    def make() -> nn.Module:
        matrix = getattr(owner, weight)
        step: nn.Module = te.Linear(
            matrix.shape[1], matrix.shape[0], bias=owner.use_bias, params_dtype=matrix.dtype, device="meta"
        )
        return step

    return _step(owner, weight, make, {"weight": weight, "bias": bias})


def _norm_linear_step(mlp: Any, te: Any) -> nn.Module:
    """The norm and first layer of an MLP: (output, normed input)."""

    def make() -> nn.Module:
        matrix = mlp.fc1_weight
        step: nn.Module = te.LayerNormLinear(
            matrix.shape[1],
            matrix.shape[0],
            eps=mlp.eps,
            normalization=mlp.normalization,
            zero_centered_gamma=mlp.zero_centered_gamma,
            return_layernorm_output=True,
            bias=mlp.use_bias,
            params_dtype=matrix.dtype,
            device="meta",
        )
        return step

    return _step(mlp, "norm", make, {"weight": "fc1_weight", "bias": "fc1_bias", **NORM_NAMES})


def _step(owner: nn.Module, name: str, make: Callable[[], nn.Module], names: Mapping[str, str]) -> nn.Module:
    """A step of ``owner``, made at its first use, with ``names`` (its own -> the owner's) as they are now.

    Parameters are replaced when a model moves; and while FSDP has gathered them, they are plain tensors, which
    setattr would refuse.
    """
    steps: Steps = owner.__dict__.setdefault("_steps", Steps())
    if name not in steps:
        steps[name] = make()
    step = steps[name]
    for own, theirs in names.items():
        if step._parameters.get(own) is not None:
            step._parameters[own] = getattr(owner, theirs)
    if hasattr(owner, "primary_weights_in_fp8"):
        step.__dict__["primary_weights_in_fp8"] = owner.primary_weights_in_fp8
    return step


def _grouped_step(experts: Experts, te: Any, name: str, recipe: Any) -> Callable[[Tensor, list[int]], Tensor]:
    """Transformer Engine's ``GroupedLinear`` over the matrices in one parameter ``[num_experts, out, in]``."""
    packed = getattr(experts, name)

    def make() -> nn.Module:
        num_gemms, rows, columns = packed.shape
        step: nn.Module = te.GroupedLinear(
            num_gemms, columns, rows, bias=False, params_dtype=packed.dtype, device="meta"
        )
        return step

    step = _step(experts, name, make, {})

    def product(inp: Tensor, splits: list[int]) -> Tensor:
        step.training = experts.training
        names = [f"weight{index}" for index in range(experts.num_experts)]
        # One operation for all: a slice for each expert would have a gradient as large as the whole.
        step._parameters.update(zip(names, packed.unbind(0), strict=True))
        try:
            out: Tensor
            if recipe is None:
                frozen.forget(step)
                out = step(inp, splits)
            else:
                out = frozen.compute(nn.Module.__call__, experts, step, [packed], recipe, inp, splits)
        finally:
            step._parameters.update(dict.fromkeys(names))  # nothing of this batch's graph is kept
        return out

    return product


def activated(first: Tensor, activation: str) -> Tensor:
    """Transformer Engine's activation of [..., n], by its name; only ``first`` is kept for the backward pass."""
    kernels = importlib.import_module("transformer_engine_torch")
    if not hasattr(kernels, activation):
        return activate(first, activation)
    out: Tensor = _Activation.apply(first, activation, kernels)  # type: ignore[no-untyped-call]
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, activation: str, kernels: Any) -> Tensor:
        rows = first.reshape(-1, first.shape[-1]).contiguous()
        ctx.save_for_backward(rows)
        ctx.shape, ctx.derivative = first.shape, getattr(kernels, f"d{activation}")
        out: Tensor = getattr(kernels, activation)(rows, None)
        return out.view(*first.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        rows_of_gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        return ctx.derivative(rows_of_gradient, rows, None).view(ctx.shape), None, None


def _named(cls: type[nn.Module]) -> type[nn.Module]:
    class Named(cls):  # type: ignore[misc,valid-type]
        """A fused module whose norm has the names of ``NORM_NAMES``; its own names for it can still be read."""

        def register_parameter(self, name: str, param: nn.Parameter | None, **kwargs: Any) -> None:
            super().register_parameter(NORM_NAMES.get(name, name), param, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(NORM_NAMES.get(name, name))

    return Named


def _attention(cls: type[nn.Module], *args: Any, softcap: float = 0.0, **kwargs: Any) -> nn.Module:
    """Transformer Engine's attention; with a softcap, which its releases before 2.20 do not have, the reference's."""
    if not softcap:
        return cls(*args, **kwargs)
    knows_softcap = "softcap" in inspect.signature(cls.__mro__[1]).parameters
    return (cls if knows_softcap else reference.DotProductAttention)(*args, softcap=softcap, **kwargs)


def _exact_attention(cls: type[nn.Module]) -> type[nn.Module]:
    class DotProductAttention(cls):  # type: ignore[misc,valid-type]
        """Transformer Engine's attention, given tensors that lie in memory as their format says.

        Transformer Engine guesses the layout from strides, and takes keys and values that are both transposed
        (as those from a Hugging Face cache are) for contiguous ones: it then attends to the wrong numbers
        without a word (2.20.2, ``get_qkv_layout``). To make them contiguous copies a whole cache at every token; so
        one query that sees all keys goes to torch's attention, which takes any strides.
        """

        def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self._scale = softmax_scale  # None means the same to torch's attention
            self._made_with = (args, {**kwargs, "softmax_scale": softmax_scale})
            # By what it was made with: under whatever names Transformer Engine keeps that.
            capped, normed = kwargs.get("softcap"), kwargs.get("softmax_type", "vanilla")
            self._has_plain_softmax = not capped and normed == "vanilla" and kwargs.get("qkv_format") == "bshd"

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            new: nn.Module = type(self).__new__(type(self))
            memo[id(self)] = new
            new.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
            return new

        def __reduce__(self) -> tuple[Any, ...]:
            # It holds local functions, which pickle can not name, and no numbers: it is made again.
            kept = {name: value for name, value in self.__dict__.items() if name in _KEPT_WHEN_PICKLED}
            return (_new_attention, self._made_with, kept)

        @outside_graphs
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if (
                kwargs.get("attn_mask_type") == "no_mask"
                and not key.is_contiguous()
                and _is_plain_decoding(self, query)
            ):
                return _attend_to_all(query, key, value, scale=self._scale)
            out: Tensor = super().forward(*(_as_laid_out(each) for each in (query, key, value)), *args, **kwargs)
            return out

    return DotProductAttention


def _as_laid_out(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous; a copy if it is a single token's part of a fused projection.

    That one is contiguous and still a view of the others' memory, of which Transformer Engine can make nothing.
    """
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() != tensor.nbytes and tensor.shape[:-2].numel() == 1:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


_KEPT_WHEN_PICKLED = frozenset(
    name for name in nn.Module().__dict__ if name == "training" or ("hook" in name and "state_dict" not in name)
)
"""Hooks around the module, and its mode."""


def _new_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    cls: type[nn.Module] = __getattr__("DotProductAttention")
    return cls(*args, **kwargs)


def _is_plain_decoding(module: Any, query: Tensor) -> bool:
    """Whether this is one query a row of a model that is not trained, with the ordinary softmax."""
    return module._has_plain_softmax and query.shape[1] == 1 and not module.training and not query.requires_grad


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
    """Every query sees every key: ``[b, q, heads, d]`` and ``[b, k, kv heads, d]`` to ``[b, q, heads * d]``."""
    is_grouped = query.shape[2] != key.shape[2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).flatten(2)


def _factory(cls: Callable[..., nn.Module], *, dtype_argument: str) -> Callable[..., nn.Module]:
    def build(*args: Any, device: str | torch.device | None = None, **kwargs: Any) -> nn.Module:
        if kwargs.get(dtype_argument) is None:
            kwargs[dtype_argument] = torch.get_default_dtype()
        return cls(*args, device=placement(device), **kwargs)

    return build
