"""What a load did, as a value that the model carries (``model.tepatch``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tepatch.mapping.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a model came to be: which patch, which backend, what was replaced, and the plan that was executed."""

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
    plan: Plan
    bytes_read: int
    seconds: dict[str, float]
    """Wall-clock seconds of ``build`` (the model on the meta device), ``plan`` and ``load``."""
    versions: dict[str, str]

    def __str__(self) -> str:
        rate = self.bytes_read / 1e9 / max(self.seconds["load"], 1e-9)
        timing = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())
        lines = [
            f"{self.model_class} with {self.patch} layers ({self.backend} backend) on {self.device}, {self.dtype}",
            f"  replaced: {self.replaced}",
            f"  {timing} ({self.bytes_read:,} bytes, {rate:.2f} GB/s)",
            "  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        if self.backend_note:
            lines.append(f"  note: {self.backend_note}")
        return "\n".join([*lines, *(f"  {line}" for line in str(self.plan).splitlines())])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data (the plan included)."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        return {**out, "plan": self.plan.to_json()}
