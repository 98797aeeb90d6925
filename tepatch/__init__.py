"""Load Hugging Face checkpoints with Transformer Engine layers inside, and prove it before reading a weight.

    model = tepatch.load("llama", "path/to/Llama-3.1-8B", dtype=torch.bfloat16)

Names are imported on first use, so that ``import tepatch`` needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tepatch.certification import certify, check_certificate
    from tepatch.conversion import convert
    from tepatch.errors import TepatchError
    from tepatch.hf.selection import select_parameters
    from tepatch.hookspecs import hookimpl
    from tepatch.loading import build, load, plan
    from tepatch.patch import Patch
    from tepatch.replace import replace_layers
    from tepatch.saving import save
    from tepatch.te.layer import set_precision, weight_copies
    from tepatch.transfer.settings import Reading

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "Reading",
    "TepatchError",
    "build",
    "certify",
    "check_certificate",
    "convert",
    "hookimpl",
    "load",
    "plan",
    "replace_layers",
    "save",
    "select_parameters",
    "set_precision",
    "weight_copies",
]

_HOMES = {
    "Patch": "tepatch.patch",
    "Reading": "tepatch.transfer.settings",
    "TepatchError": "tepatch.errors",
    "build": "tepatch.loading",
    "certify": "tepatch.certification",
    "check_certificate": "tepatch.certification",
    "convert": "tepatch.conversion",
    "hookimpl": "tepatch.hookspecs",
    "load": "tepatch.loading",
    "plan": "tepatch.loading",
    "replace_layers": "tepatch.replace",
    "save": "tepatch.saving",
    "select_parameters": "tepatch.hf.selection",
    "set_precision": "tepatch.te.layer",
    "weight_copies": "tepatch.te.layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tepatch' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
