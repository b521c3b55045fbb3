"""The deadlines of a connection: a state machine without sockets."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from godwit.server.limits import Limits

#: The application answers a late body with 408; if it does not, the connection is cut after this time.
BODY_GRACE = 5.0
#: After the last response, for a client that still sends, so that it can read the response.
CLOSING_SECONDS = 2.0
#: A client that reads fewer bytes in ``write_seconds`` is stalled.
MIN_PROGRESS = 16 << 10


class Phase(Enum):
    """What a connection is waiting for."""

    IDLE = "the first byte of another request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    ANSWER = "the end of the response"
    CLOSING = "the client's own end"


class Deadlines:
    """The deadlines of a connection. Each is set when its phase begins; single bytes do not extend it.

    A connection begins with HEAD, so that one that never sends anything has the deadline of one that stops in
    the middle of a head. Writing can stall in every phase and has its own deadline.

    Args:
        limits: with the seconds of each phase.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._seconds = {
            Phase.IDLE: limits.idle_seconds,
            Phase.HEAD: limits.head_seconds,
            Phase.BODY: limits.body_seconds + BODY_GRACE,
            Phase.CLOSING: CLOSING_SECONDS,
        }
        self._write_seconds = limits.write_seconds
        self._clock = clock
        self._stalled_since: float | None = None
        self._stalled_at = 0
        self.phase, self.since = Phase.HEAD, clock()

    def _enter(self, phase: Phase) -> None:
        if self.phase is not Phase.CLOSING:
            self.phase, self.since = phase, self._clock()

    @property
    def waiting(self) -> bool:
        """No request is in progress: the connection may be closed to make room for another."""
        return self.phase in (Phase.IDLE, Phase.HEAD)

    @property
    def due(self) -> float | None:
        """The next deadline, if there is one."""
        seconds = self._seconds.get(self.phase)
        phase = None if seconds is None else self.since + seconds
        stall = None if self._stalled_since is None else self._stalled_since + self._write_seconds
        return min((time for time in (phase, stall) if time is not None), default=None)

    def received(self) -> None:
        """Bytes have come; on an idle connection they begin a head."""
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEAD)

    def head_read(self) -> None:
        """The head is complete."""
        self._enter(Phase.BODY)

    def body_read(self) -> None:
        """The body is complete, or there is none."""
        if self.phase is Phase.BODY:
            self._enter(Phase.ANSWER)

    def answered(self) -> None:
        """The response and its request are complete."""
        self._enter(Phase.IDLE)

    def closing(self) -> None:
        """Nothing more is read or answered."""
        self._enter(Phase.CLOSING)

    def write_paused(self, num_waiting: int) -> None:
        """The client does not read its response; so many bytes are waiting."""
        if self._stalled_since is None:
            self._stalled_since, self._stalled_at = self._clock(), num_waiting

    def write_resumed(self) -> None:
        """The client has read enough to go on."""
        self._stalled_since = None

    def missed(self, num_waiting: int) -> str | None:
        """The deadline that has passed, in words for the log; None: none, or the client is making progress.

        Args:
            num_waiting: bytes waiting to be sent.
        """
        now = self._clock()
        if self._stalled_since is not None and now >= self._stalled_since + self._write_seconds:
            if self._stalled_at - num_waiting < MIN_PROGRESS:
                return "the client does not read its response"
            self._stalled_since, self._stalled_at = now, num_waiting
        seconds = self._seconds.get(self.phase)
        if seconds is None or now < self.since + seconds:
            return None
        if self.phase is Phase.CLOSING and num_waiting:
            self.write_paused(num_waiting)
            self.since = now
            return None
        return f"the client did not send {self.phase.value} in time"
