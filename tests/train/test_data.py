"""Packing: rows, targets, shares, and a state that continues exactly."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from godwit.errors import UsageError
from godwit.train.data import NO_TARGET, PackedBatch, RowSampler, TokenSource, finish_batch
from tests.train.micro import Document, documents, write_source

ROW = 128


def sampler(
    directory: Path, sources: dict[str, list[Document]], *, rows: int = 2, seed: int = 0
) -> RowSampler:
    for name, held in sources.items():
        write_source(directory, name, held)
    return RowSampler({name: TokenSource.open(directory, name) for name in sources}, ROW, rows, seed)


def pieces(batch: PackedBatch) -> list[list[int]]:
    return [ids.tolist() for ids in torch.split(batch.input_ids, batch.lengths)]


def numbered(count: int, length: int, first: int = 0) -> list[Document]:
    """Documents whose every token is their number."""
    return [([first + i] * length, [0] * length) for i in range(count)]


def test_no_document_crosses_a_row(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": documents(300, 1, 300)}, rows=3)
    for _ in range(20):
        batch = made.batch({"a": 1.0})
        ends = set(accumulate(batch.lengths))
        assert {ROW, 2 * ROW, 3 * ROW} <= ends and max(ends) == 3 * ROW == len(batch.input_ids)
        assert min(batch.lengths) >= 1


def test_pieces_are_documents_and_only_the_last_of_a_row_is_cut(tmp_path: Path) -> None:
    held = documents(300, 2, 60)
    whole = {tuple(ids) for ids, _ in held}
    batch = sampler(tmp_path, {"a": held}, rows=8).batch({"a": 1.0})
    ends = [*accumulate(batch.lengths)]
    for piece, end in zip(pieces(batch), ends, strict=True):
        if end % ROW:
            assert tuple(piece) in whole
        else:
            assert any(ids[: len(piece)] == tuple(piece) for ids in whole)


def test_targets_and_roles_stop_at_the_border() -> None:
    ids = np.array([10, 11, 12, 20, 30, 31])
    roles = np.array([2, 0, 1, 0, 2, 0])
    batch = finish_batch(ids, roles, [3, 1, 2])
    assert batch.targets.tolist() == [11, 12, 0, 0, 31, 0]
    assert batch.roles.tolist() == [0, 1, 4, 4, 0, 4]
    assert batch.targets2.tolist() == [12, 0, 0, 0, 0, 0]
    assert batch.roles2.tolist() == [1, 4, 4, 4, 4, 4]


def test_targets_of_a_packed_batch_are_those_of_its_pieces(tmp_path: Path) -> None:
    batch = sampler(tmp_path, {"a": documents(100, 1, 50)}).batch({"a": 1.0})
    for step, targets, roles in ((1, batch.targets, batch.roles), (2, batch.targets2, batch.roles2)):
        expected, none = [], []
        for piece in pieces(batch):
            inside = piece[step:]
            expected += inside + [0] * (len(piece) - len(inside))
            none += [False] * len(inside) + [True] * (len(piece) - len(inside))
        assert targets.tolist() == expected
        assert (roles == NO_TARGET).tolist() == none


def test_short_documents_are_used_whole_and_once_an_epoch(tmp_path: Path) -> None:
    # 64 documents of 16 tokens fill 4 batches of 2 rows of 128 to the last token
    made = sampler(tmp_path, {"a": numbered(64, 16)})
    for _ in range(3):
        seen = [piece[0] for _ in range(4) for piece in pieces(made.batch({"a": 1.0}))]
        assert sorted(seen) == list(range(64))


def test_epochs_and_seeds_have_their_own_order(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": numbered(64, 16)})
    first, second = ([made.batch({"a": 1.0}).input_ids.tolist() for _ in range(4)] for _ in range(2))
    assert first != second
    again, other = (sampler(tmp_path, {"a": numbered(64, 16)}, seed=seed) for seed in (0, 1))
    assert (
        again.batch({"a": 1.0}).input_ids.tolist() == first[0] != other.batch({"a": 1.0}).input_ids.tolist()
    )


def test_shares_follow_the_mix(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": documents(400, 2, 20, vocab=20), "b": documents(90, 60, 128, vocab=20)})
    mix = {"a": 3.0, "b": 1.0}
    for _ in range(60):
        made.batch(mix)
    # what is drawn differs from the mix by one document at most
    assert abs(made.tokens["a"] - 3 * made.tokens["b"]) <= 3 * ROW


def test_rows_hold_the_mix_too(tmp_path: Path) -> None:
    low, high = documents(400, 2, 20, vocab=20), documents(400, 2, 20, vocab=20)
    marked = [([token + 40 for token in ids], roles) for ids, roles in high]
    made = sampler(tmp_path, {"a": low, "b": marked})
    ids = torch.cat([made.batch({"a": 0.3, "b": 0.7}).input_ids for _ in range(20)])
    assert float((ids >= 40).float().mean()) == pytest.approx(0.7, abs=0.03)


def test_a_source_without_weight_is_left_alone(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": numbered(20, 10), "b": numbered(20, 10, first=30)})
    for _ in range(5):
        assert int(made.batch({"a": 1.0, "b": 0.0}).input_ids.max()) < 30
    assert made.drawn["b"] == 0


def test_a_new_stage_takes_effect_at_once(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": numbered(20, 10), "b": numbered(20, 10, first=30)})
    made.batch({"a": 1.0})
    drawn = made.drawn["a"]
    made.start_stage()
    assert int(made.batch({"b": 1.0}).input_ids.min()) >= 30
    assert made.drawn["a"] == drawn  # no document comes twice in an epoch


def test_rows_come_in_the_same_order_however_they_are_grouped(tmp_path: Path) -> None:
    held = {"a": documents(100, 2, 90)}
    four = sampler(tmp_path, held, rows=4).batch({"a": 1.0})
    one = sampler(tmp_path, held, rows=1)
    parts = [one.batch({"a": 1.0}) for _ in range(4)]
    assert torch.equal(four.input_ids, torch.cat([part.input_ids for part in parts]))
    assert torch.equal(four.roles2, torch.cat([part.roles2 for part in parts]))


def test_the_state_continues_exactly(tmp_path: Path) -> None:
    held = {"a": documents(40, 2, 90), "b": documents(7, 30, 140, seed=1)}
    mix = {"a": 1.0, "b": 2.0}
    made = sampler(tmp_path, held)
    for _ in range(9):
        made.batch(mix)
    state = made.state()
    expected = [made.batch(mix) for _ in range(20)]
    resumed = sampler(tmp_path, held)
    resumed.load_state(state)
    for batch in expected:
        again = resumed.batch(mix)
        assert again.lengths == batch.lengths
        assert torch.equal(again.input_ids, batch.input_ids) and torch.equal(again.roles, batch.roles)
    assert resumed.state() == made.state()


def test_a_state_of_other_sources_is_taken_as_far_as_it_goes(tmp_path: Path) -> None:
    made = sampler(tmp_path, {"a": numbered(20, 10), "b": numbered(20, 10, first=30)})
    made.batch({"a": 1.0, "b": 1.0})
    other = sampler(tmp_path, {"a": numbered(20, 10), "c": numbered(20, 10, first=50)})
    other.load_state(made.state())
    assert other.drawn == {"a": made.drawn["a"], "c": 0}
    assert set(other.batch({"a": 1.0, "c": 1.0}).input_ids.tolist()) <= {*range(20), *range(50, 70)}


@pytest.mark.parametrize("part", ["tokens", "roles", "offsets"])
def test_absent_and_damaged_files_are_named(tmp_path: Path, part: str) -> None:
    write_source(tmp_path, "a", documents(5, 2, 9))
    file = tmp_path / f"a.{part}.npy"
    for content in (b"", b"not an array", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"a.{part}.npy"):
            TokenSource.open(tmp_path, "a")
    file.unlink()
    with pytest.raises(UsageError, match=f"a.{part}.npy: no such file; prepare the data first"):
        TokenSource.open(tmp_path, "a")


@pytest.mark.parametrize("offsets", [[0], [0, 4], [1, 5], [0, 2, 2, 5], [0, 3, 2, 5]])
def test_offsets_that_cannot_be(tmp_path: Path, offsets: list[int]) -> None:
    write_source(tmp_path, "a", [([1] * 5, [0] * 5)])
    np.save(tmp_path / "a.offsets.npy", np.asarray(offsets))
    with pytest.raises(UsageError, match="do not match"):
        TokenSource.open(tmp_path, "a")


def test_roles_that_are_none(tmp_path: Path) -> None:
    write_source(tmp_path, "a", [([1, 1], [0, 4])])
    with pytest.raises(UsageError, match="do not match"):
        TokenSource.open(tmp_path, "a")


def test_documents_are_read_in_place(tmp_path: Path) -> None:
    held = documents(6, 2, 9)
    write_source(tmp_path, "a", held)
    source = TokenSource.open(tmp_path, "a")
    assert isinstance(source.tokens, np.memmap) and source.num_docs == 6
    for index, (ids, roles) in enumerate(held):
        tokens, codes = source.document(index)
        assert (tokens.tolist(), codes.tolist()) == (ids, roles)
    assert all(b > a for a, b in pairwise(source.offsets))
