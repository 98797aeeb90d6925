"""Building a Hugging Face model on the meta device with other layers in it, and giving it its weights.

The one place that touches the insides of transformers' models. Nothing global is changed: the meta device is a
context of this thread, the layer classes are replaced for this context only, and the default dtype stays what
it is (parameters get their dtype when they get their memory).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tepatch.dtypes import dtype_code
from tepatch.errors import CheckpointError, LoadError, PlanError, Problem, TepatchError, UnsupportedError
from tepatch.hf import attention
from tepatch.hf.config import asks_to_run_code, code_refused, told
from tepatch.hf.named import named_tensors, without_wrappers
from tepatch.hf.names import memory_names
from tepatch.hf.sharding import like_sharded
from tepatch.hf.texts import read_config_text
from tepatch.planning.plan import Plan, Spec, TensorSpec
from tepatch.replace import Replacement, replace_layers
from tepatch.te.layer import AcceleratedLayer
from tepatch.te.tracing import refuse_to_be_recorded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXTRA_STATE = "_extra_state"
"""Transformer Engine's per-module FP8 state: never a weight, never in a checkpoint."""


def build_on_meta(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    replacements: Mapping[type, type] | None = None,
    ignores: Mapping[str, str] = MappingProxyType({}),
) -> tuple[PreTrainedModel, Replacement | None]:
    """A ``cls`` on the meta device, with layers replaced; parameters have names and shapes only.

    The model gets its own copy of ``config``. ``ignores`` is as in ``Patch``. Raises ``ReplaceError`` if a replacement
    does not take what its class takes, or was never used, and ``PlanError`` if no model can be made from the config.
    """
    if (module := nn.Module.register_parameter.__module__) != nn.Module.__module__:
        raise PlanError(
            Problem(
                where=module,
                what="a block around this call has exchanged how modules take parameters: tied ones would be two",
                expected="torch's own nn.Module.register_parameter",
                fix="call it outside of the block (accelerate's init_empty_weights); no memory is taken for weights "
                "before they are read",
            )
        )
    config = copy.deepcopy(config)
    config.dtype = dtype
    config._attn_implementation = attention.NAME
    report: Replacement | None = None
    try:
        with torch.device("meta"), code_refused(), ExitStack() as stack:
            if replacements:
                report = stack.enter_context(replace_layers(replacements, ignores=ignores))
            model = cls(config)
            attention.mark_eager(model)
    except TepatchError:
        raise
    except Exception as error:  # whatever a constructor does with sizes and names that make no sense
        if asks_to_run_code(error):
            raise CheckpointError(
                Problem(
                    where="config",
                    what=f"a part of {cls.__name__} asks to run code of the checkpoint, and tepatch never runs any",
                    expected="parts of a model that transformers has classes for",
                    found="an 'auto_map' inside the config",
                    fix="take the 'auto_map' out of the part's config, and correct its model_type",
                )
            ) from error
        raise PlanError(
            Problem(
                where="config",
                what=f"no {cls.__name__} can be built from this config",
                details=told(error),
                fix="check the config's fields (config.json): sizes, names of activations and rope types",
            )
        ) from error
    return model, report


def target_specs(model: PreTrainedModel, dtype: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, str]]:
    """What a checkpoint has to fill: parameters and persistent buffers by name, and which names are tied.

    Floating-point parameters take ``dtype``, except those that the model class keeps in float32 by these names: which
    of a patched model's these are, only a plan can say (``keep_in_float32``). Without a ``dtype`` each has its own.
    """
    stays = _stays_in_float32(model, dtype)
    specs: dict[str, Spec] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    owner_of = _owners(model)
    for name, tensor in named_tensors(model).items():
        owner, leaf = owner_of(name)
        if leaf in owner._non_persistent_buffers_set:
            continue
        if (known := first.setdefault(id(tensor), name)) != name:
            ties[name] = known
            continue
        kept = tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            kept = torch.float32 if stays is not None and stays.search(name) else dtype
        code = dtype_code(kept)
        if code is None:
            raise LoadError(Problem(where=name, what=f"a checkpoint can not hold {kept}"))
        specs[name] = Spec(tuple(tensor.shape), code)
    return specs, ties


def stock_specs(cls: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[dict[str, Spec], dict[str, str]]:
    """``target_specs`` of the stock model of this class and config, each tensor in float32."""
    return target_specs(build_on_meta(cls, config, dtype=torch.float32)[0], None)


def keep_in_float32(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], plan: Plan, dtype: torch.dtype
) -> Mapping[str, TensorSpec]:
    """``specs`` of a patched model, loaded in ``dtype``, with those in float32 that the stock class keeps so.

    Classes say it by names of the stock model, which the sources of ``plan`` have or are renamed to. Raises
    ``PlanError`` where that is a part of a parameter, or is in a module of the backend, which computes in one dtype.
    """
    stays = _stays_in_float32(model, dtype)
    if stays is None:
        return specs
    names = memory_names(model, plan.sources)
    sources: dict[str, set[str]] = {}
    for each in plan.copies:
        sources.setdefault(each.target, set()).add(each.source)
    owner_of, code, out, problems = _owners(model), dtype_code(dtype), dict(specs), []
    for target, given in sources.items():
        if specs[target].dtype not in (code, "F32"):
            continue
        kept = sorted(name for name in given if stays.search(names[name]))
        out[target] = Spec(specs[target].shape, "F32" if kept else str(code))
        is_fused = type(owner_of(target)[0]).__module__.startswith(("tepatch.te.", "transformer_engine."))
        if kept and (is_fused or len(kept) < len(given)):
            problems.append(
                Problem(
                    where=target,
                    what=f"{type(model).__name__} keeps tensors in float32 that are here in the layer's dtype",
                    details=tuple(kept[:8]),
                    expected="float32",
                    found=str(dtype).removeprefix("torch."),
                    fix="load the model with dtype='float32', or with transformers",
                )
            )
    if problems:
        raise PlanError(problems)
    return out


def _stays_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """What transformers searches for in a parameter's name to load it in float32 where all is loaded in ``dtype``."""
    parts: list[str] = []
    if dtype == torch.float16:
        parts += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        parts += model._keep_in_fp32_modules_strict or ()
    return re.compile("|".join(part.replace("*", ".*") for part in parts)) if parts else None


def install(model: PreTrainedModel, plan: Plan, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give a meta model its tensors, tie what is tied, and compute the buffers that no checkpoint holds.

    Afterwards nothing of the model is on the meta device; anything else is a ``LoadError``.
    """
    owner_of = _owners(model)
    for name, tensor in tensors.items():
        owner, leaf = owner_of(name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            meta = owner._parameters[leaf]
            assert meta is not None
            owner._parameters[leaf] = nn.Parameter(like_sharded(tensor, meta), requires_grad=meta.requires_grad)
    for name, entry in plan.targets.items():
        if entry.state == "tied":
            owner, leaf = owner_of(name)
            first, first_leaf = owner_of(entry.tied_to)
            owner._parameters[leaf] = first._parameters[first_leaf]
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if not buffer.is_meta)):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # its initialiser leaves such tensors alone
    compute_buffers(model, device)
    left = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if left:
        raise LoadError(Problem(where="", what="tensors without values after loading", details=tuple(left[:10])))
    for module in model.modules():
        # So that no later call of Hugging Face's initialiser touches a loaded weight: it sets every class
        # with "LayerNorm" in its name to ones, and LayerNormLinear.weight is the fused QKV.
        module._is_hf_initialized = True  # type: ignore[assignment]


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give every non-persistent buffer its value, by Hugging Face's own initialiser.

    Raises ``LoadError`` naming a buffer that the initialiser does not know.
    """
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        for name in names:
            meta = module._buffers[name]
            assert meta is not None
            module._buffers[name] = poisoned(meta, torch.device("cpu"))
        with torch.no_grad():
            initializer_of(model, path)._init_weights(module)  # type: ignore[no-untyped-call]
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            if is_poisoned(buffer):
                raise LoadError(
                    Problem(
                        where=f"{path}.{name}",
                        what=f"{type(model).__name__} does not know how to compute this buffer",
                        fix="report this to the plugin's author: the buffer must be persistent or initialised",
                    )
                )
            module._buffers[name] = buffer.to(device)


def initializer_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model whose initialiser is for the module at ``path``: the innermost of the models around it."""
    from transformers import PreTrainedModel

    found, module = model, cast("nn.Module", model)
    for part in path.split(".") if path else ():
        module = module.get_submodule(part)
        if isinstance(module, PreTrainedModel):
            found = module
    return found


def poisoned(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor shaped like ``like`` that ``is_poisoned`` recognises until every element has been set."""
    out = torch.empty_like(like, device=device)
    if out.is_floating_point() or out.is_complex():
        return out.fill_(float("nan"))
    return out.fill_(torch.iinfo(out.dtype).min) if out.dtype != torch.bool else out.zero_()


def is_poisoned(tensor: torch.Tensor) -> bool:
    """Whether any element still is as ``poisoned`` left it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(torch.isnan(tensor).any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())


def add_hooks(model: PreTrainedModel) -> None:
    """Make the model refuse what replaced layers can not give, and wait for nothing that needs no waiting for."""
    for module in model.modules():
        if _records_outputs(module):
            module.register_forward_pre_hook(refuse_attentions, with_kwargs=True)
            lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
            if any(isinstance(layer, AcceleratedLayer) for child in lists for layer in child):  # it runs them itself
                module.register_forward_pre_hook(attention.spare_the_question, with_kwargs=True)


def finish_loading(model: PreTrainedModel, location: str) -> None:
    """What ``from_pretrained`` does after the weights: evaluation mode and names."""
    model.eval()  # type: ignore[no-untyped-call]
    model.config.name_or_path = location
    model.name_or_path = location


def set_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the checkpoint's own generation settings, as ``from_pretrained`` finds them.

    A ``generation_config.json`` that is there and can not be read is a ``CheckpointError``: transformers would go
    on with other settings.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    path = folder / "generation_config.json"
    try:
        if os.path.lexists(path):
            read_config_text(folder, path.name)
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        elif (folder / "config.json").is_file():
            settings = GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
            )
        else:  # a config that the user passed: the model has made its settings from it already
            return
    except TepatchError:
        raise
    except Exception as error:  # transformers raises errors of many types for values that it can not use
        raise CheckpointError(
            Problem(
                where=str(path),
                what="transformers can not read these generation settings",
                details=told(error),
                fix="correct the file, or remove it to go on with the config's own settings",
            )
        ) from error
    model.generation_config = settings


def check_outputs(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedError`` if the model's settings ask every call for what no layer gives."""
    configs = {id(module.config): module.config for module in model.modules() if _records_outputs(module)}
    asking = "config.json" if any(getattr(each, "output_attentions", False) for each in configs.values()) else ""
    if model.can_generate() and getattr(model.generation_config, "output_attentions", False):
        asking = asking or "generation_config.json"
    if asking:
        raise UnsupportedError(
            Problem(
                where=asking,
                what="output_attentions: true asks every call for attention weights, and fused layers have none",
                fix=f"take output_attentions out of it, or pass a config without it; {_STOCK_ATTENTIONS}",
            )
        )


_STOCK_ATTENTIONS = (
    "to look at attention weights, load the model with transformers: from_pretrained(..., attn_implementation='eager')"
)


def _records_outputs(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "_can_record_outputs")


def refuse_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fused attention has no attention weights to give: say so instead of returning an empty tuple."""
    refuse_to_be_recorded()
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(module.config, "output_attentions", False)):
        raise UnsupportedError(
            Problem(
                where="output_attentions",
                what="attention weights do not exist in fused attention layers",
                fix=_STOCK_ATTENTIONS,
            )
        )


def _owners(model: nn.Module) -> Callable[[str], tuple[nn.Module, str]]:
    """From a tensor's name to its module and its name there, for a model whose modules stay as they are."""
    modules = {without_wrappers(path): module for path, module in model.named_modules(remove_duplicate=False)}

    def owner(name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return modules[path], leaf

    return owner
