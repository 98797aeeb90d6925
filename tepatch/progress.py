"""A progress bar over bytes."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class ProgressBar:
    """A progress bar over bytes, on stderr; by default when that is a terminal. Threads may share it."""

    def __init__(self, total: int, wanted: bool | None, what: str) -> None:
        self._bar = None
        self._lock = threading.Lock()
        if wanted if wanted is not None else sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=what)

    def __enter__(self) -> ProgressBar:
        return self

    def advance(self, count: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
