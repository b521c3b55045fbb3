"""The deadlines of a connection and the places of all, with a clock that stands still until it is turned."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from godwit.server.connections.deadlines import BODY_GRACE, CLOSING_SECONDS, MIN_PROGRESS, Deadlines, Phase
from godwit.server.connections.places import MAX_REFUSED, Places
from godwit.server.limits import Limits

LIMITS = Limits(head_seconds=20, body_seconds=60, idle_seconds=75, write_seconds=30)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Timed:
    """Deadlines and their clock."""

    clock: Clock = field(default_factory=Clock)
    deadlines: Deadlines = field(init=False)

    def __post_init__(self) -> None:
        self.deadlines = Deadlines(LIMITS, self.clock)

    def after(self, seconds: float, num_waiting: int = 0) -> str | None:
        """What is missed when so many seconds have passed."""
        self.clock.now += seconds
        return self.deadlines.missed(num_waiting)

    def left(self) -> float | None:
        """Seconds until the next deadline."""
        return None if self.deadlines.due is None else self.deadlines.due - self.clock.now


@pytest.fixture
def timed() -> Timed:
    return Timed()


def test_a_connection_that_sends_nothing_or_half_a_head_is_let_go(timed: Timed) -> None:
    assert timed.left() == 20 and timed.after(19.9) is None
    timed.deadlines.received()  # a byte more sets no new deadline
    assert timed.left() == pytest.approx(0.1)
    assert "rest of a head" in str(timed.after(0.1))


def test_a_body_has_its_own_time_and_an_answer_as_much_as_it_takes(timed: Timed) -> None:
    timed.clock.now += 19
    timed.deadlines.head_read()
    assert timed.left() == 60 + BODY_GRACE and timed.after(64) is None
    timed.deadlines.received()
    assert timed.left() == BODY_GRACE + 60 - 64
    timed.deadlines.body_read()
    assert timed.left() is None and timed.after(1e6) is None
    timed.deadlines.answered()
    assert timed.deadlines.phase is Phase.IDLE


def test_a_body_that_never_ends_is_missed(timed: Timed) -> None:
    timed.deadlines.head_read()
    assert "rest of a body" in str(timed.after(60 + BODY_GRACE))


def test_deadlines_begin_anew_after_each_response(timed: Timed) -> None:
    for _ in range(3):
        timed.deadlines.head_read()
        timed.deadlines.body_read()
        timed.deadlines.answered()
        assert timed.left() == 75 and timed.after(74) is None
        timed.deadlines.received()
        assert timed.deadlines.phase is Phase.HEAD and timed.left() == 20
        assert timed.after(19) is None
    assert timed.after(1) is not None


def test_an_idle_connection_is_let_go(timed: Timed) -> None:
    timed.deadlines.head_read()
    timed.deadlines.body_read()
    timed.deadlines.answered()
    assert timed.deadlines.waiting
    assert "another request" in str(timed.after(75))


def test_a_client_that_does_not_read_is_cut_in_whatever_phase(timed: Timed) -> None:
    timed.deadlines.head_read()
    timed.deadlines.body_read()
    timed.deadlines.write_paused(100_000)
    assert timed.left() == 30 and timed.after(29, 100_000) is None
    timed.deadlines.write_paused(200_000)  # no new deadline either
    assert "does not read" in str(timed.after(1, 100_000))


def test_a_client_that_reads_slowly_is_let_be(timed: Timed) -> None:
    timed.deadlines.head_read()
    timed.deadlines.body_read()
    left = 10 * MIN_PROGRESS
    timed.deadlines.write_paused(left)
    for _ in range(8):
        left -= MIN_PROGRESS
        assert timed.after(30, left) is None and timed.left() == 30
    assert timed.after(30, left - MIN_PROGRESS + 1) is not None


def test_reading_again_ends_a_stall(timed: Timed) -> None:
    timed.deadlines.head_read()
    timed.deadlines.body_read()
    timed.deadlines.write_paused(100_000)
    timed.deadlines.write_resumed()
    assert timed.left() is None
    timed.deadlines.write_paused(100_000)
    assert timed.left() == 30


def test_the_end_of_a_connection_has_a_deadline_too(timed: Timed) -> None:
    timed.deadlines.closing()
    timed.deadlines.answered()  # comes after it where the last response is complete
    assert timed.deadlines.phase is Phase.CLOSING and timed.left() == CLOSING_SECONDS
    assert timed.after(CLOSING_SECONDS - 0.1) is None
    timed.deadlines.closing()
    assert timed.after(0.1) is not None


def test_the_end_waits_for_what_is_still_being_read(timed: Timed) -> None:
    timed.deadlines.closing()
    assert timed.after(CLOSING_SECONDS, 50_000) is None  # from now on it is watched
    assert timed.after(29, 50_000) is None
    assert timed.after(1, 50_000) is not None


@dataclass(eq=False)
class Fake:
    """A connection without a socket."""

    deadlines: Deadlines
    dropped: bool = False

    def drop(self) -> None:
        self.dropped = True


class House:
    """Places, and connections that come one second after another."""

    def __init__(self, connections: int, per_address: int) -> None:
        self.places = Places(Limits(connections=connections, per_address=per_address))
        self.clock = Clock()

    def come(self, address: str, busy: bool = False) -> tuple[Fake, bool | None]:
        self.clock.now += 1
        fake = Fake(Deadlines(LIMITS, self.clock))
        if busy:
            fake.deadlines.head_read()
        return fake, self.places.enter(fake, address)


def test_a_full_house_lets_the_longest_waiting_go() -> None:
    house = House(3, 9)
    guests = [house.come("127.0.0.1", busy)[0] for busy in (True, False, False)]
    _, place = house.come("127.0.0.1")
    assert place and [guest.dropped for guest in guests] == [False, True, False]
    assert len(house.places) == 3


def test_a_house_full_of_busy_ones_refuses_and_finally_cuts() -> None:
    house = House(2, 9)
    guests = [house.come("127.0.0.1", busy=True)[0] for _ in range(2)]
    answers = [house.come("127.0.0.1") for _ in range(MAX_REFUSED + 1)]
    assert [place for _, place in answers] == [False] * MAX_REFUSED + [None]
    house.places.leave(answers[0][0])
    assert house.come("127.0.0.1")[1] is False
    house.places.leave(guests[0])
    assert house.come("127.0.0.1")[1] is True


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("127.0.0.1", "127.0.0.1", False),
        ("::1", "::1", False),
        ("", "", False),
    ],
)
def test_an_address_has_its_share(first: str, second: str, same: bool) -> None:
    house = House(9, 1)
    assert house.come(first, busy=True)[1] is True
    assert house.come(second, busy=True)[1] is not same


def test_an_address_lets_go_of_its_own() -> None:
    house = House(9, 1)
    other, mine = house.come("192.0.2.1")[0], house.come("192.0.2.2")[0]
    assert house.come("192.0.2.2")[1] is True
    assert (other.dropped, mine.dropped) == (False, True)
