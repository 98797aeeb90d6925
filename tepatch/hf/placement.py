"""Where the parameters of a model go when it is loaded over several devices.

A device map says for each module "a GPU", "cpu" or "disk", as in ``from_pretrained``. accelerate computes it, and its
hooks move what is needed where it is needed. Ours is what comes before: each tensor is filled where it will stay (a
tensor for the disk is a file of the offload folder, mapped into memory, from the start).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from tepatch.errors import BackendError, LoadError, PlanError, Problem, first_line
from tepatch.hf.config import told
from tepatch.hf.named import named_tensors
from tepatch.hf.translate import patched_names
from tepatch.mapping.names import fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]
"""What ``from_pretrained`` takes: a strategy, one device, or a device for each module."""
MaxMemory = Mapping[int | str, int | str]
"""Bytes (or a text such as "10GB") by GPU number and "cpu"."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
CPU: Final = "cpu"
DISK: Final = "disk"
_INDEX: Final = "index.json"
_NUMPY = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""The names of dtypes in accelerate's index of an offload folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A device map that has been checked against the model."""

    device_map: Mapping[str, int | str]
    """A GPU's number or a device's name, "cpu" or "disk", by module: every parameter is in one of them."""
    main: torch.device
    """Where modules compute whose parameters are on the CPU or the disk, and where inputs belong."""
    folder: Path | None
    """For what is on the disk."""

    @property
    def is_dispatched(self) -> bool:
        """Whether the model needs hooks: it is not all in one place."""
        places = set(self.device_map.values())
        return len(places) > 1 or DISK in places

    @property
    def devices(self) -> tuple[str, ...]:
        """The places in the map's order, as text."""
        places = dict.fromkeys(self.device_map.values())
        return tuple(DISK if place == DISK else str(_device(place)) for place in places)

    def off_gpu(self, names: Iterable[str]) -> list[str]:
        """Those of these parameters that will not be on a GPU."""
        places = {name: _place_of(self.device_map, name) for name in names}
        away = {name for name, place in places.items() if place is not None and _is_off_gpu(place)}
        return [name for name in places if name in away]

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """New memory for a parameter, where it will stay."""
        place = _place_of(self.device_map, name)
        if place != DISK or self.folder is None:
            return torch.empty(shape, dtype=dtype, device=self.main if place is None else _device(place))
        path = self.folder / f"{name}.dat"  # accelerate looks for this name
        _reserve(path, prod(shape) * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)

    def dispatch(self, model: PreTrainedModel) -> None:
        """Put accelerate's hooks on a loaded model, as ``from_pretrained`` does: none where all is in one place."""
        if not self.is_dispatched:
            return
        from accelerate import dispatch_model  # type: ignore[import-untyped]

        if self.folder is not None:
            held = named_tensors(model)
            away = {name: held[name] for name in held if _place_of(self.device_map, name) == DISK}
            index = {name: {"dtype": _NUMPY[t.dtype], "shape": list(t.shape)} for name, t in away.items()}
            first: dict[int, str] = {}
            for name, tensor in away.items():
                if (known := first.setdefault(id(tensor), name)) != name:  # tied: each name has a file of its own
                    shutil.copyfile(self.folder / f"{known}.dat", self.folder / f"{name}.dat")
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2))
        with patched_names():  # the hooks look for the parameters' own names
            dispatch_model(
                model,
                device_map=dict(self.device_map),
                main_device=_key(self.main),
                offload_dir=self.folder,
                skip_keys=model._skip_keys_device_placement,
            )

    def discard(self) -> None:
        """After a load that failed: leave the folder as it was found."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
            self.folder.mkdir()


def place(
    model: PreTrainedModel,
    dtypes: Mapping[str, torch.dtype],
    device_map: DeviceMap,
    *,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
    needs_gpu: bool,
) -> Placement:
    """Decide where the parameters of a model on the meta device go. ``dtypes`` are those that they will have.

    ``needs_gpu`` says that its layers compute on CUDA only: then "cpu" and "disk" are places to keep weights, and at
    least one entry is a GPU. Raises ``PlanError`` for a map that does not fit the model or needs what is not there
    (accelerate, an offload folder), and ``BackendError`` for a device that is not there.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise _wrong("a device map needs accelerate", fix="pip install accelerate, or pass device=... instead")
    if isinstance(device_map, str) and device_map in STRATEGIES:
        places = _computed(model, dtypes, device_map, max_memory)
    else:
        if max_memory is not None:
            raise _wrong(
                "max_memory has no meaning beside a device map that says where each module goes",
                fix=f"leave one of the two out, or pass device_map as one of {', '.join(STRATEGIES)}",
            )
        places = _given(device_map)
        _check_names(model, places)
    for device in dict.fromkeys(_device(each) for each in places.values() if each != DISK):
        check_device(device)
    main = next((each for each in places.values() if each not in (CPU, DISK)), CPU)
    if needs_gpu and _device(main).type != "cuda":
        raise BackendError(
            Problem(
                where="device_map",
                what="Transformer Engine computes on GPUs only, and the map names none to compute on",
                found=", ".join(dict.fromkeys(map(str, places.values()))),
                fix="give at least one module a GPU (the others may stay on 'cpu'), or pass backend='reference'",
            )
        )
    return Placement(device_map=places, main=_device(main), folder=_folder(places, dtypes, offload_folder))


def placement_for(
    model: PreTrainedModel,
    dtypes: Mapping[str, torch.dtype],
    *,
    device: torch.device | str | None,
    device_map: DeviceMap | None,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
    needs_gpu: bool,
) -> Placement | None:
    """``place``, if the caller says more than a device. Raises ``PlanError`` for arguments that do not go together."""
    if device_map is not None and device is not None:
        raise PlanError(
            Problem(
                where="device, device_map",
                what="both say where the model goes",
                found=f"device={device!r}, device_map={device_map!r}",
                fix="pass one of them: device for one device, device_map for several",
            )
        )
    if device_map is not None:
        return place(
            model, dtypes, device_map, max_memory=max_memory, offload_folder=offload_folder, needs_gpu=needs_gpu
        )
    beside = {"max_memory": max_memory, "offload_folder": offload_folder}
    if given := [name for name, value in beside.items() if value is not None]:
        raise PlanError(
            Problem(
                where=", ".join(given),
                what="has a meaning for a device map only",
                fix="pass device_map='auto' with it, or leave it out",
            )
        )
    return None


def check_device(device: Any) -> torch.device:
    """The device that is meant, a GPU with its number. Raises ``BackendError`` for one that holds no values here."""
    try:
        out = torch.device(device)
        if out.type == "cuda" and out.index is None:
            out = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=out).item()  # a device may exist and still hold no values
    except Exception as error:  # torch raises any, ModuleNotFoundError too
        raise BackendError(
            Problem(
                where=f"device={device}",
                what="this device can not be used",
                found=first_line(error).partition(". ")[0],  # not all its advice
                fix="pass a device that torch has here, or leave it out",
            )
        ) from None
    return out


def _computed(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], strategy: str, max_memory: MaxMemory | None
) -> dict[str, int | str]:
    from accelerate.utils import (  # type: ignore[import-untyped]
        get_balanced_memory,
        get_max_memory,
        infer_auto_device_map,
    )

    layers = list(model._no_split_modules or ())
    sizes: dict[str, Any] = {"no_split_module_classes": layers, "special_dtypes": dict(dtypes)}
    try:
        limits: Any = dict(max_memory) if max_memory is not None else None
        if strategy == "sequential":
            limits = get_max_memory(limits)
        else:
            limits = get_balanced_memory(model, limits, low_zero=strategy == "balanced_low_0", **sizes)
        computed: dict[str, int | str] = infer_auto_device_map(model, limits, **sizes)
    except Exception as error:  # accelerate raises errors of several types for limits that it can not read or keep
        raise PlanError(
            Problem(
                where="device_map",
                what=f"accelerate can not compute '{strategy}' for this model",
                details=told(error),
                found=f"max_memory={max_memory}" if max_memory is not None else "",
                fix="correct max_memory, or say in device_map where each module goes",
            )
        ) from error
    return dict(computed)


def _given(device_map: DeviceMap) -> dict[str, int | str]:
    if isinstance(device_map, Mapping):
        if not device_map:
            raise _wrong("the map is empty", fix="pass 'auto', a device, or a device for each module")
        return {str(name): _read(device, f"device_map[{name!r}]") for name, device in device_map.items()}
    if device_map == "cuda" and "LOCAL_RANK" in os.environ:  # as from_pretrained: one process for each GPU
        return {"": int(os.environ["LOCAL_RANK"])}
    return {"": _read(device_map, "device_map")}


def _read(device: Any, where: str) -> int | str:
    """accelerate's own words for a device: a GPU's number, "cpu", "disk", or another device's name."""
    if device == DISK:
        return DISK
    problem = Problem(
        where=where,
        what="this is no device",
        expected=f"a GPU's number, 'cpu', 'disk', a device of torch; or for the whole model {', '.join(STRATEGIES)}",
        found=repr(device),
    )
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device) or device in STRATEGIES:
        raise PlanError(problem)
    try:
        known = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise PlanError(problem) from None
    if known.type == "cuda" and known.index is None:
        known = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return _key(known)


def _key(device: torch.device) -> int | str:
    return device.index if device.type == "cuda" else device.type if device.type == CPU else str(device)


def _device(place: int | str | torch.device) -> torch.device:
    """Where the tensors of a place are: those for the disk are mapped into the CPU's memory."""
    if place == DISK:
        return torch.device(CPU)
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _is_off_gpu(place: int | str) -> bool:
    return place == DISK or _device(place).type != "cuda"


def _place_of(device_map: Mapping[str, int | str], name: str) -> int | str | None:
    """The entry of the innermost module that holds ``name``."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
    return next((device_map[path] for path in paths if path in device_map), None)


def _check_names(model: nn.Module, places: Mapping[str, int | str]) -> None:
    """Every name is a module, every tensor of a checkpoint is in one of them, and tied tensors stay together."""
    modules = dict(model.named_modules())
    problems = []
    if unknown := [name for name in places if name not in modules]:
        problems.append(
            Problem(
                where="device_map",
                what=f"names of modules that this model does not have ({len(unknown)})",
                details=tuple(fold(unknown, 12)),
                fix="name modules of the patched model (model.named_modules()); a layer is the smallest that is "
                "named in both",
            )
        )
    held = {name: tensor for name, tensor in named_tensors(model).items() if _is_saved(modules, name)}
    if left := [name for name in held if _place_of(places, name) is None]:
        problems.append(
            Problem(
                where="device_map",
                what=f"parameters have no device ({len(left)})",
                details=tuple(fold(left, 12)),
                fix="add the modules that they are in, or '' for all that is not named",
            )
        )
    together: dict[int, list[str]] = {}
    for name, tensor in held.items():
        together.setdefault(id(tensor), []).append(name)
    for names in together.values():
        if len({_place_of(places, name) for name in names if name not in left}) > 1:
            problems.append(
                Problem(
                    where="device_map",
                    what="names of one tied parameter have different devices",
                    details=tuple(f"{name}: {_place_of(places, name)}" for name in names),
                    fix="give the modules of tied parameters the same device",
                )
            )
    if problems:
        raise PlanError(problems)


def _is_saved(modules: Mapping[str, nn.Module], name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in modules[path]._non_persistent_buffers_set


def _folder(
    places: Mapping[str, int | str], dtypes: Mapping[str, torch.dtype], folder: str | os.PathLike[str] | None
) -> Path | None:
    """The offload folder, made if it is not there; None if nothing is for the disk."""
    if not (names := [name for name in dtypes if _place_of(places, name) == DISK]):
        return None
    if folder is None:
        raise _wrong(
            f"parameters are to stay on the disk ({len(names)}), and there is no folder for them",
            details=tuple(fold(names, 12)),
            fix="pass offload_folder=..., a folder with room for them, or give their modules a GPU or 'cpu'",
        )
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_free = not any(path.iterdir())
    except OSError as error:
        raise _wrong(f"the offload folder can not be used: {path}", found=str(error), fix="pass another") from error
    if not is_free:
        # A model reads its weights there for as long as it lives, by names that another's would have too.
        raise _wrong(
            f"the offload folder is not empty: {path}",
            fix="pass a new one, or remove this one if no model that was loaded with it is in use",
        )
    return path


def _reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes: what is mapped and then not there would end the process."""
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise LoadError(
            Problem(
                where=str(path),
                what=f"no room for {size:,} bytes of an offloaded parameter",
                found=str(error),
                fix="pass an offload_folder on a disk with more room",
            )
        ) from error


def _wrong(what: str, *, details: tuple[str, ...] = (), found: str = "", fix: str) -> PlanError:
    return PlanError(Problem(where="device_map", what=what, details=details, found=found, fix=fix))
