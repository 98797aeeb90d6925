"""A checkpoint of two files with all that a plan can do to a tensor, and how it has to look when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tepatch.checkpoint import open_checkpoint
from tepatch.checkpoint.folder import FolderCheckpoint
from tepatch.mapping import parse_mapping
from tepatch.planning import Plan, Spec, make_plan
from tepatch.transfer.steps import assemble

MAPPING = """version: 1
captures: {expert: "4"}
parameters:
  run: {concat: [a, b], sizes: [70, 10]}
  cast: wide
  turned: {of: square, transpose: true}
  interleaved: {interleave: [q, k, v], over: 3, sizes: [2, 1, 1]}
  shifted: {of: norm, offset: 1}
  stacked: {stack: {concat: ['e.{expert}.w1', 'e.{expert}.w3']}, over: expert}
  padded: {of: short, pad: {size: 33}}
  whole: packed_plain
  few: same
  apart.{expert}: {of: packed, take: {out_of: 4, index: expert, dim: 1}}
  embed: same
  head: same
"""
SHAPES: dict[str, tuple[int, ...]] = {
    **{"a": (70, 33), "b": (10, 33), "wide": (60, 41), "square": (48, 30), "q": (6, 50), "k": (3, 50), "v": (3, 50)},
    **{"norm": (65,), "short": (33, 20), "packed_plain": (7,), "few": (5, 3), "packed": (20, 4, 30), "embed": (90, 32)},
    **{f"e.{i}.{w}": (24, 20) for i in range(4) for w in ("w1", "w3")},
}
TARGETS: dict[str, tuple[int, ...]] = {
    **{"run": (80, 33), "cast": (60, 41), "turned": (30, 48), "interleaved": (12, 50), "shifted": (65,)},
    **{"stacked": (4, 48, 20), "padded": (40, 20), "whole": (7,), "few": (5, 3), "embed": (90, 32)},
    **{f"apart.{i}": (20, 30) for i in range(4)},
}


Change = Callable[[dict[str, torch.Tensor]], None]


@dataclass(frozen=True)
class Sample:
    """The checkpoint, a plan for it, and the parameters put together by other means."""

    folder: Path
    plan: Plan
    expected: Mapping[str, torch.Tensor]

    @property
    def checkpoint(self) -> FolderCheckpoint:
        """Opened anew."""
        return open_checkpoint(self.folder)


def write_sample(folder: Path, change: Change | None = None, dtype: str = "BF16", *, copy: bool = True) -> Sample:
    """``change`` may alter the tensors before they are written, ``dtype`` is that of the parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    tensors["wide"] = torch.randn(SHAPES["wide"], generator=generator)
    if copy:
        tensors["head"] = tensors["embed"].clone()
    if change is not None:
        change(tensors)
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)  # another order than the mapping's
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plan = plan_for(folder, dtype)
    return Sample(folder, plan, {name: assemble(plan, name, tensors.__getitem__) for name in plan.writes})


def plan_for(folder: Path, dtype: str = "BF16") -> Plan:
    """The plan for a sample that is there."""
    return make_plan(
        parse_mapping(MAPPING, name="m.yaml"),
        config={},
        sources=open_checkpoint(folder).tensors,
        targets={name: Spec(shape, dtype) for name, shape in TARGETS.items()},
        ties={"head": "embed"},
        location=str(folder),
    )
