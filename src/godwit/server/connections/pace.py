"""Rate limits, with a clock that tests can replace."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic


class Bucket:
    """A token bucket, which may go into debt.

    Args:
        rate: units per second.
        size: units at most, and at first.
        clock: seconds.
    """

    def __init__(self, rate: float, size: float, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate
        self._size = size
        self._clock = clock
        self._level = float(size)
        self._then = clock()

    def wait(self) -> float:
        """Seconds until there is a unit; 0 if there is one now."""
        self._fill()
        return max(0.0, (1 - self._level) / self._rate)

    def take(self, count: float) -> None:
        """Take units, even more than there are."""
        self._fill()
        self._level -= count

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + self._rate * (now - self._then))
        self._then = now


class Share:
    """Spreads costly work over time, so that it takes only a share of one processor.

    Args:
        share: between 0 and 1.
        clock: seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float] = monotonic) -> None:
        self._rest = 1 / share - 1
        self._clock = clock
        self._free = clock()

    def spent(self, seconds: float) -> float:
        """Record work that took so long; return how many seconds to wait before more."""
        now = self._clock()
        self._free = max(self._free, now) + self._rest * seconds
        return self._free - now


class Sieve:
    """Passes a burst of events, then so many per second, and counts the others. Thread-safe.

    Args:
        rate: events per second.
        burst: events at once.
        clock: seconds.
    """

    def __init__(self, rate: float = 1, burst: int = 10, clock: Callable[[], float] = monotonic) -> None:
        self._bucket = Bucket(rate, burst, clock)
        self._lock = threading.Lock()
        self._held_back = 0

    def passes(self) -> int | None:
        """None if this event is held back, else how many were held back since the last one that passed."""
        with self._lock:
            if self._bucket.wait() > 0:
                self._held_back += 1
                return None
            self._bucket.take(1)
            count, self._held_back = self._held_back, 0
            return count


class BoundedRate(logging.Filter):
    """A logging filter that limits the rate of warnings; errors always pass."""

    def __init__(self, sieve: Sieve | None = None) -> None:
        super().__init__()
        self._sieve = sieve or Sieve()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        count = self._sieve.passes()
        if count:
            record.msg, record.args = f"{record.getMessage()} ({count} more like this were not logged)", ()
        return count is not None
