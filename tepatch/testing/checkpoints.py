"""Checkpoints in every awkward form, and their comparison tensor by tensor.

What is awkward follows from the plan: the parts of each parameter are put into different files, whatever their names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copyfile

import torch
from safetensors.torch import save_file
from torch import Tensor

from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.planning import Plan
from tepatch.transfer.reader import Tensors
from tepatch.transfer.steps import same_bits


def read_all(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    with Tensors(checkpoint) as tensors:
        return {name: tensors.read(name).clone() for name in checkpoint.tensors}


def apart(plan: Plan) -> dict[str, int]:
    """A file for each source, so that no two parts of a parameter are in the same one."""
    parts: dict[str, list[str]] = defaultdict(list)
    for copy in plan.copies:
        if copy.source not in parts[copy.target]:
            parts[copy.target].append(copy.source)
    neighbours: dict[str, set[str]] = defaultdict(set)
    for sources in parts.values():
        for source in sources:
            neighbours[source] |= set(sources) - {source}
    out: dict[str, int] = {}
    for index, source in enumerate(plan.sources):
        taken = {out[other] for other in neighbours[source] if other in out}
        # Alternately from the first file on, so that parameters of one part are not all in the same file either.
        out[source] = next(file for file in range(index % 2, len(plan.sources) + 1) if file not in taken)
    files = sorted(set(out.values()))
    return {source: files.index(file) for source, file in out.items()}


def write(tensors: Mapping[str, Tensor], like: Path, folder: Path, *, place: Mapping[str, int], kind: str) -> Path:
    """A checkpoint of ``tensors`` with the other files of ``like``; ``kind`` is ``safetensors`` or ``bin``.

    ``place`` says which file a tensor goes to, the first being 0; if there is one, there is no index.
    """
    folder.mkdir(parents=True)
    for path in like.glob("*.json"):
        if "index" not in path.name:
            copyfile(path, folder / path.name)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    count = 1 + max((place.get(name, 0) for name in tensors), default=0)
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        index = place.get(name, 0)
        file = f"{stem}.{kind}" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}.{kind}"
        files[file][name] = tensor.detach().clone()  # safetensors takes no views
    for file, group in files.items():
        if kind == "safetensors":
            save_file(group, folder / file, metadata={"format": "pt"})
        else:
            torch.save(group, folder / file)
    if count > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {name: file for file, group in files.items() for name in group}
        index_json = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index_json))
    return folder


def forms(tensors: Mapping[str, Tensor], plan: Plan, like: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The same checkpoint in one file and in many, safetensors and pickled: what each is called, and its folder."""
    for kind in ("safetensors", "bin"):
        for name, place in (("one file", {}), ("parts apart", apart(plan))):
            text = f"{kind}, {name}"
            yield text, write(tensors, like, folder / text.replace(", ", "-"), place=place, kind=kind)


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, but: Mapping[str, str]) -> list[str]:
    """What is not the same bit for bit, in a line each; the values of those named in ``but`` may differ."""
    out = [f"{name}: missing" for name in expected if name not in found]
    out += [f"{name}: nobody's" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        one, other = found[name], expected[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            out.append(f"{name}: {one.dtype} {list(one.shape)}, was {other.dtype} {list(other.shape)}")
        elif name not in but and not same_bits(one, other):
            out.append(f"{name}: other values")
    return sorted(out)
