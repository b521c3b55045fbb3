"""What speculation learns from real steps: means, medians, curves of costs, shares of accepted drafts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_PATIENCE = 32, 8192  # steps between one failure and the next try, at first and at most
_NEWEST = 0.15  # share of the newest measurement, at least


@dataclass
class Mean:
    """A mean that follows what it measures, but not far for a value that is out of all proportion."""

    value: float
    count: int = 0

    def learn(self, value: float, tolerance: float) -> None:
        self.count += 1
        error = value - self.value
        if self.count > 1:
            error = max(-tolerance, min(tolerance, error))
        self.value += error * max(1 / self.count, _NEWEST)


class Median:
    """The median of the newest measurements: a disturbance does not move it."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=5)
        self.count = 0

    @property
    def value(self) -> float:
        ordered = sorted(self._newest)
        return ordered[len(ordered) // 2]

    def learn(self, value: float) -> None:
        self._newest.append(value)
        self.count += 1


@dataclass
class Patience:
    """Steps to wait for the next try of something; each failure in a row doubles them."""

    wait: int = 0
    length: int = _PATIENCE[0]
    shortest: int = _PATIENCE[0]

    def fail(self) -> None:
        self.wait = self.length
        self.length = min(2 * self.length, _PATIENCE[1])

    def succeed(self) -> None:
        self.length = self.shortest


class Curve:
    """A cost by the number of drafts: 0 for none, straight between whole numbers.

    Where nothing was measured yet, it is proportional to the nearest that was.
    """

    def __init__(self, size: int, slope: float) -> None:
        self._points = [Mean(slope * x) for x in range(size + 2)]

    def at(self, x: float) -> float:
        low = min(int(x), len(self._points) - 2)
        first, second = self._points[low].value, self._points[low + 1].value
        return first + (x - low) * (second - first)

    @property
    def known(self) -> int:
        """The largest number of drafts that was measured."""
        return max((number for number, point in enumerate(self._points) if point.count), default=0)

    def learn(self, x: float, value: float) -> None:
        """Between whole numbers the nearer one learns, in proportion."""
        if x <= 0:
            return
        place = min(max(1, round(x)), len(self._points) - 1)
        point = self._points[place]
        value = max(0.0, value) * place / x
        if not point.count:  # it may be a disturbance
            value = min(value, point.value + place)
        point.learn(value, max(0.5, abs(point.value)))
        known = [number for number, other in enumerate(self._points) if other.count]
        for number, other in enumerate(self._points):
            if number and not other.count:
                nearest = min(known, key=lambda one: abs(one - number))
                other.value = self._points[nearest].value * number / nearest


class Acceptance:
    """Shares of drafts that were accepted, by kind: of one sequence, leaning on those of all before.

    Each is of the drafts of which all before were accepted; old ones count ever less.
    """

    PRIOR = 0.5
    _OWN, _ALL = 0.9, 0.99  # what is left of the weight of a draft when the next one comes
    _LEAN = 3.0

    def __init__(self, shared: Acceptance | None = None) -> None:
        self._shared = shared
        self._counts: dict[int, tuple[float, float]] = {}

    def learn(self, kind: int, accepted: bool) -> None:
        hits, trials = self._counts.get(kind, (0.0, 0.0))
        keep = self._ALL if self._shared is None else self._OWN
        self._counts[kind] = hits * keep + accepted, trials * keep + 1
        if self._shared is not None:
            self._shared.learn(kind, accepted)

    def estimate(self, kind: int) -> float:
        """The probability that the next draft of this kind is accepted."""
        before = self.PRIOR if self._shared is None else self._shared.estimate(kind)
        hits, trials = self._counts.get(kind, (0.0, 0.0))
        return (hits + self._LEAN * before) / (trials + self._LEAN)
