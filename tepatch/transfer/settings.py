"""How a checkpoint is read: by how many threads, in what pieces, by whom."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

from tepatch.errors import PlanError, Problem

MIB = 1 << 20
THREADS_CACHED, THREADS_UNCACHED = 8, 16
"""At most. From the page cache, more share one interpreter lock and one memory bus to no end; a disk wants more to do
at once."""
SOURCES = ("direct", "safetensors")
CACHES = ("use", "bypass")
BOUNDS = {"threads": (1, 1024), "piece_bytes": (64, 1 << 30), "buffers": (1, 1 << 16)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How files are read. None stands for what suits this machine.

    Private memory: ``buffers * (piece_bytes + 12 KiB)`` at most. Raises ``PlanError`` for numbers that make no sense.
    """

    source: str = "direct"
    """Who reads safetensors files: ``direct`` (threads of our own, into pinned memory or into the parameters
    themselves), or ``safetensors`` (that library's memory maps). What follows is for ``direct`` alone."""
    threads: int | None = None
    """Threads that read. Default: the CPU cores that this process may use, 8 at most if the page cache holds the files
    and 16 if it does not."""
    piece_bytes: int = 8 * MIB
    """What a thread reads at once, in bytes. With much less, Python's own time shows."""
    buffers: int | None = None
    """Pieces that may be in memory at once, being read or on their way to a GPU. Default: twice the threads. More
    are not quicker: each has to be pinned (2 ms for 8 MiB), and no cache of the processor would hold so many."""
    cache: str = "use"
    """``use`` fills the system's page cache, so that the next load finds the files there. ``bypass`` reads past it what
    it does not hold, and leaves it so: for a model that is larger than memory. Whether it is quicker, measure."""

    def __post_init__(self) -> None:
        for name, known in (("source", SOURCES), ("cache", CACHES)):
            if getattr(self, name) not in known:
                raise _wrong(name, " or ".join(known), getattr(self, name))
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name != "piece_bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise _wrong(name, f"a whole number from {least:,} to {most:,}", value)

    def refuse_unused(self) -> None:
        """Raise ``PlanError`` for a setting that is given to the library, which reads by its own means."""
        if self.source == "direct":
            return
        for each in fields(self):
            if each.name != "source" and (value := getattr(self, each.name)) != each.default:
                raise PlanError(
                    Problem(
                        where=f"reading.{each.name}",
                        what=f"has no meaning with source='{self.source}', which reads by its own means",
                        found=repr(value),
                        fix="leave it out, or the source",
                    )
                )

    def settled(self, *, is_cached: bool) -> Reading:
        """The same with numbers for this machine in the place of None; ``is_cached`` says where the files are."""
        cores = len(os.sched_getaffinity(0))
        threads = self.threads or min(cores, THREADS_CACHED if is_cached else THREADS_UNCACHED)
        return replace(self, threads=threads, buffers=self.buffers or 2 * threads)

    @property
    def num_threads(self) -> int:
        """Threads that will read, where that is settled."""
        return self.threads or self.settled(is_cached=True).num_threads

    @property
    def num_buffers(self) -> int:
        """Pieces that may be in memory at once, where that is settled."""
        return self.buffers or 2 * self.num_threads


def _wrong(name: str, expected: str, found: Any) -> PlanError:
    return PlanError(
        Problem(
            where=f"reading.{name}",
            what="can not be used",
            expected=expected,
            found=repr(found),
            fix="leave it out for the default",
        )
    )
