"""Hugging Face's linear layers at their names in a patched model, each a view of the fused parameter that holds it.

Which they are follows from the plan alone: a matrix of the checkpoint that lies in one parameter of a fused module as a
block of whole rows is such a layer. A matrix that is interleaved with others or transposed is none: no module can show
it, and who looks for its name (PEFT) says that there is no such module.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import nn

from tepatch.hf.named import without_wrappers
from tepatch.mapping.plan import Copy, Plan
from tepatch.te.fused import Fused, Place, Projection, Rows

__all__ = ["install_projections"]


def install_projections(model: nn.Module, plan: Plan) -> None:
    """Put a ``Projection`` at the path of each linear layer of the stock model that a fused module of ``model`` holds.

    ``plan`` relates the original checkpoint and the parameters. Where a module stands at the path already, or the
    path leads through something that is no plain module, nothing is put. Parameters, state dicts and outputs stay
    what they are; where another module has been put around a projection, they name it as the stock model's would
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
    for source in copies:
        path, _, leaf = source.rpartition(".")
        if leaf != "weight" or not path or len(plan.sources[source].shape) != 2:
            continue
        rows = _rows(modules, plan, copies, path)
        owner = None if rows is None else rows.owner
        parent = None if rows is None else _parent(modules, path)
        if rows is None or owner is None or parent is None:
            continue
        projection = Projection(rows)
        projection.training = parent.training
        projection._is_hf_initialized = True
        owner.add_place(Place(projection=projection, parent=parent, attribute=path.rpartition(".")[2]))


def name_as_they_stand(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook of ``state_dict``: the tensors of a projection have the name of where it now is, as a linear layer's do."""
    for was, now in _moved(module):
        if prefix + was in state_dict:
            state_dict[prefix + now] = state_dict.pop(prefix + was)


def name_as_they_were(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of ``load_state_dict``: the same names back, to be found in the plan."""
    for was, now in _moved(module):
        if prefix + now in state_dict:
            state_dict[prefix + was] = state_dict.pop(prefix + now)


def _moved(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of tensors of projections that are inside another module now: the checkpoint's, and the current one."""
    for found, child in module.named_modules():
        path = without_wrappers(found)
        if isinstance(child, Projection) and path != child.rows.path:
            for leaf in ("weight", "bias"):
                yield f"{child.rows.path}.{leaf}", f"{path}.{leaf}"


def _rows(modules: dict[str, nn.Module], plan: Plan, copies: dict[str, list[Copy]], path: str) -> Rows | None:
    """Where the layer at ``path`` lies, weight and bias; None if no module can show it."""
    weight = _block(plan, copies[f"{path}.weight"])
    if weight is None:
        return None
    target, start, stop = weight
    owner_path, _, name = target.rpartition(".")
    owner = modules[owner_path]
    if not isinstance(owner, Fused) or name not in owner.BIASES:
        return None
    bias = owner.BIASES[name]
    has_bias = owner._parameters.get(bias) is not None
    if has_bias or f"{path}.bias" in copies:
        # Both or neither: a layer that shows only one of them would compute something else.
        expected = (f"{owner_path}.{bias}", start, stop)
        if not has_bias or _block(plan, copies.get(f"{path}.bias", [])) != expected:
            return None
    around = modules[_common(owner_path, path.rpartition(".")[0])]
    return Rows(
        owner=owner,
        around=around,
        path=path,
        weight=name,
        bias=bias if has_bias else None,
        start=start,
        stop=stop,
    )


def _block(plan: Plan, copies: list[Copy]) -> tuple[str, int, int] | None:
    """The parameter and its rows (entries, of a bias) that are exactly one source; None if it lies in no such block."""
    if len(copies) != 1:
        return None
    (copy,) = copies
    shape, target = plan.sources[copy.source].shape, plan.targets[copy.target]
    size = prod(shape[1:])
    is_run = copy.pair.numel == prod(shape) and copy.step().is_run  # pairs are merged, and ``is_run`` has no affine
    if not is_run or shape[1:] != target.shape[1:] or size == 0 or copy.pair.target_offset % size:
        return None
    start = copy.pair.target_offset // size
    return copy.target, start, start + shape[0]


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
