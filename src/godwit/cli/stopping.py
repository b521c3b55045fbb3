"""Being told to stop: Ctrl-C, or SIGTERM from whoever runs the program."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM came while it was taken like Ctrl-C."""


@contextmanager
def tidy_stop(advice: str) -> Iterator[None]:
    """While this lasts, SIGTERM leaves things in order as Ctrl-C does; the error of either says `advice`."""
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
