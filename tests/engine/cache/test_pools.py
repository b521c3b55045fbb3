from __future__ import annotations

import random

import pytest
import torch

from godwit.engine import CacheSize, HybridCache
from godwit.engine.cache import BlockPool, StatePool
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.caches import Caches
from tests.engine.tiny import CONFIGS, tiny_model


def held_bytes(caches: Caches) -> int:
    tensors: list[torch.Tensor] = []
    for cache in [*caches.layers, *caches.mtp]:
        tensors += [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


# pools


def test_blocks_go_out_and_come_back() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first == [0, 1, 2] and pool.num_free == 1
    pool.free([1])
    assert sorted(pool.allocate(2)) == [1, 3] and pool.num_free == 0
    pool.check_integrity([0, 1, 2, 3])


def test_too_many_blocks_take_none() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(MemoryBudgetError, match="3 more blocks of 16 tokens are needed, but only 2 of 3"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check_integrity([0])


def test_a_shared_block_is_free_when_the_last_user_leaves() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.check_integrity([0, 0, 1])
    pool.free([0])
    assert pool.num_free == 0
    pool.free([0])
    assert pool.num_free == 1
    for wrong in (pool.free, pool.share):
        with pytest.raises(UsageError, match="block 0 is already free"):
            wrong([0])


def test_a_lost_or_doubly_owned_block_is_noticed() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    for held in ([], [0, 0], [0, 1]):
        with pytest.raises(RuntimeError, match="hold it"):
            pool.check_integrity(held)
    pool._free.append(0)
    with pytest.raises(RuntimeError, match="does not match their users"):
        pool.check_integrity([0])


def test_rows_have_one_owner() -> None:
    pool = StatePool(2)
    assert [pool.allocate(), pool.allocate()] == [0, 1]
    with pytest.raises(MemoryBudgetError, match="all 2 rows"):
        pool.allocate()
    pool.check_integrity([1, 0])
    with pytest.raises(RuntimeError, match="lost"):
        pool.check_integrity([1])
    pool.free(1)
    with pytest.raises(UsageError, match="row 1 is already free"):
        pool.free(1)


# sizes


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("max_rollback", [0, 3])
def test_the_bytes_are_those_of_the_tensors(kind: str, max_rollback: int) -> None:
    model = tiny_model(kind)
    cache = HybridCache(model, num_blocks=5, num_rows=2, max_rollback=max_rollback)
    size = CacheSize.of(model, max_rollback)
    assert held_bytes(cache.caches) == 5 * size.per_block + 2 * size.per_row


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_budget_is_kept_or_refused_with_the_numbers(kind: str) -> None:
    model = tiny_model(kind)
    size = CacheSize.of(model)
    exact = size.total(100)
    assert exact == size.per_row + 7 * size.per_block
    assert held_bytes(HybridCache(model, num_blocks=7).caches) == exact
    size.check(100, None)
    size.check(100, exact)
    with pytest.raises(MemoryBudgetError, match=r"^100 tokens of context take .* MiB may be used"):
        size.check(100, exact - 1)
    assert size.tokens_within(exact, 100) == 100
    assert size.tokens_within(exact - 1, 100) == (96 if kind != "delta" else 0)
    assert size.tokens_within(0, 100) == 0


# sequences


@pytest.mark.parametrize("kind", CONFIGS)
def test_sequences_own_the_blocks_they_fill(kind: str) -> None:
    cache = HybridCache(tiny_model(kind), num_blocks=4, num_rows=2)
    a, b = cache.add_sequence(), cache.add_sequence()
    cache.extend(a, 16)
    cache.extend(a, 1)
    cache.extend(b, 5)
    assert cache.blocks.num_free == 1 and cache.num_tokens(a) == 17
    cache.check_integrity()
    with pytest.raises(MemoryBudgetError):
        cache.extend(b, 30)
    assert cache.num_tokens(b) == 5
    batch = cache.batch({a: [7], b: [1, 2, 3, 4, 5]})
    assert batch.positions.tolist() == [16, 0, 1, 2, 3, 4] and batch.seq_lens == (17, 5)
    assert batch.slot_mapping is not None and len(set(batch.slot_mapping.tolist())) == 6
    cache.free(a)
    assert cache.blocks.num_free == 3 and cache.rows.num_free == 1
    cache.check_integrity()
    cache.free(b)
    cache.check_integrity()


def test_faults_in_the_books_are_noticed() -> None:
    cache = HybridCache(tiny_model("hybrid"), num_blocks=4)
    seq = cache.add_sequence()
    cache.extend(seq, 20)
    cache._sequences[seq].num_tokens = 5
    with pytest.raises(RuntimeError, match="of 5 tokens owns 2 blocks"):
        cache.check_integrity()


def test_rollback_returns_blocks_and_agrees_with_never_having_been() -> None:
    model = tiny_model("hybrid")
    ids = list(range(40, 75))

    def run(cache: HybridCache, seq: int, piece: list[int], tentative: int = 0) -> torch.Tensor:
        cache.extend(seq, len(piece))
        hidden = model(cache.batch({seq: piece}, [tentative]), cache.caches)
        return model.compute_logits(hidden[-1:])

    plain = HybridCache(model, 4, max_rollback=4)
    one = plain.add_sequence()
    run(plain, one, ids[:31])
    wanted = run(plain, one, ids[31:32])

    cache = HybridCache(model, 4, max_rollback=4)
    seq = cache.add_sequence()
    run(cache, seq, ids[:31])
    run(cache, seq, [9, 9, 9], tentative=3)
    assert cache.blocks.num_free == 1
    cache.rollback(seq, 3)
    assert cache.blocks.num_free == 2 and cache.num_tokens(seq) == 31
    cache.check_integrity()
    torch.testing.assert_close(run(cache, seq, ids[31:32]), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="cannot undo 1 tokens"):
        cache.rollback(seq, 1)
    assert cache.num_tokens(seq) == 32


def test_attention_alone_can_be_cropped_anywhere() -> None:
    cache = HybridCache(tiny_model("attention"), 4)
    seq = cache.add_sequence()
    cache.extend(seq, 50)
    cache.rollback(seq, 34)
    assert cache.can_crop and cache.num_tokens(seq) == 16 and cache.blocks.num_free == 3
    for count in (-1, 17):
        with pytest.raises(UsageError, match="the sequence has 16"):
            cache.rollback(seq, count)
    cache.check_integrity()


def test_a_new_sequence_finds_nothing_of_the_old_one() -> None:
    model = tiny_model("hybrid")
    cache = HybridCache(model, 2)
    results = []
    for before in ([], [3, 4, 5]):
        if before:
            seq = cache.add_sequence()
            cache.extend(seq, 3)
            model(cache.batch({seq: before}), cache.caches)
            cache.free(seq)
        seq = cache.add_sequence()
        cache.extend(seq, 2)
        results.append(model(cache.batch({seq: [1, 2]}), cache.caches))
        cache.free(seq)
    assert torch.equal(*results)


def test_the_books_balance_whatever_is_done() -> None:
    rng = random.Random(1)
    cache = HybridCache(tiny_model("attention"), num_blocks=12, num_rows=4)
    live: list[int] = []
    for _ in range(600):
        action = rng.choice(["add", "extend", "extend", "rollback", "free"])
        try:
            if action == "add":
                live.append(cache.add_sequence())
            elif live and action == "extend":
                cache.extend(rng.choice(live), rng.randrange(40))
            elif live and action == "rollback":
                seq = rng.choice(live)
                cache.rollback(seq, rng.randrange(cache.num_tokens(seq) + 1))
            elif live and action == "free":
                cache.free(live.pop(rng.randrange(len(live))))
        except MemoryBudgetError:
            pass
        cache.check_integrity()
    for seq in live:
        cache.free(seq)
    assert cache.blocks.num_free == 12 and cache.rows.num_free == 4
