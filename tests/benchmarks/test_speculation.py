from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from benchmarks import speculation
from benchmarks.speculation import Loaded, Numbers
from godwit.engine import Engine
from tests.engine.test_core import HYBRID


def test_both_engines_answer_alike_and_all_is_counted() -> None:
    loaded = Loaded("tiny", "q8", HYBRID, Numbers(HYBRID.config.vocab_size), {"temperature": 0.7})
    tokenizer: Any = loaded.tokenizer
    engines = [Engine(HYBRID, tokenizer, max_context=256, speculate=on) for on in (False, True)]
    args = Namespace(each=2, tokens=12, rounds=1)
    rows = [speculation.compare(engines, loaded, kind, 2, args) for kind in speculation.KINDS]
    for engine in engines:
        engine.close()
    assert engines[0].stats().completion_tokens == 3 * 2 * 4 * 12
    for row in rows:
        assert row["ratio"]["median"] == pytest.approx(row["speculating"]["median"] / row["plain"]["median"])
    machine = {"cores": 2, "cpu": "some"}
    settings = [{"model": "tiny", "format": "q8", **row} for row in rows]
    shown = speculation.table(
        {"settings": settings, "machine": machine, "threads": 2, "command": "c", "date": "d", "commit": "0"}
    )
    assert shown.count("| tiny, q8 | 2 |") == 3
    assert sorted(settings, key=speculation.key) == settings
