"""Making models: ``load``, ``build`` and ``plan``.

Each goes the same way: find the patch, open the checkpoint (headers only), build the model on the meta device
with the patch's layers, make the plan. ``plan`` stops there; ``load`` and ``build`` execute it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch

from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.dtypes import torch_dtype
from tepatch.errors import BackendError, PlanError, Problem
from tepatch.hf.config import AutoClass, unknown_architectures
from tepatch.hf.current_gpu import follow_weights
from tepatch.hf.digests import promised
from tepatch.hf.model import add_hooks, check_outputs, finish_loading, install, set_generation_config
from tepatch.hf.model_plan import ATTRIBUTE
from tepatch.hf.names import keep_renamings
from tepatch.hf.placement import DeviceMap, MaxMemory, Placement, check_device, placement_for
from tepatch.hf.prepare import AUTO, Prepared, Source, opened, prepare
from tepatch.hf.sharding import Parallelize, check_mesh, shard
from tepatch.hf.stand_ins import install_stand_ins
from tepatch.hf.state import attach
from tepatch.patch import Patch
from tepatch.planning import Plan
from tepatch.plugins import PluginHost
from tepatch.proof import ensure_proven
from tepatch.proven import installed_versions
from tepatch.report import Report
from tepatch.te import BackendName, probe
from tepatch.te.layer import apply_precision
from tepatch.te.nvidia.precision import read_precision
from tepatch.te.nvidia.quantized import QUANTIZED, QuantizedWeights, quantized_weights
from tepatch.transfer.fill import Destination, load_tensors
from tepatch.transfer.reader import Tensors, on_cpu_by_default
from tepatch.transfer.settings import Reading
from tepatch.transfer.shards import Cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Weights = Literal["plain", "quantized"]
"""How the layers hold their weights: in the parameters' dtype, or quantized only."""
CHECKED_AT_ONCE = 2
"""Threads that compare digests, each with a tensor in memory and what it is made of."""


@on_cpu_by_default
def load(
    patch: str | Patch,
    location: Source,
    *,
    dtype: torch.dtype | str = AUTO,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | PathLike[str] | None = None,
    backend: BackendName = AUTO,
    precision: Any = None,
    weights: Weights = "plain",
    keep_initial: bool = False,
    mapping: str | PathLike[str] | None = None,
    config: PreTrainedConfig | None = None,
    auto_class: AutoClass = None,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    parallelize: Parallelize | None = None,
    reading: Reading | None = None,
    check_digests: bool = False,
    prove: bool | None = None,
    progress: bool | None = None,
    plugins: PluginHost | None = None,
) -> PreTrainedModel:
    """Load a Hugging Face checkpoint into its own model class, with the patch's layers in it.

    ``patch`` is a patch's name, ``"auto"`` (by ``config.model_type``), or a ``Patch``. ``location`` is a folder,
    a checkpoint file, a hub id in the local cache (nothing is downloaded), or what ``open_checkpoint`` of
    ``tepatch.checkpoint`` gave for one. ``dtype`` is the dtype of the
    parameters; ``"auto"`` takes the config's, as transformers does. ``device`` defaults to the GPU with
    Transformer Engine and to the CPU without. ``device_map``, ``max_memory`` and ``offload_folder`` (for what is on
    "disk"; new or empty) mean what they mean to ``from_pretrained``; with Transformer Engine, modules on "cpu" and
    "disk" keep their weights there and compute on the first GPU of the map. ``backend`` is ``"auto"``, ``"te"`` or
    ``"reference"``. ``precision`` is what the layers compute their matrix products in (see ``set_precision``);
    None leaves it to the ``te.autocast`` around the model. ``weights="quantized"`` holds the layers' weights in that
    precision only, a byte for each number: for inference, or with ``keep_initial`` for training, which keeps what they
    were quantized from on the CPU (``parameter.get_high_precision_init_val()``) for an optimizer's master weights; what
    such a model saves are dequantized numbers. ``mapping`` replaces the patch's mapping file by one of
    yours. ``auto_class`` is the class to build, one of transformers' auto classes or a model class, or the name of
    either ("AutoModelForSequenceClassification"); None reads ``config.architectures``. ``fresh`` are tensors that the
    checkpoint does not have and that are drawn as transformers draws them, by the stock model's names or the modules
    that they are in; ``drop`` are tensors of the checkpoint that are left out. ``variant``, ``subfolder``,
    ``revision`` and ``use_safetensors`` mean what they mean to ``from_pretrained``. ``parallelize`` shards the model
    over several processes: it is called with the model on the meta device, before a weight is read, and of the
    parameters that it makes DTensors (``fully_shard``, ``parallelize_module``) each process reads its own slices.
    ``reading`` says how files are read (``tepatch.Reading``: threads, sizes, or a library that does it); None chooses
    for this machine. ``check_digests`` holds a converted checkpoint against the digests of its original first: one more
    pass over its bytes, on the CPU. Where the plugin does not say that the patch was proven with the versions of
    transformers, torch, Transformer Engine, PEFT and accelerate that are installed, a small model of this config is
    compared with transformers' own first, once (some seconds); with ``prove`` False, or ``TEPATCH_PROVE=0`` in the
    environment, it is not, and the report says so.

    Returns the model in evaluation mode; ``model.tepatch`` is the ``Report``. Before any weight is read, raises
    ``PluginError``, ``BackendError``, ``CheckpointError``, ``MappingError``, ``ReplaceError``, ``PlanError``,
    ``ProofError``, or ``UnsupportedError`` for settings that ask every call for attention weights; while reading,
    ``CheckpointError`` or ``LoadError``. After an error no class stays patched and
    nothing is half-loaded.
    """
    request = read_precision(precision)
    if reading is not None and not isinstance(reading, Reading):
        raise PlanError(
            Problem(
                where="reading",
                what="does not say how files are read",
                expected="tepatch.Reading(threads=4), or None",
                found=repr(reading),
            )
        )
    if reading is not None:
        reading.refuse_unused()
    checkpoint = opened(
        location, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    job = prepare(
        patch,
        checkpoint,
        config=config,
        dtype=dtype,
        backend=backend,
        mapping=mapping,
        auto_class=auto_class,
        fresh=fresh,
        drop=drop,
        plugins=plugins,
    )
    told = _checked(job) if check_digests else ()
    set_generation_config(job.model, job.checkpoint.config_folder)
    check_outputs(job.model)
    proof = (*told, *_proof(job, prove))
    text = "" if precision is None else apply_precision(job.model, request)
    quantized = quantized_weights(job.model, weights, keep_initial=keep_initial)
    dtypes = {name: torch_dtype(entry.dtype) for name, entry in job.reading.targets.items()}
    placement = placement_for(
        job.model,
        {name: dtype for name, dtype in dtypes.items() if dtype is not None},
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        needs_gpu=job.modules.name == "te",
    )
    if quantized is not None and placement is not None and (away := placement.off_gpu(quantized.names)):
        raise PlanError(
            Problem(
                where="weights",
                what=f"{len(away)} weights to be held quantized are not placed on a GPU",
                details=tuple(away[:8]),
                fix="place the layers on GPUs, or leave out weights='quantized'",
            )
        )
    shards: Mapping[str, Sequence[Cut]] = {}
    if parallelize is not None:
        _check_alone({"device_map": device_map is not None, "weights='quantized'": weights == QUANTIZED})
        shards = shard(job.model, parallelize)
    try:
        model = _execute(
            job,
            device,
            placement,
            precision=text,
            quantized=quantized,
            shards=shards,
            reading=reading,
            progress=progress,
            notes=proof,
        )
    except BaseException:
        if placement is not None:
            placement.discard()
        raise
    finish_loading(model, checkpoint.location if location is checkpoint else str(location))
    return model


@on_cpu_by_default
def build(
    patch: str | Patch,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = AUTO,
    device: torch.device | str | None = None,
    backend: BackendName = AUTO,
    precision: Any = None,
    mapping: str | PathLike[str] | None = None,
    auto_class: AutoClass = None,
    prove: bool | None = None,
    plugins: PluginHost | None = None,
) -> PreTrainedModel:
    """Make a patched model with fresh weights, initialised as Hugging Face initialises the same architecture.

    Every tensor of the stock model is drawn by the model class's own initialiser (same distributions and
    standard deviations; norms at one, biases at zero) and carried over by the mapping. Arguments and errors are
    those of ``load``. The model is in training mode, as Hugging Face's fresh models are.
    """
    request = read_precision(precision)
    job = prepare(
        patch,
        None,
        config=config,
        dtype=dtype,
        backend=backend,
        mapping=mapping,
        auto_class=auto_class,
        plugins=plugins,
    )
    check_outputs(job.model)
    text = "" if precision is None else apply_precision(job.model, request)
    proof = _proof(job, prove)
    return _execute(
        job, device, None, precision=text, quantized=None, shards={}, reading=None, progress=False, notes=proof
    )


def plan(
    patch: str | Patch,
    location: Source,
    *,
    dtype: torch.dtype | str = AUTO,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    config: PreTrainedConfig | None = None,
    auto_class: AutoClass = None,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    use_safetensors: bool | None = None,
    plugins: PluginHost | None = None,
) -> Plan:
    """What ``load`` would do, proven from headers alone: no weight is read and no memory for any is taken.

    Arguments are those of ``load``. Raises ``PlanError`` with every problem at once.
    """
    checkpoint = opened(
        location, variant=variant, subfolder=subfolder, revision=revision, use_safetensors=use_safetensors
    )
    job = prepare(
        patch,
        checkpoint,
        config=config,
        dtype=dtype,
        backend=backend,
        mapping=mapping,
        auto_class=auto_class,
        fresh=fresh,
        drop=drop,
        plugins=plugins,
    )
    check_outputs(job.model)
    return job.reading


def _proof(job: Prepared, prove: bool | None) -> tuple[str, ...]:
    """What there is to say about how the patch was proven here."""
    if prove is not None and not isinstance(prove, bool):
        raise PlanError(
            Problem(where="prove", what="is a yes or a no", expected="True, False or None", found=repr(prove))
        )
    return ensure_proven(job.patch, job.config, type(job.model), is_wrapped=job.plan.is_wrapped, prove=prove)


def _checked(job: Prepared) -> tuple[str, ...]:
    """Hold what a converted checkpoint gives back against its original's digests; what there is to say about it."""
    if (promise := promised(job)) is None:
        raise PlanError(
            Problem(
                where="check_digests",
                what="there are digests in the manifest of a converted checkpoint only",
                found=f"{job.checkpoint.location} has none",
                fix="leave check_digests out; tepatch certify compares other checkpoints",
            )
        )
    assert isinstance(job.checkpoint, FolderCheckpoint)  # a converted one is never completed
    with Tensors(job.checkpoint) as tensors:
        promise.refuse(promise.differing(list(promise.digests), tensors.read, workers=CHECKED_AT_ONCE))
    return promise.notes


def _check_alone(beside: Mapping[str, bool]) -> None:
    if not_with := [name for name, is_there in beside.items() if is_there]:
        raise PlanError(
            Problem(
                where=", ".join(not_with),
                what="can not be had together with parallelize",
                fix="leave one of them out; FP8 for sharded models is precision='fp8-current'",
            )
        )


def _execute(
    job: Prepared,
    device: torch.device | str | None,
    placement: Placement | None,
    *,
    precision: str,
    quantized: QuantizedWeights | None,
    shards: Mapping[str, Sequence[Cut]],
    reading: Reading | None,
    progress: bool | None,
    notes: tuple[str, ...],
) -> PreTrainedModel:
    is_te = job.modules.name == "te"
    default = "cuda" if is_te else "cpu"
    target = check_device(default if device is None else device) if placement is None else placement.main
    if is_te and target.type != "cuda":
        raise BackendError(
            Problem(
                where=f"device={target}",
                what="Transformer Engine computes on GPUs only",
                fix="leave device out, or pass backend='reference'",
            )
        )
    check_mesh(job.model, target)
    if job.fresh is not None:
        job.fresh.device = target
    to = Destination(
        device=target,
        allocate=None if placement is None else placement.allocate,
        shards=shards,
        seals={name: partial(quantized.seal, name) for name in quantized.names} if quantized is not None else {},
    )

    def complete() -> None:
        """What needs no numbers: there is time for it while they are read."""
        add_hooks(job.model)
        attach(job.model)
        install_stand_ins(job.model, job.plan.relation)
        if is_te:
            follow_weights(job.model)

    tensors, timing = load_tensors(
        job.reading, job.checkpoint, to=to, reading=reading, progress=progress, meanwhile=complete
    )
    started = time.perf_counter()
    install(job.model, job.reading, tensors, target)
    if quantized is not None:
        quantized.attach_initial(job.model)
    installed = time.perf_counter() - started
    if job.checkpoint is not job.fresh:
        keep_renamings(job.model, job.relation.sources)
    setattr(job.model, ATTRIBUTE, job.plan)
    job.model.tepatch = Report(  # type: ignore[assignment]
        patch=job.patch.name,
        backend=job.modules.name,
        backend_note="" if is_te else probe().reason,
        model_class=type(job.model).__name__,
        replaced=job.replaced,
        device=str(target) if placement is None else ", ".join(placement.devices),
        dtype=str(job.dtype).removeprefix("torch."),
        precision=precision,
        plan=job.plan.relation,
        layout=job.layout,
        config_folder=None if job.checkpoint is job.fresh else str(job.checkpoint.config_folder.absolute()),
        bytes_read=timing.bytes_read,
        seconds={**job.seconds, "load": timing.seconds, **timing.stages, "install": installed},
        notes=(
            *notes,
            *unknown_architectures(job.model.config, type(job.model)),
            *timing.notes,
            *([] if quantized is None else [f"{quantized}; saving writes what they dequantize to"]),
        ),
        versions=installed_versions(),
    )
    if placement is not None:
        placement.dispatch(job.model)
    return job.model
