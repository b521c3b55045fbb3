from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from godwit.engine.stop_matcher import StopMatcher


def cut_naively(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is left of a text: up to the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


pieces = st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4)


@given(pieces, stops)
def test_stops_do_not_depend_on_the_pieces_and_never_show(pieces: list[str], stops: list[str]) -> None:
    wanted, stopped = cut_naively("".join(pieces), stops)
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert wanted.startswith(shown)  # nothing that would have to be taken back
        if matcher.matched is not None:
            break
    assert shown + matcher.flush() == wanted
    assert (matcher.matched is not None) == stopped


def test_only_what_may_become_a_stop_is_held() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("N") == ""
    assert matcher.push("T") == "ENT"
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
    assert matcher.push("D") == "D"
    assert StopMatcher([]).push("all") == "all"


def test_after_a_stop_nothing_comes() -> None:
    matcher = StopMatcher(["b", "abc"])
    assert matcher.push("xabc") == "xa" and matcher.matched == "b"
    assert matcher.push("more") == "" and matcher.flush() == ""
