"""Where ``diff_plans`` was in 0.1."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "diff_plans":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warnings.warn("diff_plans is in tepatch.planning now", DeprecationWarning, stacklevel=2)
    return importlib.import_module("tepatch.planning").diff_plans
