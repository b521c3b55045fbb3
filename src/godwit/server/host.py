"""EngineHost: keeps an engine running."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable

from godwit.engine import Engine, EngineStats
from godwit.errors import GodwitError
from godwit.server.mailbox import Mailbox

_WATCH_SECONDS = 1.0
_log = logging.getLogger("godwit.server")


class EngineHost:
    """Keeps an engine running: one whose thread has ended is replaced.

    Args:
        make: makes an engine; called again for another one.

    Attributes:
        engine: the one that runs now; None while another one starts, and at the end.
        mailbox: brings the events of its streams to the event loop, those of a step together.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._closed = False
        self.mailbox = Mailbox()
        self.engine: Engine | None = self._started()

    def _started(self) -> Engine:
        engine = self._make()
        engine.on_turn(self.mailbox.deliver)
        return engine

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that the engine takes."""
        engine = self.engine
        return 0 if engine is None else engine.capacity

    @property
    def ready(self) -> bool:
        engine = self.engine
        return engine is not None and engine.health.alive

    def stats(self) -> EngineStats | None:
        engine = self.engine
        return engine.stats() if engine is not None and engine.health.alive else None

    async def watch(self, on_restart: Callable[[], None]) -> None:
        """Look after it until cancelled."""
        while not self._closed:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.ready or self._closed:
                continue
            await asyncio.to_thread(self._restart, on_restart)

    def _restart(self, on_restart: Callable[[], None]) -> None:
        _log.error("the engine has ended; starting another one")
        self.engine = None  # so that its memory is free before the next one takes its own
        gc.collect()
        try:
            self.engine = self._started()
            on_restart()
        except GodwitError as error:
            _log.error("the engine cannot be started: %s", error)
        if self._closed:  # meanwhile
            self.close()

    def close(self) -> None:
        """End the engine, for good; blocks until the step under way is done."""
        self._closed = True
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()
