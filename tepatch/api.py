"""The functions people call: ``load``, ``build``, ``plan``.

Each goes the same way: find the patch, open the checkpoint (headers only), build the model on the meta device
with the patch's layers, make the plan. ``plan`` stops there; ``load`` and ``build`` execute it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tepatch.checkpoint import Checkpoint, open_checkpoint
from tepatch.errors import BackendError, PlanError, Problem
from tepatch.execute import load_tensors
from tepatch.hf.config import ConfigFields, model_class, read_config
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.model import (
    build_on_meta,
    finish_loading,
    install,
    refuse_what_is_gone,
    set_generation_config,
    target_specs,
)
from tepatch.mapping import Plan, make_plan, read_mapping
from tepatch.mapping.accounting import requirement_problems
from tepatch.patch import Patch
from tepatch.plugins import PluginHost, default_host
from tepatch.report import Report
from tepatch.te import BackendName, Modules, probe, use_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO: Final = "auto"


def load(
    patch: str | Patch,
    location: str | PathLike[str],
    *,
    dtype: torch.dtype | str = AUTO,
    device: torch.device | str | None = None,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    config: PreTrainedConfig | None = None,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    progress: bool | None = None,
    plugins: PluginHost | None = None,
) -> PreTrainedModel:
    """Load a Hugging Face checkpoint into its own model class, with the patch's layers in it.

    ``patch`` is a patch's name, ``"auto"`` (by ``config.model_type``), or a ``Patch``. ``location`` is a folder,
    a checkpoint file, or a hub id in the local cache (nothing is downloaded). ``dtype`` is the dtype of the
    parameters; ``"auto"`` takes the config's, as transformers does. ``device`` defaults to the GPU with
    Transformer Engine and to the CPU without. ``backend`` is ``"auto"``, ``"te"`` or ``"reference"``.
    ``mapping`` replaces the patch's mapping file by one of yours. ``variant``, ``subfolder``, ``revision`` and
    ``use_safetensors`` mean what they mean to ``from_pretrained``.

    Returns the model in evaluation mode; ``model.tepatch`` is the ``Report``. Before any weight is read, raises
    ``PluginError``, ``BackendError``, ``CheckpointError``, ``MappingError``, ``ReplaceError`` or ``PlanError``;
    while reading, ``CheckpointError`` or ``LoadError``. After an error no class stays patched and nothing is
    half-loaded.
    """
    checkpoint = open_checkpoint(
        location, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    config = _config(config, checkpoint)
    resolved = _find_patch(patch, config, plugins)
    with _prepare(resolved, config, checkpoint, dtype=dtype, backend=backend, mapping=mapping) as job:
        set_generation_config(job.model, checkpoint.config_folder)
        model = job.execute(device, progress=progress)
    finish_loading(model, str(location))
    return model


def build(
    patch: str | Patch,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = AUTO,
    device: torch.device | str | None = None,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    plugins: PluginHost | None = None,
) -> PreTrainedModel:
    """Make a patched model with fresh weights, initialised as Hugging Face initialises the same architecture.

    Every tensor of the stock model is drawn by the model class's own initialiser (same distributions and
    standard deviations; norms at one, biases at zero) and carried over by the mapping. Arguments and errors are
    those of ``load``. The model is in training mode, as Hugging Face's fresh models are.
    """
    resolved = _find_patch(patch, _config(config, None), plugins)
    with _prepare(resolved, config, None, dtype=dtype, backend=backend, mapping=mapping) as job:
        return job.execute(device, progress=False)


def plan(
    patch: str | Patch,
    location: str | PathLike[str],
    *,
    dtype: torch.dtype | str = AUTO,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    config: PreTrainedConfig | None = None,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    plugins: PluginHost | None = None,
) -> Plan:
    """What ``load`` would do, proven from headers alone: no weight is read and no memory for any is taken.

    Arguments are those of ``load``. Raises ``PlanError`` with every problem at once.
    """
    checkpoint = open_checkpoint(
        location, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    config = _config(config, checkpoint)
    resolved = _find_patch(patch, config, plugins)
    with _prepare(resolved, config, checkpoint, dtype=dtype, backend=backend, mapping=mapping) as job:
        return job.plan


@dataclass(kw_only=True)
class _Job:
    """A planned load: everything is settled, nothing is read."""

    patch: Patch
    model: PreTrainedModel
    modules: Modules
    plan: Plan
    checkpoint: Checkpoint
    replaced: str
    dtype: torch.dtype
    seconds: dict[str, float] = field(default_factory=dict)

    def execute(self, device: torch.device | str | None, *, progress: bool | None) -> PreTrainedModel:
        target = _device(device, self.modules.name == "te")
        if self.modules.name == "te" and target.type != "cuda":
            raise BackendError(
                Problem(
                    where=f"device={target}",
                    what="Transformer Engine computes on GPUs only",
                    fix="leave device out, or pass backend='reference'",
                )
            )
        if isinstance(self.checkpoint, FreshWeights):
            self.checkpoint.device = target
        tensors, timing = load_tensors(self.plan, self.checkpoint, device=target, progress=progress)
        install(self.model, self.plan, tensors, target)
        refuse_what_is_gone(self.model)
        report = Report(
            patch=self.patch.name,
            backend=self.modules.name,
            backend_note="" if self.modules.name == "te" else probe().reason,
            model_class=type(self.model).__name__,
            replaced=self.replaced,
            device=str(target),
            dtype=str(self.dtype).removeprefix("torch."),
            plan=self.plan,
            bytes_read=timing.bytes_read,
            seconds={**self.seconds, "load": timing.seconds},
            versions=_versions(),
        )
        self.model.tepatch = report  # type: ignore[assignment]
        return self.model


@contextmanager
def _prepare(
    patch: Patch,
    config: PreTrainedConfig,
    checkpoint: Checkpoint | None,
    *,
    dtype: torch.dtype | str,
    backend: BackendName,
    mapping: str | PathLike[str] | None,
) -> Iterator[_Job]:
    """Build on meta and plan, with the backend in force for as long as the block lasts.

    Without a checkpoint, fresh weights take its place.
    """
    wanted = _dtype(dtype, config, checkpoint)
    # A user's file is named as the user named it, so that file:line:column can be clicked.
    path = patch.mapping_path() if mapping is None else Path(mapping)
    rules = read_mapping(path, name=None if mapping is None else str(mapping))
    fields = ConfigFields(config)
    if problems := requirement_problems(rules, fields):
        where = checkpoint.location if checkpoint else "config"
        raise PlanError(problems, heading=f"{where}: the patch '{patch.name}' can not serve this model")
    cls = model_class(config)
    with use_backend(backend) as modules:
        started = time.perf_counter()
        if checkpoint is None:
            checkpoint = FreshWeights(build_on_meta(cls, config, dtype=wanted)[0], dtype=wanted)
        model, replaced = build_on_meta(cls, config, dtype=wanted, replacements=patch.replacements())
        built = time.perf_counter()
        targets, ties = target_specs(model, wanted)
        made = make_plan(
            rules,
            config=fields,
            sources=checkpoint.tensors,
            targets=targets,
            ties=ties,
            patch=patch.name,
            location=checkpoint.location,
            notes=tuple(f"{name} is also in the folder and was not read" for name in checkpoint.also_present),
        )
        yield _Job(
            patch=patch,
            model=model,
            modules=modules,
            plan=made,
            checkpoint=checkpoint,
            replaced=str(replaced),
            dtype=wanted,
            seconds={"build": built - started, "plan": time.perf_counter() - built},
        )


def _config(config: Any, checkpoint: Checkpoint | None) -> PreTrainedConfig:
    """The config that was passed, or else the checkpoint's own."""
    from transformers import PreTrainedConfig

    if config is None and checkpoint is not None:
        return read_config(checkpoint.config_folder)
    if not isinstance(config, PreTrainedConfig):
        raise PlanError(
            Problem(
                where="config",
                what="not a config of transformers",
                expected="a PreTrainedConfig, such as LlamaConfig(...) or AutoConfig.from_pretrained(...)",
                found=type(config).__name__,
            )
        )
    return config


def _find_patch(patch: str | Patch, config: PreTrainedConfig, plugins: PluginHost | None) -> Patch:
    if not isinstance(patch, Patch):
        host = plugins if plugins is not None else default_host()
        if patch == AUTO:
            return host.patch_for_model_type(config.model_type)
        patch = host.patch(patch)
    if patch.model_types and config.model_type not in patch.model_types:
        # Look-alikes load without an error and compute something else (a window, a scale, a norm).
        raise PlanError(
            Problem(
                where="config.model_type",
                what=f"the patch '{patch.name}' is not made for models of this type",
                expected=" or ".join(patch.model_types),
                found=config.model_type,
                fix="use the patch for this type (tepatch plugins lists them), or 'auto'",
            )
        )
    return patch


def _dtype(dtype: torch.dtype | str, config: PreTrainedConfig, checkpoint: Checkpoint | None = None) -> torch.dtype:
    """The parameters' dtype; "auto" is the config's, else that of the checkpoint's first floating tensor."""
    from tepatch.checkpoint import torch_dtype

    if isinstance(dtype, str) and dtype == AUTO:
        stated: Any = config.dtype
        if stated is None and checkpoint is not None:
            found = (torch_dtype(info.dtype) for info in checkpoint.tensors.values())
            stated = next((each for each in found if each is not None and each.is_floating_point), None)
        dtype = stated if stated is not None else torch.float32
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in _FLOATS:
        raise PlanError(
            Problem(
                where="dtype",
                what=f"parameters can not be held in '{dtype}'",
                expected=", ".join(str(each).removeprefix("torch.") for each in _FLOATS) + " or 'auto'",
            )
        )
    return chosen


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _device(device: torch.device | str | None, is_te: bool) -> torch.device:
    if device is None:
        device = "cuda" if is_te else "cpu"
    try:
        out = torch.device(device)
        if out.type == "cuda" and out.index is None:
            out = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=out).item()  # a device may exist and still hold no values
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise BackendError(
            Problem(
                where=f"device={device}",
                what="this device can not be used",
                found=str(error).splitlines()[0],
                fix="pass a device that torch has here, or leave device out",
            )
        ) from None
    return out


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import transformers

    out = {"tepatch": version("tepatch"), "torch": torch.__version__, "transformers": transformers.__version__}
    status = probe()
    return {**out, "transformer-engine": status.version} if status.version else out
