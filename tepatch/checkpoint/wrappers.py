"""Names of tensors as they are without the wrappers that a model had around its modules when it was saved.

``torch.compile``, DDP, FSDP, activation checkpointing and others put a module around a module, and a part into the
names of all tensors below it. transformers finds no tensor under such a name, and neither would a mapping. So only who
reads the file knows them: everywhere else a name is without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tepatch.checkpoint.interface import TensorInfo
from tepatch.checkpoint.listing import counted, shortened
from tepatch.errors import CheckpointError, Problem

# torch.compile; FSDP; checkpointing; DDP, DataParallel and DeepSpeed, with _ Opacus; FSDP before torch 1.13; Lightning.
_PART = re.compile(r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_?module|_fpw_module|_forward_module")
_PEFT = "base_model.model"
"""Where PEFT keeps the model: before all names, or before none."""
_PEFT_LAYER = "base_layer"
"""Where it keeps a layer that has an adapter."""


def unwrapped_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each of a checkpoint's names with the one that it has without wrappers, and what was taken out.

    The last part of a name is a parameter's, and always stays.
    """
    out: dict[str, str] = {}
    taken: dict[str, None] = {}
    for name in names:
        *path, leaf = name.split(".")
        found = {part for part in path if _PART.fullmatch(part)}
        out[name] = ".".join((*(part for part in path if part not in found), leaf)) if found else name
        taken |= dict.fromkeys(sorted(found))
    while out and all(name.startswith(f"{_PEFT}.") for name in out.values()):
        out = {name: short[len(_PEFT) + 1 :] for name, short in out.items()}
        taken[_PEFT] = None
    return out, tuple(taken)


def unwrapped(tensors: Mapping[str, TensorInfo], where: str) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """A checkpoint's tensors by their names without wrappers, and what was taken out of names.

    Raises ``CheckpointError`` if two tensors have one name then, and for layers that adapters are around.
    """
    names, taken = unwrapped_names(tensors)
    if layers := [name for name in tensors if f".{_PEFT_LAYER}." in name]:
        raise CheckpointError(
            Problem(
                where=where,
                what=f"{counted(len(layers))} of layers that adapters of PEFT are around: this is no model by itself",
                details=shortened(layers),
                fix="save the model with its adapters merged (model.merge_and_unload().save_pretrained(...)), or save "
                "the model and the adapter apart",
            )
        )
    out: dict[str, TensorInfo] = {}
    twice: list[str] = []
    for name, info in tensors.items():
        short = names[name]
        if short in out:
            twice.append(f"{out[short].in_file} and {name}")
        out[short] = info if short == name else replace(info, name=short, in_file=name)
    if twice:
        raise CheckpointError(
            Problem(
                where=where,
                what=f"{counted(len(twice))} twice, but for wrappers around modules ({', '.join(taken)})",
                details=shortened(twice),
                fix="save the model again: nothing tells which values are right",
            )
        )
    return out, taken
