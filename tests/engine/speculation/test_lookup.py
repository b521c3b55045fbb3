"""Prompt lookup: which earlier passage is followed, and what is learned of its predictions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.engine.scheduler import Sequence
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.lookup import MAX_INDEXED, MAX_STREAK, LookupDrafts, TextIndex, continuation


def predictions(ids: list[int], num_prompt: int = 0) -> tuple[TextIndex, int | None]:
    index = TextIndex(Acceptance())
    return index, index.predict(ids, num_prompt)


def test_what_followed_the_newest_tokens_last_is_predicted() -> None:
    ids = [1, 2, 3, 7, 1, 2, 3, 8, 0, 1, 2, 3]
    index, place = predictions(ids, len(ids))
    assert place == 7  # the later of two
    assert index.predict([*ids, 99], len(ids)) is None
    assert predictions([1, 2, 1, 2])[1] is None  # two tokens are too few


def test_a_passage_is_followed_while_it_agrees() -> None:
    """Not the newest place where three tokens stood, once another one was right."""
    passage = [1, 2, 3, 4, 5, 6, 7]
    ids = [*passage, 0, 3, 4, 5, 9, 0, 1, 2, 3, 4, 5]
    index, place = predictions(ids, 13)
    assert place == 5 and index.streak == 2
    assert predictions(ids, len(ids))[1] == 11  # nothing was compared in a prompt
    assert index.predict([*ids, 99], 13) is None and index.streak == 0


def test_a_loop_is_continued_beyond_the_end() -> None:
    ids = [5, 1, 2, 3, 1, 2, 3, 1, 2]
    _, place = predictions(ids)
    assert place is not None and continuation(ids, place, 7) == [3, 1, 2, 3, 1, 2, 3]
    assert continuation([1, 2, 3, 4], 1, 3) == [2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=60), step=st.integers(1, 9))
def test_predictions_are_true_to_the_text_and_none_is_missed(ids: list[int], step: int) -> None:
    index = TextIndex(Acceptance())
    for end in [*range(0, len(ids), step), len(ids)]:
        known = ids[:end]
        place = index.predict(known, 0)
        assert index.predict(known, 0) == place
        if place is not None:
            assert 3 <= place < end and known[place - 3 : place] == known[-3:]
        assert (place is not None) == (known[-3:] in [known[i : i + 3] for i in range(end - 3)])


def test_every_token_of_an_answer_is_compared_with_its_prediction() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]
    shared = Acceptance()
    index = TextIndex(Acceptance(shared))
    index.predict(ids[:11], 11)
    assert index.rates(2) == [0.5, 0.5]
    index.predict(ids, 11)
    assert index.streak == 5 and all(rate > 0.5 for rate in index.rates(3))
    assert [shared.rate(kind) > 0.5 for kind in range(MAX_STREAK + 2)] == [True] * (MAX_STREAK + 1) + [False]
    index.predict([*ids, 99], 11)
    assert index.streak == 0 and shared.rate(MAX_STREAK) < 0.52 and shared.rate(0) > 0.5


def test_drafts_after_a_streak_are_likelier() -> None:
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.learn(0, False)
        acceptance.learn(1, True)
    index = TextIndex(acceptance)
    assert index.rates(2) == [pytest.approx(0.149, abs=0.01), pytest.approx(0.851, abs=0.01)]
    index.streak = 1
    assert index.rates(1)[0] > 0.8


def test_a_long_prompt_is_indexed_in_parts() -> None:
    ids = [*range(100), *range(1000, 1000 + 2 * MAX_INDEXED), *range(100)]
    index, counts, places = TextIndex(Acceptance()), list[int](), list[int | None]()
    for _ in range(4):
        before = index.num_indexed
        places.append(index.predict(ids, len(ids)))
        counts.append(index.num_indexed - before)
    assert counts == [MAX_INDEXED, MAX_INDEXED, 200, 0]
    assert places == [None, None, 100, 100]


def test_sequences_are_told_apart_and_forgotten() -> None:
    source = LookupDrafts(Acceptance())
    one, other = Sequence(0, [1, 2, 3, 4, 1, 2, 3], 7, 99), Sequence(1, [5, 6, 7, 8], 4, 99)
    assert source.rates(one, 3) == [0.5] * 3 and source.rates(other, 3) == []
    assert source.draft({one: 3, other: 2}) == {one: [4, 1, 2]}
    source.forget(one)
    source.forget(one)
    assert set(source.indexes) == {other}
