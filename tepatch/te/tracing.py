"""What ``torch.compile`` must not look into, and what nothing that records a graph for other inputs may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from tepatch.errors import Problem, UnsupportedError

try:
    from torch.compiler import is_exporting
except ImportError:  # before torch 2.7

    def is_exporting() -> bool:
        return False


F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """A decorator: the function runs as it stands, between two graphs. For what reads values or keeps them."""
    out: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return out


def refuse_to_be_recorded() -> None:
    """Raise ``UnsupportedError`` in ``torch.jit.trace``, ``torch.export`` and ``torch.onnx.export``.

    Layers read from the mask of each call which kernels can compute it. What they do for one batch would be recorded
    for all.
    """
    if torch.compiler.is_dynamo_compiling():
        return  # which follows the questions below, and takes some for answered otherwise (torch 2.11)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise _refused("torch.jit.trace")
    if is_exporting():
        raise _refused("torch.export")


def refuse_to_be_walked_for_export() -> None:
    """Raise the same where ``torch.export`` asks whoever calls this for its modules, as it does before it records.

    With ``strict=True`` Dynamo records, and that lets no error but its own out.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
        frame = frame.f_back  # the walk through the modules around
    if frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.export."):
        raise _refused("torch.export")


def _refused(where: str) -> UnsupportedError:
    return UnsupportedError(
        Problem(
            where=where,
            what="a patched model can not be traced or exported: what its layers do depends on the batch",
            fix="save it (tepatch.save), and trace or export the model that transformers loads; torch.compile "
            "takes patched models as they are",
        )
    )
