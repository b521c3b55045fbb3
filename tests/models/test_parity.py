"""Logits, greedy tokens, losses and gradients equal those of ``transformers``, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import harness
from tests.models.harness import CASES, Pair


@pytest.mark.parametrize("case", CASES)
def test_parity(pair: Pair, case: str, tmp_path: Path) -> None:
    assert CASES[case](pair, tmp_path / "saved") <= harness.limit(case)


def test_prompt_is_cut_completely() -> None:
    assert {sum(cuts) for cuts in harness.CUTS} == {harness.PROMPT_TOKENS}
