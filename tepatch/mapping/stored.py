"""Where ``read_plan`` was in 0.1."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "read_plan":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warnings.warn("read_plan is in tepatch.planning now", DeprecationWarning, stacklevel=2)
    return importlib.import_module("tepatch.planning").read_plan
