"""Acceptance rates and medians."""

from __future__ import annotations

import pytest

from godwit.engine.speculation.estimates import Acceptance, RecentMedian


def learn(acceptance: Acceptance, accepted: bool, count: int, kind: int = 0) -> None:
    for _ in range(count):
        acceptance.learn(kind, accepted)


def test_a_rate_follows_the_newest_drafts() -> None:
    own = Acceptance(Acceptance())
    assert own.rate(0) == 0.5
    learn(own, True, 7)
    assert 0.7 < own.rate(0) < 0.85
    learn(own, False, 7)
    assert 0.3 < own.rate(0) < 0.5
    learn(own, True, 100)
    assert own.rate(0) > 0.99 and own.rate(1) == 0.5


def test_a_new_sequence_starts_from_those_before_it() -> None:
    shared = Acceptance()
    learn(Acceptance(shared), True, 35)
    assert 0.7 < Acceptance(shared).rate(0) == shared.rate(0) < 0.85
    other = Acceptance(shared)
    learn(other, False, 20)
    assert other.rate(0) < 0.2 and 0.4 < shared.rate(0) < 0.6
    assert other.rate(1) == 0.5


def test_a_median_ignores_outliers_and_follows_changes() -> None:
    median = RecentMedian()
    median.add(3.0)
    median.add(90.0)
    assert (median.value, len(median)) == (3.0, 2)
    for value in (2.0, 80.0, 2.5):
        median.add(value)
    assert (median.value, len(median)) == (3.0, 5)
    for _ in range(3):
        median.add(7.0)
    assert median.value == pytest.approx(7.0)
