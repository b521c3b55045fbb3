"""Drafting and taking back leaves the very numbers that plain decoding leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.kernels import ops, reference
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from godwit.qtensor import FORMATS
from tests.models.harness import CachedRun, randomize, tokens

NUM_DRAFTS = 4
#: Widths are multiples of 32 per token and there is no single shared gate: PyTorch's sigmoid rounds whole
#: vectors and what remains of them differently, so other widths would depend on how many tokens a step has.
CONFIG = {
    "model_type": "qwen3_next",
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 0,
}


@pytest.fixture(params=["plain", *FORMATS])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """A model whose results for a token do not depend on how many tokens are computed with it.

    That is what the native kernels promise, whatever the weights. PyTorch's products choose their algorithm
    by shape, so on its kernels they run row by row; what is left to differ is the bookkeeping of the caches,
    which must be exact.
    """
    if request.param != "plain":
        return pack_model(random_model(), request.param)
    plain = torch.nn.functional.linear

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = [plain(row, w, bias) for row in x.reshape(-1, 1, x.shape[-1])]
        return torch.cat(rows).view(*x.shape[:-1], -1) if rows else plain(x, w, bias)

    def attention(
        q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], scale: float
    ) -> Tensor:
        rows = []
        for query, key, value in zip(torch.split(q, list(lengths)), keys, values, strict=True):
            for index in range(query.shape[0]):
                seen = key.shape[0] - query.shape[0] + index + 1
                rows.append(
                    reference.attention(query[index : index + 1], [key[:seen]], [value[:seen]], [1], scale)
                )
        return torch.cat(rows)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    paged_attention = partial(reference.paged_attention, attend=attention)
    monkeypatch.setitem(ops._TABLE, ("paged_attention", "dense", "cpu"), paged_attention)
    return random_model()


def random_model() -> CausalLM:
    made = CausalLM(ModelConfig.from_dict(CONFIG), num_mtp=1).requires_grad_(False)
    randomize(made)
    return made


def one_by_one(run: CachedRun, ids: Sequence[int]) -> Tensor:
    return torch.cat([run.step([token]) for token in ids])


@pytest.mark.parametrize("accepted", range(NUM_DRAFTS + 1))
def test_as_if_never_drafted(model: CausalLM, accepted: int) -> None:
    """Three rounds of drafts of which the first few are right, against the right tokens one by one."""
    prompt, truth = tokens(70, seed=1), tokens(40, seed=2)
    drafting, plain = CachedRun(model, max_rollback=NUM_DRAFTS), CachedRun(model)
    assert torch.equal(drafting.step(prompt), plain.step(prompt))
    done = 0
    for round_ in range(3):
        right = truth[done : done + 1 + accepted]
        wrong = tokens(NUM_DRAFTS - accepted, seed=100 + round_)
        verified = drafting.step(right + wrong, tentative=NUM_DRAFTS)
        drafting.rollback(NUM_DRAFTS - accepted)
        assert torch.equal(verified[: 1 + accepted], one_by_one(plain, right))
        done += len(right)
    rest = truth[done : done + 5]
    assert torch.equal(one_by_one(drafting, rest), one_by_one(plain, rest))
    long = tokens(66, seed=3)  # through the chunked rule, which begins with a settled journal
    assert torch.equal(drafting.step(long), plain.step(long))
    assert_same_state(drafting, plain)


def assert_same_state(a: CachedRun, b: CachedRun) -> None:
    for ours, theirs in zip(a.caches.recurrent(), b.caches.recurrent(), strict=True):
        assert torch.equal(ours.state[a.row], theirs.state[b.row])
        assert torch.equal(ours.conv[a.row, -ours.history :], theirs.conv[b.row, -theirs.history :])


def test_rolling_back_in_two_steps_is_the_same(model: CausalLM) -> None:
    prompt, steps = tokens(20), tokens(5, seed=4)
    once, twice = CachedRun(model, max_rollback=4), CachedRun(model, max_rollback=4)
    for run in (once, twice):
        run.step(prompt)
        run.step(steps, tentative=4)
    once.rollback(3)
    twice.rollback(1)
    twice.rollback(2)
    assert torch.equal(once.step([7]), twice.step([7]))


def test_all_tokens_of_a_step_may_be_undone(model: CausalLM) -> None:
    run, plain = CachedRun(model, max_rollback=3), CachedRun(model)
    for each in (run, plain):
        each.step(tokens(20))
    run.step([1, 2, 3], tentative=3)
    run.rollback(3)
    assert torch.equal(run.step([9]), plain.step([9]))


def test_other_rows_keep_their_journal(model: CausalLM) -> None:
    """A step of one sequence neither settles nor spoils the drafts of another in the same caches."""
    run, plain = CachedRun(model, max_rollback=2), CachedRun(model)
    for each in (run, plain):
        each.step(tokens(20))
    run.step([1, 2, 3], tentative=2)
    other = CachedRun(model)
    other.caches, other.row = run.caches, 2
    other.blocks = [block for block in range(23) if block not in run.blocks]
    run.caches.reset_row(2)
    other.step(tokens(9, seed=5))
    other.step([4])
    run.rollback(1)
    one_by_one(plain, [1, 2])
    assert torch.equal(run.step([8]), plain.step([8]))


def test_mtp_slots_of_drafts_are_overwritten(model: CausalLM) -> None:
    """Chained guesses write slots beyond the true ones; the true hidden states replace them."""
    prompt, truth = tokens(20, seed=1), tokens(8, seed=2)
    drafting, plain = CachedRun(model, max_rollback=2), CachedRun(model)
    for run in (drafting, plain):
        run.mtp(run.step(prompt), [*prompt[1:], truth[0]], 0)
    guess = drafting.mtp(torch.randn(1, 64), [3], 20)
    drafting.mtp(guess, [4], 21)
    hidden = drafting.step([truth[0], truth[1], 99], tentative=2)
    drafting.rollback(1)
    ours = [drafting.mtp(hidden[i : i + 1], [truth[i + 1]], 20 + i) for i in range(2)]
    theirs = [plain.mtp(plain.step([truth[i]]), [truth[i + 1]], 20 + i) for i in range(2)]
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_undoing_more_than_was_tentative_is_refused(model: CausalLM) -> None:
    run = CachedRun(model, max_rollback=2)
    run.step(tokens(20))
    with pytest.raises(UsageError, match="cannot undo 1 tokens"):
        run.rollback(1)
    run.step([1, 2, 3], tentative=2)
    with pytest.raises(UsageError, match="cannot undo 3 tokens: the last step declared 2 tentative"):
        run.rollback(3)
    with pytest.raises(UsageError, match="cannot undo -1"):
        run.rollback(-1)
    run.rollback(2)
    with pytest.raises(UsageError, match="cannot undo 1"):
        run.rollback(1)
    run.step([1, 2, 3], tentative=2)
    run.step([4])
    with pytest.raises(UsageError, match="cannot undo 1"):
        run.rollback(1)


@pytest.mark.parametrize(("ids", "tentative"), [([1, 2, 3, 4], 3), ([1], 2), ([1, 2], -1)])
def test_more_tentative_tokens_than_there_is_room_are_refused(
    model: CausalLM, ids: list[int], tentative: int
) -> None:
    run = CachedRun(model, max_rollback=2)
    run.step(tokens(5))
    before = [cache.state.clone() for cache in run.caches.recurrent()]
    with pytest.raises(UsageError, match="tentative"):
        run.step(ids, tentative=tentative)
    for cache, state in zip(run.caches.recurrent(), before, strict=True):
        assert torch.equal(cache.state[run.row], state[run.row])
