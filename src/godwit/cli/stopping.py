"""Clean shutdown on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def tidy_stop(advice: str) -> Iterator[None]:
    """Within this context SIGTERM raises like Ctrl-C, and either exception has `advice` as its text."""
    own = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if own else None
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(advice) from None
    finally:
        if own:
            signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: object) -> None:
    raise Terminated
