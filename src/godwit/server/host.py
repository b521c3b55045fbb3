"""EngineHost: keeps an engine running, and knows whether its steps succeed."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from time import monotonic

from godwit.engine import Engine, EngineStats, GenerationRequest, Health, Stream
from godwit.errors import GodwitError
from godwit.server.errors import overloaded
from godwit.server.mailbox import Mailbox

#: After so many failed steps in a row, with none that succeeded, the engine is not ready ...
MAX_FAILURES = 3
#: ... for so many seconds after the last; then it may be tried again.
RETRY_SECONDS = 30.0
_WATCH_SECONDS = 1.0
_log = logging.getLogger("godwit.server")


class EngineHost:
    """Runs an engine, and replaces it when its thread has ended.

    Args:
        make: makes an engine; called again for each replacement.
        clock: seconds.

    Attributes:
        engine: the running engine; None while it is replaced, and after :meth:`close`.
        mailbox: delivers the events of its streams to the event loop, those of a step together.
    """

    def __init__(self, make: Callable[[], Engine], clock: Callable[[], float] = monotonic) -> None:
        self._make = make
        self._clock = clock
        self._closed = False
        self.mailbox = Mailbox()
        self.engine: Engine | None = None
        self.engine = self._started()

    def _started(self) -> Engine:
        self._num_failures = self._failures_in_a_row = 0
        self._last_failure = -RETRY_SECONDS
        engine = self._make()
        engine.on_turn(self._after_step)
        return engine

    def _after_step(self) -> None:
        """Runs in the engine's thread, before clients hear of what came of the step."""
        if (engine := self.engine) is not None:
            self._count(engine.health)
        self.mailbox.deliver()

    def _count(self, health: Health) -> None:
        failed = health.num_failures - self._num_failures
        if failed:
            self._num_failures = health.num_failures
            self._failures_in_a_row += failed
            self._last_failure = self._clock()
        elif health.ok:
            self._failures_in_a_row = 0

    @property
    def context(self) -> int:
        """The tokens of prompt and answer that fit the engine."""
        engine = self.engine
        return 0 if engine is None else engine.capacity

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        engine = self.engine
        return engine is not None and engine.health.alive

    @property
    def trouble(self) -> str | None:
        """Why the engine is not ready, in words for anyone; None: it is."""
        if not self.alive:
            return "the engine is not running"
        failing = self._failures_in_a_row >= MAX_FAILURES
        if failing and self._clock() < self._last_failure + RETRY_SECONDS:
            return f"the last {self._failures_in_a_row} steps of the engine failed; see the server's log"
        return None

    def stats(self) -> EngineStats | None:
        """The engine's counts; None while it does not run."""
        engine = self.engine
        return engine.stats() if engine is not None and engine.health.alive else None

    def submit(self, request: GenerationRequest) -> Stream:
        """Hand a request to the engine.

        Raises:
            ApiError: the engine is being restarted.
            GodwitError: the engine refuses the request.
        """
        engine = self.engine
        if engine is None or not engine.health.alive:
            raise overloaded("the engine is restarting; send the request again in a moment")
        return engine.submit(request)

    async def watch(self, on_restart: Callable[[], None]) -> None:
        """Replace the engine whenever its thread has ended, until cancelled."""
        while not self._closed:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.alive or self._closed:
                continue
            await asyncio.to_thread(self._restart, on_restart)

    def _restart(self, on_restart: Callable[[], None]) -> None:
        _log.error("the engine has ended; starting another one")
        self.engine = None  # frees its memory before the next one takes its own
        gc.collect()
        try:
            self.engine = self._started()
            on_restart()
        except GodwitError as error:
            _log.error("the engine cannot be started: %s", error)
        if self._closed:  # meanwhile
            self.close()

    def close(self) -> None:
        """End the engine for good. Blocks until the current step is done."""
        self._closed = True
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()
