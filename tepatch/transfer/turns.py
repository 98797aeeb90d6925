"""How long a thread of Python may keep the others waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5e-5
"""A reader has a few turns of some microseconds with every piece, of which one takes a millisecond or two to read."""

_lock = threading.Lock()
_blocks = 0
_before = 0.0


@contextmanager
def quick_turns() -> Iterator[None]:
    """Have whoever computes in Python give way to waiting threads after ``SECONDS`` (usually 5 ms), inside the block.

    This is one number for the whole process. The last block to end sets it back, in whichever thread that is.
    """
    global _blocks, _before
    with _lock:
        if not _blocks:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, SECONDS))
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                sys.setswitchinterval(_before)
