"""What ``torch.compile`` must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """A decorator: the function runs as it stands, between two graphs. For what reads values or keeps them."""
    out: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return out
