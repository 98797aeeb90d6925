"""How a check ends: with a finding, or with one of two exceptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tepatch.testing.cases import Bench


class Broken(Exception):
    """The check has found something wrong; the text says what."""


class NotApplicable(Exception):
    """The check means nothing for this case; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check that passed has seen."""

    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers by name: ``ours`` and ``theirs`` are relative errors against the truth."""
    is_proof: bool = False
    """Whether it compared everything exactly, and measured nothing."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """More, for the JSON."""


Check = Callable[["Bench"], Finding]
"""From the bench of a case to what is found there. Raises ``Broken`` or ``NotApplicable``."""
