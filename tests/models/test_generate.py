from __future__ import annotations

import pytest
import torch
from torch import Tensor

from godwit.errors import UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.generate import argmax, generate
from tests.engine.tiny import CONFIGS, tiny_model

PROMPT = [5, 200, 17, 17, 90]


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_token_is_the_likeliest_after_all_before_it(kind: str) -> None:
    model = tiny_model(kind)
    made = generate(model, PROMPT, max_tokens=20)
    assert len(made) == 20 and len(set(made)) > 5
    ids = PROMPT + made
    hidden = model(ForwardBatch.packed(torch.tensor(ids), [len(ids)]))
    rows = torch.arange(len(PROMPT) - 1, len(ids) - 1)
    assert model.compute_logits(hidden, rows).argmax(-1).tolist() == made


def test_a_stop_id_ends_it_and_is_the_last() -> None:
    model = tiny_model("hybrid")
    made = generate(model, PROMPT, max_tokens=20)
    stop = made[7]
    assert generate(model, PROMPT, max_tokens=20, stop_ids={stop}) == made[: made.index(stop) + 1]
    assert generate(model, PROMPT, max_tokens=0) == []


def test_the_choice_is_the_callers() -> None:
    seen: list[Tensor] = []

    def pick(logits: Tensor) -> int:
        seen.append(logits)
        return 3

    assert generate(tiny_model("attention"), PROMPT, max_tokens=2, pick=pick) == [3, 3]
    assert [logits.shape for logits in seen] == [(272,), (272,)]
    assert not seen[0].requires_grad


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    logits = torch.zeros(5000)
    logits[[4000, 77, 3]] = 1.0
    assert argmax(logits) == 3


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        generate(tiny_model("attention"), [], max_tokens=1)
