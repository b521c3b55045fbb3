"""Several sequences in the same caches, at different points of their lives, and what the caches cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import PagedKV, PagedKVSpec, RecurrentSpec, RecurrentState
from godwit.models.causal_lm import CausalLM
from tests.models.families import BY_NAME, Family
from tests.models.harness import error, packed_logits, poison, randomize, tokens

FAMILIES = [BY_NAME[name] for name in ("qwen3_next", "qwen3_5_moe wrapper", "llama with biases")]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def model(request: pytest.FixtureRequest) -> CausalLM:
    family: Family = request.param
    made = CausalLM(ModelConfig.from_dict({"model_type": family.model_type, **family.fields}))
    randomize(made)
    return made.requires_grad_(False)


def test_a_batch_of_sequences_in_different_phases(model: CausalLM) -> None:
    """Three sequences whose prompts arrive in pieces of different lengths while others decode or rest."""
    whole = [tokens(length, seed=length) for length in (90, 35, 20)]
    steps = (((64, 0), (0, 1)), ((1, 0), (33, 1), (17, 2)), ((25, 0), (1, 1)), ((1, 2), (1, 1)), ((2, 2),))
    caches = model.allocate_caches(num_blocks=12, num_rows=5)
    poison(caches)
    tables, rows = [[7, 1, 10, 3, 11, 0], [5, 2, 8], [9, 4]], [4, 0, 2]
    for row in rows:
        caches.reset_row(row)
    past = [0, 0, 0]
    out: list[list[Tensor]] = [[], [], []]
    for step in steps:
        chosen = [sequence for _, sequence in step]
        pieces = [whole[s][past[s] : past[s] + count] for count, s in step]
        batch = ForwardBatch.cached(
            pieces, [past[s] for s in chosen], [tables[s] for s in chosen], [rows[s] for s in chosen]
        )
        logits = model.compute_logits(model(batch, caches))
        for piece, sequence in zip(torch.split(logits, batch.lengths), chosen, strict=True):
            out[sequence].append(piece)
            past[sequence] += piece.shape[0]
    assert past == [90, 35, 20]
    for parts, ids in zip(out, whole, strict=True):
        assert error(torch.cat(parts), packed_logits(model, [ids])) < 1e-4


def test_a_row_can_be_used_again(model: CausalLM) -> None:
    caches = model.allocate_caches(num_blocks=4, num_rows=1)
    for seed in (1, 2):
        ids = tokens(50, seed)
        caches.reset_row(0)
        batch = ForwardBatch.cached([ids], [0], [[3, 0, 2, 1]], [0])
        assert error(model.compute_logits(model(batch, caches)), packed_logits(model, [ids])) < 1e-4


def test_logits_of_chosen_rows(model: CausalLM) -> None:
    ids = torch.tensor(tokens(12))
    batch = ForwardBatch.packed(ids, [5, 7])
    hidden = model(batch)
    every = model.compute_logits(hidden)
    assert batch.last_rows is not None and batch.last_rows.tolist() == [4, 11]
    torch.testing.assert_close(model.compute_logits(hidden, batch.last_rows), every[[4, 11]])
    single = ForwardBatch.packed(ids[:3], [1, 1, 1])
    assert single.last_rows is None and model.compute_logits(model(single), single.last_rows).shape[0] == 3


def test_specs_say_what_is_allocated(model: CausalLM) -> None:
    caches = model.allocate_caches(num_blocks=3, num_rows=2)
    for spec, cache in zip(model.cache_specs(), caches.layers, strict=True):
        if isinstance(cache, PagedKV) and isinstance(spec, PagedKVSpec):
            assert (cache.k.nbytes + cache.v.nbytes) == 3 * BLOCK_SIZE * spec.bytes_per_token
        elif isinstance(cache, RecurrentState) and isinstance(spec, RecurrentSpec):
            assert cache.state.dtype == torch.float32
            assert cache.state.nbytes + cache.conv.nbytes == 2 * spec.bytes_per_sequence
        else:
            raise AssertionError((spec, cache))


def test_states_stay_float32_in_a_bfloat16_model(model: CausalLM) -> None:
    model.bfloat16()
    caches = model.allocate_caches(num_blocks=6, num_rows=1, max_rollback=2)
    for state in caches.recurrent():
        assert state.conv.dtype == torch.bfloat16
        assert {state.state.dtype, state.journal_k.dtype, state.journal_delta.dtype} == {torch.float32}
    batch = ForwardBatch.cached([tokens(70)], [0], [[0, 1, 2, 3, 4]], [0])
    out = model(batch, caches)
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_lengths_must_add_up() -> None:
    with pytest.raises(UsageError, match="7 tokens cannot be split into sequences of total 6"):
        ForwardBatch.packed(torch.zeros(7, dtype=torch.long), [2, 4])


def test_packed_positions_begin_anew() -> None:
    batch = ForwardBatch.packed(torch.zeros(6, dtype=torch.long), [1, 3, 2])
    assert batch.positions.tolist() == [0, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens == (0, 1, 4, 6) and batch.lengths == [1, 3, 2]


def test_cached_slots_follow_the_block_table() -> None:
    batch = ForwardBatch.cached([[1, 2, 3], [4]], [15, 0], [[2, 5], [7]], [1, 0])
    assert batch.slot_mapping is not None and batch.block_tables is not None
    assert batch.slot_mapping.tolist() == [2 * 16 + 15, 5 * 16, 5 * 16 + 1, 7 * 16]
    assert batch.positions.tolist() == [15, 16, 17, 0]
    assert batch.block_tables.tolist() == [[2, 5], [7, 0]]
    assert batch.seq_lens == (18, 1) and batch.num_tentative == (0, 0)
