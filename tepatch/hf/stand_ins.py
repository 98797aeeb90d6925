"""Hugging Face's modules at their names in a patched model, each a view of the fused parameters that hold it.

Which they are follows from the plan alone. A matrix of the checkpoint whose rows are rows of one parameter of a fused
module is a linear layer, also where its rows lie in another order; a vector that is the norm's of such a module is a
norm. What is transposed, or has other values (``1 + w``), is neither, and no module can show it: at its name stands
what raises an error by this name, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn

from tepatch.hf.named import without_wrappers
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Copy, Plan
from tepatch.te.projections import Absent, Fused, FusedWithNorm, Norm, Place, Projection, Rows, StandIn
from tepatch.views import Pair

__all__ = ["install_stand_ins"]


def install_stand_ins(model: nn.Module, plan: Plan) -> None:
    """Put a ``StandIn`` at the path of each module of the stock model that a fused module of ``model`` holds.

    ``plan`` relates the original checkpoint and the parameters. Where a module stands at the path already, or the
    path leads through something that is no plain module, nothing is put; where no view can show it, what stands there
    raises by its name (``Absent``). Parameters, state dicts and outputs stay
    what they are; where another module has been put around a stand-in, they name it as the stock model's would
    (``q_proj.base_layer.weight``). To be called when the state dict is translated already (``tepatch.hf.state``).
    """
    model.register_state_dict_post_hook(name_as_they_stand)  # type: ignore[no-untyped-call]
    handle = model.register_load_state_dict_pre_hook(name_as_they_were)  # type: ignore[no-untyped-call]
    hooks: Any = model._load_state_dict_pre_hooks
    hooks.move_to_end(handle.id, last=False)  # before the translation, as the other is after it
    modules = dict(model.named_modules())
    copies: dict[str, list[Copy]] = {}
    for each in plan.copies:
        copies.setdefault(each.source, []).append(each)
    listening: set[nn.Module] = set()
    for source, found in copies.items():
        path, _, leaf = source.rpartition(".")
        owner = modules.get(found[0].target.rpartition(".")[0])
        if leaf != "weight" or path in modules or not isinstance(owner, Fused):
            continue
        parent = _parent(modules, path)
        if parent is None:
            continue
        rows, attribute = _rows(modules, plan, copies, path), path.rpartition(".")[2]
        if rows is None:
            parent.add_module(attribute, Absent(path, type(owner).__name__))
            continue
        stand_in = (Norm if rows.weight in FusedWithNorm.NORM else Projection)(rows)
        stand_in._is_hf_initialized = True
        owner.add_place(Place(stand_in=stand_in, parent=parent, attribute=attribute))
        around = rows.around
        if around is not None and around not in listening:
            around.register_load_state_dict_pre_hook(take_for_a_part)  # type: ignore[no-untyped-call]
            listening.add(around)


def name_as_they_stand(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook of ``state_dict``: the tensors of a stand-in have the name of where it now is, as a module's do."""
    for was, now in _moved(module):
        if prefix + was in state_dict:
            state_dict[prefix + now] = state_dict.pop(prefix + was)


def name_as_they_were(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of ``load_state_dict``: the same names back, to be found in the plan."""
    for was, now in _moved(module):
        if prefix + now in state_dict:
            state_dict[prefix + was] = state_dict.pop(prefix + now)


def take_for_a_part(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing: list[str],
    *args: Any,
) -> None:
    """Hook of ``load_state_dict`` of a part of a model: what its stand-ins take, its fused modules do not miss.

    Of the whole model, the plan has translated all names before.
    """
    for inner, fused in module.named_modules():
        if not isinstance(fused, Fused) or not (places := list(fused.places)):
            continue
        owner_path = places[0].stand_in.rows.owner_path
        here = owner_path.removesuffix(inner).rstrip(".") if inner else owner_path
        start = f"{prefix}{inner}." if inner else prefix
        keys: dict[str, list[str]] = {}
        covered: dict[str, int] = {}
        for rows in (place.stand_in.rows for place in places):
            for leaf, name in (("weight", rows.weight), ("bias", rows.bias)):
                if name is not None:
                    keys.setdefault(name, [])
                    covered[name] = covered.get(name, 0) + rows.count
                    if rows.path.startswith(f"{here}."):  # else it is outside of what is loaded
                        keys[name].append(f"{prefix}{rows.path.removeprefix(f'{here}.')}.{leaf}")
        if not any(key in state_dict for each in keys.values() for key in each):
            continue
        for name, each in keys.items():
            parameter = fused._parameters.get(name)
            # What is shown in part only would be filled in part only, and stays missing.
            if parameter is not None and covered[name] == len(parameter) and start + name not in state_dict:
                missing += [key for key in each if key not in state_dict]
                state_dict[start + name] = parameter


def _moved(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of tensors of stand-ins that are inside another module now: the checkpoint's, and the current one."""
    for found, child in module.named_modules():
        path = without_wrappers(found)
        if isinstance(child, StandIn) and path != child.rows.path:
            for leaf in ("weight", "bias"):
                yield f"{child.rows.path}.{leaf}", f"{path}.{leaf}"


def _rows(modules: dict[str, nn.Module], plan: Plan, copies: dict[str, list[Copy]], path: str) -> Rows | None:
    """Where the module at ``path`` lies, weight and bias; None if no module can show it."""
    weight = _lies(plan, copies[f"{path}.weight"])
    if weight is None:
        return None
    target, numbers = weight
    owner_path, _, name = target.rpartition(".")
    owner = modules[owner_path]
    if not isinstance(owner, Fused) or name not in owner.BIASES:
        return None
    bias = owner.BIASES[name]
    has_bias = owner._parameters.get(bias) is not None
    # Both or neither: a layer that shows only one of them would compute something else.
    if has_bias != (f"{path}.bias" in copies):
        return None
    if has_bias and _lies(plan, copies[f"{path}.bias"]) != (f"{owner_path}.{bias}", numbers):
        return None
    if isinstance(owner, FusedWithNorm) and name in owner.NORM and len(numbers) != len(getattr(owner, name)):
        return None
    return Rows(
        owner=owner,
        around=modules[_common(owner_path, path.rpartition(".")[0])],
        path=path,
        owner_path=owner_path,
        weight=name,
        bias=bias if has_bias else None,
        start=numbers.start if isinstance(numbers, range) else 0,
        stop=numbers.stop if isinstance(numbers, range) else len(numbers),
        order=None if isinstance(numbers, range) else torch.tensor(numbers),
    )


def _lies(plan: Plan, copies: Sequence[Copy]) -> tuple[str, range | tuple[int, ...]] | None:
    """The parameter, and which of its rows (entries, of a vector) are those of one source, in the source's order.

    A range where they are a run. None if it lies in several parameters or has other values there, or if its columns
    lie in another order.
    """
    targets = {copy.target for copy in copies}
    if len(targets) != 1 or any(copy.affine != IDENTITY for copy in copies):
        return None
    (target,) = targets
    shape, held = plan.sources[copies[0].source].shape, plan.targets[target].shape
    if not 0 < len(shape) < 3 or shape[1:] != held[1:] or 0 in shape:
        return None
    columns, pair = prod(shape[1:]), copies[0].pair
    if len(copies) == 1 and copies[0].step().is_run and pair.target_offset % columns == 0:  # nearly all are
        start = pair.target_offset // columns
        return target, range(start, start + shape[0])
    numbers = [-1] * shape[0]
    for copy in copies:
        found = _rows_of(copy.pair, columns)
        if found is None:
            return None
        for source, own in zip(*found, strict=True):
            numbers[source] = own
    if -1 in numbers:
        return None
    run = range(numbers[0], numbers[0] + len(numbers))
    return target, run if numbers == list(run) else tuple(numbers)


@lru_cache(maxsize=256)  # layers share their pairs
def _rows_of(pair: Pair, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The rows of the source and of the target that a pair of views brings together; None if it cuts or turns rows."""
    sizes = list(pair.sizes)
    strides = [list(pair.source_strides), list(pair.target_strides)]
    if columns > 1:  # the last dimension has to be whole rows
        if not sizes or sizes[-1] % columns or strides[0][-1] != 1 or strides[1][-1] != 1:
            return None
        sizes[-1] //= columns
        for each in strides:
            each[-1] = columns
    offsets = (pair.source_offset, pair.target_offset)
    if any(number % columns for number in (*offsets, *strides[0], *strides[1])):
        return None
    out = []
    for offset, each in zip(offsets, strides, strict=True):
        numbers = torch.tensor([offset // columns])
        for size, stride in zip(sizes, each, strict=True):
            numbers = (numbers[:, None] + torch.arange(size) * (stride // columns)).flatten()
        out.append(tuple(numbers.tolist()))
    return out[0], out[1]


def _parent(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module to put ``path``'s module into, made and listed if need be; None if that is not possible."""
    above, _, last = path.rpartition(".")
    parent = modules.get(above)
    if parent is None:
        parent = nn.Module()
        outer = _parent(modules, above)
        if outer is None:
            return None
        parent.training = outer.training
        parent._is_hf_initialized = True  # type: ignore[assignment]
        outer.add_module(above.rpartition(".")[2], parent)
        modules[above] = parent
    return parent if _takes_children(parent) and not hasattr(parent, last) else None


def _takes_children(module: nn.Module) -> bool:
    """Whether a child more changes nothing: these call or list all that they have."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _common(first: str, second: str) -> str:
    """The longest path that both paths lead through.

    >>> _common("model.layers.0.self_attn.qkv", "model.layers.0.self_attn")
    'model.layers.0.self_attn'
    """
    out: list[str] = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        out.append(one)
    return ".".join(out)
