"""A bounded queue for blocking work: a few jobs at a time, and the clients take turns."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from godwit.errors import GodwitError
from godwit.server.errors import from_engine, overloaded

#: Seconds that a job may keep the interpreter when the engine or the event loop wants it. With Python's usual
#: 5 ms, a step of the engine, which gives the interpreter up many times, would take many times as long.
SWITCH_SECONDS = 0.0005
BUSY = "too many requests are waiting to be prepared; send the request again in a moment"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ShortSwitches:
    """A context in which the interpreter's switch interval is short. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_jobs = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_jobs:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_SECONDS, self._usual))
            self._num_jobs += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._num_jobs -= 1
            if not self._num_jobs:
                sys.setswitchinterval(self._usual)


_SHORT_SWITCHES = ShortSwitches()


class Lines(Generic[_Item]):
    """One queue for each key; the keys take turns."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[_Item]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, key: str, item: _Item) -> None:
        """Append an item to a key's queue."""
        self._lines.setdefault(key, deque()).append(item)
        self._size += 1

    def pop(self) -> _Item:
        """Take the first item of the key whose turn it is, which then comes after the other keys.

        Raises:
            IndexError: all queues are empty.
        """
        if not self._lines:
            raise IndexError("no job is waiting")
        key = next(iter(self._lines))
        line = self._lines.pop(key)
        item = line.popleft()
        if line:
            self._lines[key] = line
        self._size -= 1
        return item

    def pop_from_longest(self) -> _Item:
        """Take the last item of the longest queue; among equals, of the key that had its turn last.

        Raises:
            IndexError: all queues are empty.
        """
        if not self._lines:
            raise IndexError("no job is waiting")
        key = max(reversed(self._lines), key=lambda one: len(self._lines[one]))
        item = self._lines[key][-1]
        self.remove(key, item)
        return item

    def length(self, key: str) -> int:
        """The length of a key's queue."""
        return len(self._lines.get(key, ()))

    def longest(self) -> int:
        """The length of the longest queue."""
        return max(map(len, self._lines.values()), default=0)

    def remove(self, key: str, item: _Item) -> None:
        """Remove an item from its queue, if it is still there."""
        line = self._lines.get(key)
        if line is None or item not in line:
            return
        line.remove(item)
        self._size -= 1
        if not line:
            del self._lines[key]


class FairQueue:
    """Runs blocking work in threads, a few jobs at a time. For one event loop.

    A full queue drops the newest job of the key that has the most, so that one client cannot keep others out.

    Args:
        workers: jobs that run at a time.
        waiting: jobs that may wait.
    """

    def __init__(self, workers: int, waiting: int) -> None:
        self._workers = workers
        self._free = workers
        self._waiting = waiting
        self._lines: Lines[asyncio.Future[None]] = Lines()
        self._limiter: CapacityLimiter | None = None

    async def run(self, key: str, work: Callable[[], _Result]) -> _Result:
        """Run the work in a thread when it is the turn of ``key``.

        Cancelling this removes work that has not begun. Work that has begun is finished, and occupies its
        worker until then.

        Raises:
            ApiError: too many jobs are waiting (503), or the work failed.
        """
        await self._turn(key)
        task = asyncio.ensure_future(self._do(work))
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except GodwitError as error:
            raise from_engine(error) from error

    async def _do(self, work: Callable[[], _Result]) -> _Result:
        if self._limiter is None:  # it belongs to the event loop
            self._limiter = CapacityLimiter(self._workers)
        with _SHORT_SWITCHES:
            return await run_sync(work, limiter=self._limiter)

    async def _turn(self, key: str) -> None:
        if self._free:
            self._free -= 1
            return
        self._make_room(key)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.push(key, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._release()  # the turn came and the client left at the same moment
            self._lines.remove(key, place)
            raise

    def _make_room(self, key: str) -> None:
        if len(self._lines) < self._waiting:
            return
        if not self._waiting or self._lines.length(key) + 1 >= self._lines.longest():
            raise overloaded(BUSY)
        self._lines.pop_from_longest().set_exception(overloaded(BUSY))

    def _ended(self, task: asyncio.Task[_Result]) -> None:
        if not task.cancelled():
            task.exception()  # marks it as retrieved; the client may have left
        self._release()

    def _release(self) -> None:
        if len(self._lines):
            self._lines.pop().set_result(None)
        else:
            self._free += 1
