"""The disk cache reads and writes beside the engine, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from godwit.engine import Engine, GenerationRequest, Stream
from godwit.engine.cache import disk
from godwit.engine.cache.disk_file import SegmentHeader, read_segment, write_segment
from godwit.engine.cache.disk_folder import open_folder
from godwit.errors import MemoryBudgetError
from godwit.models.caches import PagedKV
from godwit.models.causal_lm import CausalLM
from tests.engine.test_core import ATTENTION, HYBRID, alone, asked, text
from tests.engine.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FIRST, SECOND = text(200), text(220, 1)
SMALL: dict[str, Any] = {"max_context": 256, "max_sequences": 1, "debug": True, "speculate": False}


class Gate:
    """Stands for a slow disk: what passes through waits until it is open."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def read(self, path: Path, key: bytes) -> tuple[SegmentHeader, list[Tensor]]:
        self.reached.set()
        assert self.open.wait(60)
        return read_segment(path, key)

    def write(self, path: Path, header: SegmentHeader, tensors: list[Tensor], key: bytes) -> None:
        self.reached.set()
        assert self.open.wait(60)
        write_segment(path, header, tensors, key)


def submit(engine: Engine, ids: list[int], length: int = 12) -> Stream:
    return engine.submit(GenerationRequest(tuple(ids), asked(0, length, logprobs=None), (20,)))


def cached(engine: Engine, ids: list[int]) -> int:
    """Tokens of a prompt that are reused for its answer, which has to be right."""
    finish = submit(engine, ids).result()[1]
    assert finish.token_ids == alone(engine.model, ids, asked(0))[2]
    return finish.cached_tokens


@contextmanager
def evicted(folder: Path, model: CausalLM = HYBRID, **how: Any) -> Iterator[Engine]:
    """An engine that has FIRST in files only."""
    with Engine(model, TOKENIZER, **SMALL, cache_dir=folder, **how) as engine:
        cached(engine, FIRST)
    with Engine(model, TOKENIZER, **SMALL, cache_dir=folder, **how) as engine:
        cached(engine, SECOND)
        assert engine.core.runner.index.match([*FIRST, 7], "", []).position < 64
        yield engine
        engine.check_integrity()
        assert engine.health.num_failures == 0


def test_others_run_while_a_prefix_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with evicted(tmp_path) as engine:
        gate = Gate()
        monkeypatch.setattr(disk, "read_segment", gate.read)
        waiting = submit(engine, [*FIRST, 7])
        assert gate.reached.wait(60)
        assert submit(engine, text(20, 5)).result()[1].reason == "length"
        assert engine.stats().num_waiting == 1
        gate.open.set()
        finish = waiting.result()[1]
        assert finish.cached_tokens == 200
        assert finish.token_ids == alone(HYBRID, [*FIRST, 7], asked(0))[2]
        assert engine.stats().disk_files_read >= 1


def test_a_request_can_be_cancelled_while_its_prefix_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with evicted(tmp_path) as engine:
        gate = Gate()
        monkeypatch.setattr(disk, "read_segment", gate.read)
        waiting = submit(engine, [*FIRST, 7])
        assert gate.reached.wait(60)
        waiting.cancel()
        assert waiting.result()[1].reason == "cancelled"
        engine.check_integrity()
        gate.open.set()
        assert cached(engine, [*FIRST, 8]) == 200


def test_an_engine_can_be_closed_while_a_prefix_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with evicted(tmp_path) as engine:
        gate = Gate()
        monkeypatch.setattr(disk, "read_segment", gate.read)
        waiting = submit(engine, [*FIRST, 7])
        assert gate.reached.wait(60)
        opener = threading.Timer(0, gate.open.set)
        opener.start()
        engine.close()
        assert waiting.result()[1].reason in ("cancelled", "length")
        opener.join()


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), MemoryBudgetError("no room")])
def test_a_read_that_fails_costs_only_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(path: Path, key: bytes) -> None:
        raise error

    with evicted(tmp_path) as engine:
        files = sorted(tmp_path.glob("*/*.kv"))
        monkeypatch.setattr(disk, "read_segment", fail)
        assert cached(engine, [*FIRST, 7]) < 64
        assert all(path.exists() for path in files)
    assert "cannot" in caplog.text and "read" in caplog.text


def test_a_file_that_another_process_deleted_costs_only_its_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with evicted(tmp_path) as engine:
        for path in tmp_path.glob("*/*.kv"):
            path.unlink()
        assert cached(engine, [*FIRST, 7]) < 64
    assert "damaged" not in caplog.text


def test_the_write_queue_is_bounded_and_what_does_not_fit_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(disk, "write_segment", gate.write)
    monkeypatch.setattr(disk, "_MAX_BUFFER", 200_000)
    with Engine(HYBRID, TOKENIZER, max_context=256, max_sequences=2, cache_dir=tmp_path) as engine:
        for seed in range(8):
            cached(engine, text(60, seed))
            assert engine.stats().disk_queued_bytes <= 100_000
        stats = engine.stats()
        assert stats.disk_files_skipped > 0 and stats.disk_queued_bytes > 0 == stats.disk_files_written
        gate.open.set()
    stats = engine.stats()
    assert stats.disk_queued_bytes == 0 < stats.disk_files_written == len(list(tmp_path.glob("*/*.kv")))


def test_the_buffers_count_within_the_memory(tmp_path: Path) -> None:
    limit = 1_000_000
    engines = [
        Engine(HYBRID, TOKENIZER, max_bytes=limit, max_sequences=2, cache_dir=folder)
        for folder in (None, tmp_path)
    ]
    used = []
    for engine in engines:
        size, settings = engine.size, engine.settings
        used.append(settings.num_blocks * size.per_block + settings.num_rows * size.per_row)
        engine.close()
    assert used[1] + disk.buffer_bytes(limit) <= limit < used[0] + disk.buffer_bytes(limit)


def test_a_long_text_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MAX_BUFFER", 64 * 16 * 128)  # 16 blocks of the model fill a half's quarter
    with evicted(tmp_path, ATTENTION) as engine:
        assert len(list(tmp_path.glob("*/*.kv"))) > 2
        assert cached(engine, [*FIRST, 7]) == 192
        assert engine.stats().disk_files_read > 1


def test_a_file_larger_than_the_buffer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with evicted(tmp_path, ATTENTION) as engine:
        monkeypatch.setattr(engine.core.runner.disk, "_max_buffer", 100)
        before = engine.stats().disk_files_read
        assert cached(engine, [*FIRST, 7]) < 64
        assert engine.stats().disk_files_read == before


def test_what_drafts_need_is_not_written(tmp_path: Path) -> None:
    with Engine(HYBRID, TOKENIZER, **SMALL, cache_dir=tmp_path) as engine:
        cached(engine, FIRST)
        caches = engine.core.runner.cache.caches
    assert caches.mtp
    layers = [layer for layer in caches.layers if isinstance(layer, PagedKV)]
    for path in tmp_path.glob("*/*.kv"):
        header, tensors = read_segment(path, open_folder(tmp_path, path.parent.name))
        assert len(tensors) - (header.num_state or 0) - header.has_logits == 2 * len(layers)
