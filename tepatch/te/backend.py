"""The choice between Transformer Engine and the reference modules.

A plugin writes its layer once, against the factories of a ``Modules`` value. On a CUDA machine with
Transformer Engine those build Transformer Engine's modules; elsewhere they build tepatch's own plain PyTorch
ones. Whoever builds the model picks with ``use_backend``; the layer asks ``modules()`` and never looks at the
machine itself.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from tepatch.errors import BackendError, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tepatch.te.experts import Experts

BackendName = Literal["auto", "te", "reference"]

# The first release that has the names used here, and attention to packed sequences in every dtype.
OLDEST_VERSION = (2, 11)
# Ampere. Older GPUs lack the bfloat16 kernels.
OLDEST_CAPABILITY = (8, 0)

_logger = logging.getLogger("tepatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeStatus:
    """Whether Transformer Engine can be used in this process, and if not, why."""

    usable: bool
    version: str | None
    """Of the installed Transformer Engine; None where it cannot be imported."""
    reason: str
    """One sentence that says why it cannot be used; empty where it can."""
    device: str
    """Where its modules live: "cuda", or "cpu" where only the reference can be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modules:
    """The modules that a layer is made of, from one backend.

    Each factory takes Transformer Engine's own constructor arguments. Without a ``device`` the parameters go
    to torch's default device where that is "meta" (or, on "te", a GPU), else to ``default_device``.
    """

    name: Literal["te", "reference"]
    default_device: Literal["cuda", "cpu"]
    Linear: Callable[..., nn.Module]
    LayerNormLinear: Callable[..., nn.Module]
    LayerNormMLP: Callable[..., nn.Module]
    RMSNorm: Callable[..., nn.Module]
    LayerNorm: Callable[..., nn.Module]
    DotProductAttention: Callable[..., nn.Module]
    apply_rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Rotates x [b, s, h, d] by cos and sin, as ``tepatch.te.rope.apply_rotary``."""
    moe_permute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Sorts tokens by expert, as ``tepatch.te.reference.grouped.permute``."""
    moe_unpermute: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Adds up what experts made of each token, as ``tepatch.te.reference.grouped.unpermute``."""
    grouped_mlp: Callable[[Experts, Tensor, Sequence[int]], Tensor]
    """Each expert's MLP of its rows, as ``tepatch.te.reference.grouped.grouped_mlp``."""


_active: ContextVar[Modules | None] = ContextVar("tepatch_te_modules", default=None)


def modules() -> Modules:
    """Give the modules of the backend in force here: the innermost ``use_backend``, else "auto".

    The choice belongs to the current context (thread or asyncio task), as ``contextvars`` defines it.
    """
    return _active.get() or resolve("auto")


@contextmanager
def use_backend(name: BackendName) -> Iterator[Modules]:
    """Make ``modules()`` answer with this backend inside the block; blocks nest and end on any exit.

    Raises:
        BackendError: "te" was asked for and cannot be used, or the name is unknown.
    """
    chosen = resolve(name)
    token = _active.set(chosen)
    try:
        yield chosen
    finally:
        _active.reset(token)


def resolve(name: BackendName) -> Modules:
    """Give the modules of a backend by name; "auto" takes Transformer Engine where it can be used.

    A fall-back of "auto" to the reference is logged once per process, with the reason.

    Raises:
        BackendError: "te" was asked for and cannot be used, or the name is unknown.
    """
    if name not in get_args(BackendName):
        known = ", ".join(get_args(BackendName))
        raise BackendError(Problem(where="", what=f"no backend named {name!r}", expected=f"one of {known}"))
    if name == "reference":
        return _reference_modules()
    status = probe()
    if status.usable:
        return _te_modules()
    if name == "te":
        raise BackendError(_unusable(status))
    _announce_fallback(status.reason)
    return _reference_modules()


@functools.cache
def probe() -> TeStatus:
    """Find out once per process whether Transformer Engine can be used; never raises for its absence."""
    # Transformer Engine links against NCCL, which it does not find by itself: torch has to load it first.
    import torch

    version = import_error = None
    try:
        with warnings.catch_warnings():
            # Where warnings are errors, one that is issued inside the import must not look like its failure.
            warnings.simplefilter("default")
            te = importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        missing_all = error.name == "transformer_engine"
        import_error = "Transformer Engine is not installed" + ("" if missing_all else f" completely: {error}")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        # It reports a torch, CUDA or cuDNN that it does not fit by any of these.
        import_error = f"Transformer Engine cannot be imported: {type(error).__name__}: {error}"
    else:
        version = getattr(importlib.import_module("transformer_engine"), "__version__", None)
        if not hasattr(te, "TransformerLayer"):
            # The registry also holds empty releases of that name (0.0.0, 0.0.1).
            import_error = "the installed transformer_engine is a placeholder without any layers"
    cuda = torch.cuda.is_available()
    return judge(
        te_version=version,
        import_error=import_error,
        cuda_available=cuda,
        capability=torch.cuda.get_device_capability() if cuda else None,
    )


def judge(
    *,
    te_version: str | None,
    import_error: str | None,
    cuda_available: bool,
    capability: tuple[int, int] | None,
) -> TeStatus:
    """Decide from what a probe found whether Transformer Engine can be used, and say why not."""
    reason = import_error or _version_problem(te_version)
    if not reason and not (cuda_available and capability):
        reason = "torch finds no CUDA GPU, and Transformer Engine has no CPU kernels"
    if not reason and capability and capability < OLDEST_CAPABILITY:
        reason = (
            f"GPU too old: compute capability {_dotted(capability)}, TE needs {_dotted(OLDEST_CAPABILITY)} (Ampere)"
        )
    return TeStatus(
        usable=not reason,
        version=te_version,
        reason=reason,
        device="cpu" if reason else "cuda",
    )


def _version_problem(version: str | None) -> str:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if not found:
        return f"the version of Transformer Engine cannot be read (found {version!r})"
    if (int(found[1]), int(found[2])) < OLDEST_VERSION:
        return f"Transformer Engine {version} is too old, tepatch needs {_dotted(OLDEST_VERSION)} or newer"
    return ""


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def _unusable(status: TeStatus) -> Problem:
    return Problem(
        where="",
        what="backend 'te' was asked for and cannot be used here",
        details=(status.reason,),
        fix='pip install "tepatch[te]" on a machine with an NVIDIA GPU (Ampere or newer), or use backend="reference"',
    )


@functools.cache
def _announce_fallback(reason: str) -> None:
    _logger.warning("using the reference modules instead of Transformer Engine: %s", reason)


@functools.cache
def _te_modules() -> Modules:
    from tepatch.te.nvidia import engine

    return engine.load()


@functools.cache
def _reference_modules() -> Modules:
    from tepatch.te import reference
    from tepatch.te.rope import apply_rotary

    return Modules(
        name="reference",
        default_device="cpu",
        Linear=reference.Linear,
        LayerNormLinear=reference.LayerNormLinear,
        LayerNormMLP=reference.LayerNormMLP,
        RMSNorm=reference.RMSNorm,
        LayerNorm=reference.LayerNorm,
        DotProductAttention=reference.DotProductAttention,
        apply_rotary=apply_rotary,
        moe_permute=reference.permute,
        moe_unpermute=reference.unpermute,
        grouped_mlp=reference.grouped_mlp,
    )
