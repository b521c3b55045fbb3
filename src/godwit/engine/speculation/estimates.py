"""What speculation learns: acceptance rates and medians of measured times."""

from __future__ import annotations

from collections import deque

#: Estimate for drafts that were never judged.
PRIOR = 0.5
#: Weight of the newest draft in the estimate of one sequence: about the last ten drafts count.
OWN_WEIGHT = 0.1
#: Weight of the newest draft in the estimate that new sequences start from: about the last fifty count.
SHARED_WEIGHT = 0.02
#: Measurements of which the median is taken: two disturbed ones do no harm, and five follow a change quickly.
WINDOW = 5


class Acceptance:
    """The rate at which drafts are accepted, by their kind: a moving average.

    Each rate is of drafts before which all others of the step were accepted.

    Args:
        shared: what a sequence starts from, and what learns from all sequences; None makes a shared one.
    """

    def __init__(self, shared: Acceptance | None = None) -> None:
        self._shared = shared
        self._weight = SHARED_WEIGHT if shared is None else OWN_WEIGHT
        self._rates: dict[int, float] = {}

    def rate(self, kind: int) -> float:
        """The probability that the next draft of this kind is accepted."""
        if kind not in self._rates and self._shared is not None:
            return self._shared.rate(kind)
        return self._rates.get(kind, PRIOR)

    def learn(self, kind: int, accepted: bool) -> None:
        """Count a draft that was judged."""
        rate = self.rate(kind)
        self._rates[kind] = rate + self._weight * (accepted - rate)
        if self._shared is not None:
            self._shared.learn(kind, accepted)


class RecentMedian:
    """The lower median of the newest measurements, which outliers do not move."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self._newest)

    @property
    def value(self) -> float:
        return sorted(self._newest)[(len(self._newest) - 1) // 2]

    def add(self, value: float) -> None:
        self._newest.append(value)
