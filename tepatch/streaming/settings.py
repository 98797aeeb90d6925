"""How a checkpoint is read: by how many threads, in what pieces, by whom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tepatch.errors import PlanError, Problem

MIB = 1 << 20
MAX_THREADS = 8
"""More share one interpreter lock, one memory bus and a ring that no cache of the processor holds. As measured beside
an H200, on 16 cores: 4, 8 and 16 threads load 12.6 GiB in 0.59, 0.35 and 0.45 s."""
SOURCES = ("direct", "safetensors", "fastsafetensors", "runai", "instanttensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How files are read. None stands for what suits this machine. Private memory: ``threads * buffers * piece_bytes``.

    Raises ``PlanError`` for numbers that make no sense.
    """

    source: str = "direct"
    """Who reads: ``direct`` (threads of our own, into pinned memory or into the parameters themselves), or a library:
    ``safetensors`` (memory maps), ``fastsafetensors``, ``runai`` (runai-model-streamer) or ``instanttensor``, if it is
    installed; for files that are safetensors."""
    threads: int | None = None
    """Threads that read and copy. Default: the CPU cores that this process may use, 8 at most."""
    piece_bytes: int = 8 * MIB
    """What a thread reads at once, in bytes. With much less, Python's own time shows."""
    buffers: int = 2
    """Pieces of a thread that may be on their way to a GPU at once, while it reads on."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise _wrong("source", " or ".join(SOURCES), self.source)
        for name, least in (("threads", 1), ("piece_bytes", 64), ("buffers", 1)):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _wrong(name, f"a whole number from {least:,}", value)

    @property
    def num_threads(self) -> int:
        """Threads that will read."""
        return self.threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _wrong(name: str, expected: str, found: Any) -> PlanError:
    return PlanError(Problem(where=f"reading.{name}", what="can not be used", expected=expected, found=repr(found)))
