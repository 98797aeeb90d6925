"""Interrupts, while other threads work for the main one.

What the handler of a signal raises (Ctrl-C: ``KeyboardInterrupt``), Python raises in the main thread between any two of
its instructions: also while it starts a thread, or holds a lock of ``threading``, which nobody else ever gets then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def uninterrupted(do: Callable[[], None], tell: Callable[[BaseException], None]) -> None:
    """Call ``do``; what handlers of signals raise meanwhile, give to ``tell`` at once, and raise the first of it after.

    It comes in the place of an error of ``do``. ``tell`` is called between any two instructions of the main thread: it
    can use ``queue.SimpleQueue``, and no lock. Handlers that raise nothing work as ever. In another thread than the
    main one, where Python runs no handler, there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        do()
        return
    raised: list[BaseException] = []
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handlers[signal.Signals(number)](number, frame)
        except BaseException as error:
            raised.append(error)
            tell(error)

    try:
        for number in signal.valid_signals():
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, handle)
        do()
    except BaseException:
        if not raised:
            raise
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
    if raised:
        raise raised[0].with_traceback(None)  # which would keep what the interrupted frames hold
