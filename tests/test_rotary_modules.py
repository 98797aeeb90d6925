"""Every patch that is installed keeps angles in float32, however a model is cast: no parity on a CPU would show it."""

from __future__ import annotations

import importlib

import pytest

from tepatch.plugins import default_host
from tepatch.te.rope import Float32Rotary


@pytest.mark.parametrize("name", sorted(default_host().patches))
def test_a_patch_for_layers_with_rotary_positions_keeps_their_angles_in_float32(name: str) -> None:
    replaced = default_host().patch(name).replacements()
    rotary = [ours for theirs, ours in replaced.items() if theirs.__name__.endswith("RotaryEmbedding")]
    assert all(issubclass(ours, Float32Rotary) for ours in rotary)
    modules = {importlib.import_module(theirs.__module__) for theirs in replaced}
    assert bool(rotary) is any(hasattr(module, "apply_rotary_pos_emb") for module in modules)
