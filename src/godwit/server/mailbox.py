"""Mailbox: delivers events from the engine's thread to the event loop, those of a step together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any


class Mailbox:
    """Events on their way to queues of an event loop.

    Waking the loop for each event would make it compete with the engine for the interpreter in the middle of
    a step; woken after the step, it runs while the native code of the next one does.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()

    def open(self) -> None:
        """Deliver to the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def put(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Add an item to the next delivery. Thread-safe."""
        self._items.append((queue, item))

    def deliver(self) -> None:
        """Deliver what is there. Thread-safe."""
        if self._items and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
