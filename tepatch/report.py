"""What a load did, as a value that the model carries (``model.tepatch``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tepatch.errors import visible
from tepatch.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a model came to be: which patch, which backend, what was replaced, and how its weights lie."""

    patch: str
    backend: str
    """``te`` or ``reference``."""
    backend_note: str
    """Why the backend is not Transformer Engine, if it is not."""
    model_class: str
    replaced: str
    """The layer classes and how many of each, as text."""
    device: str
    dtype: str
    precision: str
    """What the layers compute their matrix products in, as ``load`` or the last ``set_precision`` said; empty if that
    is left to the ``te.autocast`` around the model."""
    plan: Plan
    """How the parameters and the original checkpoint's tensors belong together, by the stock model's names for them."""
    layout: str
    """The layout of what was loaded: ``hf`` (that of the plan), ``te`` (the parameters' own), or the patch's name
    for another."""
    config_folder: str | None
    """Where the checkpoint's config and tokenizer are; None for fresh weights."""
    bytes_read: int
    seconds: dict[str, float]
    """Wall-clock seconds of ``build`` (the model on the meta device), ``plan``, ``load`` (the weights) and ``install``
    (the weights into the model, and its buffers). Of ``load``: ``allocate``, taking memory for the parameters; as means
    over the threads that read, ``read``, waiting for the file system, and ``copy``, waiting for a buffer, to be pinned
    or that a GPU is done with it; and ``place``, sending bytes to a GPU or putting them in another order or dtype. They
    overlap, so they do not add up to ``load``."""
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    """What may be of interest about how the weights were read."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        return self  # nothing in it ever changes, and models that carry it are copied

    def __str__(self) -> str:
        rate = self.bytes_read / 1e9 / max(self.seconds["load"], 1e-9)
        stages = [f"{stage} {self.seconds[stage]:.2f} s" for stage in ("build", "plan", "load", "install")]
        parts = [f"{part} {self.seconds[part]:.2f} s" for part in ("allocate", "read", "copy", "place")]
        lines = [
            f"{self.model_class} with {self.patch} layers ({self.backend} backend) on {self.device}, {self.dtype}",
            f"  replaced: {self.replaced}",
            f"  {', '.join(stages)} ({self.bytes_read:,} bytes, {rate:.2f} GB/s)",
            f"  of load: {', '.join(parts)}",
            "  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        if self.precision:
            lines.append(f"  precision: {self.precision}")
        if self.layout != "hf":
            lines.append(f"  read from a checkpoint in the layout '{self.layout}'; saved in the original's:")
        lines += [f"  note: {note}" for note in (self.backend_note, *self.notes) if note]
        return visible("\n".join([*lines, *(f"  {line}" for line in str(self.plan).splitlines())]))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data (the plan included)."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        return {**out, "plan": self.plan.to_json()}
