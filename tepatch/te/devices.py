"""Bringing to another device what all layers get, with what is known of it.

A layer recognises masks and tables of positions that it has seen: what they say is read once for all layers. A copy of
one is unknown, and would be read (which makes the host wait for the GPU) and be turned by in every layer anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tepatch.te.rope import same_angles
from tepatch.te.sequences import is_plain, plain_on, remembered
from tepatch.te.tracing import outside_graphs


@outside_graphs
def brought(value: Any, device: torch.device) -> Any:
    """A mask, or a tuple of tables, on ``device``: copied once for as long as it lives; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(brought(each, device) for each in value)
    if not isinstance(value, Tensor) or value.device == device or value.requires_grad:
        return value
    if is_plain(value):
        return plain_on(value, device)

    def copy() -> Tensor:
        out = value.to(device)
        same_angles(out, value)
        return out

    return remembered(value, device, copy)
