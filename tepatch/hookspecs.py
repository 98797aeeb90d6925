"""What a plugin may implement: one hook, ``tepatch_patches``.

A plugin is an installed package with an entry point in the group ``tepatch``; the object it names (a module,
usually) carries functions marked with ``tepatch.hookimpl``. A hook takes nothing and yields plain values, so
a plugin is tested without a host and the host can check, sort and attribute everything it was given.

Further arguments may be added to a hook later: an implementation that does not name them keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from tepatch.patch import Patch

__all__ = ["hookimpl", "hookspec", "tepatch_patches"]

PROJECT = "tepatch"

hookspec = pluggy.HookspecMarker(PROJECT)

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as an implementation of the hook of the same name."""


@hookspec
def tepatch_patches() -> Iterable[Patch]:
    """Give the patches that this plugin offers.

    Called once for each plugin, when the host loads it. It must be quick and import neither torch nor
    transformer_engine: a `Patch` names its classes by strings for that reason.

        @tepatch.hookimpl
        def tepatch_patches():
            yield tepatch.Patch(
                name="llama",
                model_types=("llama",),
                replace={"transformers.models.llama.modeling_llama:LlamaDecoderLayer": "my_plugin:Layer"},
                mapping="my_plugin:llama.tepatch.yaml",
            )

    Returns any iterable of `tepatch.Patch`; an empty one is allowed.
    """
    return ()
