"""What a connection is waiting for, and until when: one state machine, which knows no sockets."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from godwit.server.limits import Limits

#: The application tells a client that its body is late; if it does not, the connection is cut then.
BODY_GRACE = 5.0
#: After the last response, for a client that still sends, so that it reads the response before it fails.
CLOSING_SECONDS = 2.0
#: A client that takes fewer bytes than these in the time for writing takes none.
MIN_PROGRESS = 16 << 10


class Phase(Enum):
    """What comes next on a connection."""

    IDLE = "the first byte of another request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    ANSWER = "the end of the response"
    CLOSING = "the client's own end"


class Deadlines:
    """The deadlines of a connection, each set when its phase begins and never by single bytes.

    A connection begins with HEAD: one that never sends anything is let go as soon as one that stops in the
    middle of a head. Writing may stall in every phase and has a deadline of its own.

    Args:
        limits: with the seconds for each phase.
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
        """Nothing is being done for the client: it may be let go to make room for another."""
        return self.phase in (Phase.IDLE, Phase.HEAD)

    @property
    def due(self) -> float | None:
        """When to look again; None: there is no deadline."""
        seconds = self._seconds.get(self.phase)
        phase = None if seconds is None else self.since + seconds
        stall = None if self._stalled_since is None else self._stalled_since + self._write_seconds
        return min((time for time in (phase, stall) if time is not None), default=None)

    def received(self) -> None:
        """Bytes have come: where nothing was expected, these begin a head."""
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEAD)

    def head_read(self) -> None:
        """A whole head has come."""
        self._enter(Phase.BODY)

    def body_read(self) -> None:
        """The whole body has come, also if there is none."""
        if self.phase is Phase.BODY:
            self._enter(Phase.ANSWER)

    def answered(self) -> None:
        """The response is complete, and so was its request."""
        self._enter(Phase.IDLE)

    def closing(self) -> None:
        """Nothing more is read or answered."""
        self._enter(Phase.CLOSING)

    def write_paused(self, num_waiting: int) -> None:
        """The client does not take what is sent; so many bytes wait for it."""
        if self._stalled_since is None:
            self._stalled_since, self._stalled_at = self._clock(), num_waiting

    def write_resumed(self) -> None:
        """The client has taken enough to go on."""
        self._stalled_since = None

    def missed(self, num_waiting: int) -> str | None:
        """Which deadline has passed, in words for the log; None: none, or the client is making progress.

        Args:
            num_waiting: bytes that wait to be sent.
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
