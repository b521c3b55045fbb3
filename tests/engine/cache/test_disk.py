"""What is remembered survives a restart, and damaged files do no harm."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.checkpoint.safetensors import SafetensorsFile
from godwit.checkpoint.writer import save_tensors
from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.engine.cache import disk_file
from godwit.engine.cache.disk import DiskCache
from godwit.engine.cache.disk_folder import fingerprint, open_folder
from godwit.engine.stream import Finish
from godwit.errors import UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from tests.engine.test_core import ALL, ATTENTION, HYBRID, alone, asked, text
from tests.engine.test_core_faults import Guesses
from tests.engine.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Restarts:
    """One engine after the other over the same files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, model: CausalLM, *prompts: list[int], salt: str = "", **how: object) -> list[Finish]:
        """What a new engine answers, and whether that is right."""
        settings = {"max_context": 512, "max_sequences": 4, "debug": True, "cache_dir": self.folder} | how
        finishes = []
        with Engine(model, TOKENIZER, **settings) as engine:  # type: ignore[arg-type]
            for seed, ids in enumerate(prompts):
                params = asked(seed, logprobs=None)
                finish = engine.submit(GenerationRequest(tuple(ids), params, (20,), salt)).result()[1]
                assert finish.token_ids == alone(model, ids, asked(seed))[2]
                finishes.append(finish)
        engine.check_integrity()
        return finishes

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*/*.kv"))


@pytest.fixture
def restarts(tmp_path: Path) -> Restarts:
    return Restarts(tmp_path / "cache")


@ALL
def test_conversations_survive_a_restart(restarts: Restarts, model: CausalLM) -> None:
    prompts = [text(50), text(90, 1)]
    answers = restarts.ask(model, *prompts)
    following = [[*ids, *one.token_ids, 5, 6] for ids, one in zip(prompts, answers, strict=True)]
    again = restarts.ask(model, *following)
    for ids, finish in zip(following, again, strict=True):
        assert finish.cached_tokens >= len(ids) - 3 - 16 * (model is ATTENTION)
    third = restarts.ask(model, [*following[0], *again[0].token_ids, 9])
    assert third[0].cached_tokens > 60
    assert all(path.stat().st_mode & 0o077 == 0 for path in restarts.files())


def test_a_shared_beginning_is_written_once(restarts: Restarts) -> None:
    long = text(300)
    restarts.ask(HYBRID, long)
    before = sum(path.stat().st_size for path in restarts.files())
    restarts.ask(HYBRID, [*long, 5])
    more = sum(path.stat().st_size for path in restarts.files()) - before
    assert 0 < more < before


def test_salts_stay_apart(restarts: Restarts) -> None:
    restarts.ask(HYBRID, text(50), salt="a")
    assert restarts.ask(HYBRID, [*text(50), 7], salt="b")[0].cached_tokens == 0
    assert restarts.ask(HYBRID, [*text(50), 7], salt="a")[0].cached_tokens == 50


def test_models_stay_apart(restarts: Restarts) -> None:
    other = pack_model(tiny_model("hybrid", seed=1), "q4")
    assert len({fingerprint(HYBRID), fingerprint(other), fingerprint(tiny_model("hybrid"))}) == 3
    restarts.ask(HYBRID, text(50))
    assert restarts.ask(other, [*text(50), 7])[0].cached_tokens == 0
    assert restarts.ask(HYBRID, [*text(50), 7])[0].cached_tokens == 50


def test_a_state_with_accepted_drafts_is_kept_whole(restarts: Restarts) -> None:
    right = alone(HYBRID, text(50), asked(0))[2]
    drafter = Guesses({0: right}, 100)
    finish = restarts.ask(HYBRID, text(50), max_rollback=4, drafter=drafter)[0]
    assert finish.accepted > 3
    following = [*text(50), *right, 5]
    assert restarts.ask(HYBRID, following, max_rollback=4)[0].cached_tokens == len(following) - 2
    # where fewer tokens can be undone, that state is of no use, but what is before it is
    assert restarts.ask(HYBRID, [*following[:-1], 6], max_rollback=0)[0].cached_tokens >= 50


def damaged(content: bytes) -> Iterator[bytes]:
    rng = random.Random(1)
    size = len(content)
    for cut in (0, 3, 15, 30, size // 2, size - 1):
        yield content[:cut]
    yield content + b"\0"
    for _ in range(25):
        place = rng.randrange(size)
        yield content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def test_damaged_files_are_dropped_with_a_warning(
    restarts: Restarts, caplog: pytest.LogCaptureFixture
) -> None:
    restarts.ask(HYBRID, text(50))
    path = restarts.files()[-1]
    content = path.read_bytes()
    for wrong in damaged(content):
        path.write_bytes(wrong)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
            disk = DiskCache(restarts.folder, HYBRID, 1 << 30)
            engine = Engine(HYBRID, TOKENIZER, max_context=512, max_sequences=4)
            disk.load(engine.core.runner.index, engine.core.runner.cache)
            disk.close()
            engine.check_integrity()
            engine.close()
        assert "dropping a damaged cache file" in caplog.text and not path.exists()
    assert restarts.ask(HYBRID, [*text(50), 7])[0].cached_tokens in (0, 20, 50)


def key_of(path: Path) -> bytes:
    """The key of the files beside one."""
    return open_folder(path.parent.parent, path.parent.name)


def rewritten(path: Path, changes: Mapping[str, object], key: bytes | None = None) -> None:
    """The file with another header and right checksums."""
    file = SafetensorsFile(path)
    tensors = [file.tensor(str(number)).clone() for number in range(len(file.entries) - 3)]
    raw = json.loads(bytes(disk_file.raw_bytes(file.tensor("header")))) | changes
    path.unlink()
    write_signed(path, json.dumps(raw).encode(), tensors, key or key_of(path))


def write_signed(path: Path, header: bytes, tensors: list[Tensor], key: bytes) -> None:
    """A file of these parts, as only the owner of the key can write it."""

    def checksum(parts: list[Tensor]) -> Tensor:
        return disk_file._as_tensor(disk_file._mac(key, header, parts))

    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    head = torch.frombuffer(bytearray(header), dtype=torch.uint8) if header else torch.empty(0)
    save_tensors(path, named | {"header": head, "header_mac": checksum([]), "mac": checksum(tensors)}, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": []},
        {"tokens": [[1]]},
        {"tokens": [[2**70] * 16] * 3},
        {"pending": 99},
        {"pending": -1},
        {"num_state": 1},
        {"num_state": -1},
        {"state_bytes": -1},
        {"state_bytes": None},
        {"root": 5},
        {"parent": "zz"},
        {"num_state": 10**9},
        {"has_logits": False},
    ],
)
def test_hostile_headers_are_dropped(
    restarts: Restarts, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    restarts.ask(HYBRID, text(50))
    for path in restarts.files():
        rewritten(path, changes)
    with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
        finish = restarts.ask(HYBRID, [*text(50), 7])[0]
    assert finish.cached_tokens == 0 and "dropping a damaged cache file" in caplog.text


def test_planted_files_are_dropped(restarts: Restarts, caplog: pytest.LogCaptureFixture) -> None:
    restarts.ask(HYBRID, text(50))
    for path in restarts.files():
        rewritten(path, {}, bytes(32))
    with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
        assert restarts.ask(HYBRID, [*text(50), 7])[0].cached_tokens == 0
    assert "was not made with the key of this cache" in caplog.text


def test_files_of_another_model_or_name_are_dropped(
    restarts: Restarts, caplog: pytest.LogCaptureFixture
) -> None:
    restarts.ask(HYBRID, text(50))
    for path in restarts.files():
        rewritten(path, {}, open_folder(restarts.folder, "another model"))
    with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
        assert restarts.ask(HYBRID, [*text(50), 7])[0].cached_tokens == 0
    assert "was not made with the key of this cache" in caplog.text
    real = max(restarts.files(), key=lambda path: path.stat().st_size)
    real.with_name("00" * 20 + ".kv").write_bytes(real.read_bytes())
    with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
        restarts.ask(HYBRID, text(50, 4))
    assert "its content belongs under another name" in caplog.text


def test_what_is_no_file_is_passed_over(restarts: Restarts) -> None:
    restarts.ask(HYBRID, text(50))
    folder = restarts.files()[0].parent
    os.mkfifo(folder / "pipe.kv")
    (folder / "folder.kv").mkdir()
    (folder / "nowhere.kv").symlink_to("absent")
    (folder / "device.kv").symlink_to("/dev/zero")
    (folder / "loop.kv").symlink_to("loop.kv")
    assert restarts.ask(HYBRID, [*text(50), 7], cache_bytes=1)[0].cached_tokens == 50


def test_folders_that_others_may_write_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "cache"
    open_folder(folder, "model")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "model")] == [0o700, 0o700]
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    for path in (folder, folder / "model"):
        path.chmod(0o770)
        with pytest.raises(UsageError, match="chmod go-w"):
            open_folder(folder, "model")
        path.chmod(0o700)
    (folder / "link").symlink_to(folder / "model")
    with pytest.raises(UsageError, match="not a directory"):
        open_folder(folder, "link")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match="another user"):
        open_folder(folder, "model")


def test_the_key_of_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = open_folder(tmp_path, "a")
    assert open_folder(tmp_path, "a") == first != open_folder(tmp_path, "b")
    key = tmp_path / "key"
    content = key.read_bytes()
    seen = [first]

    def begins_anew() -> None:
        with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk_folder"):
            seen.append(open_folder(tmp_path, "a"))
        assert key.stat().st_mode & 0o777 == 0o600

    key.chmod(0o640)
    begins_anew()
    key.write_bytes(content[:-1])
    begins_anew()
    key.unlink()
    key.symlink_to("/dev/zero")
    begins_anew()
    key.unlink()
    os.mkfifo(key)
    begins_anew()
    assert len(set(seen)) == 5 and caplog.text.count("the cache starts empty") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "key"]


def test_files_that_go_on_from_each_other_are_no_trap(restarts: Restarts) -> None:
    restarts.ask(HYBRID, text(50))
    for path in restarts.files():
        rewritten(path, {"parent": path.stem})
    assert restarts.ask(HYBRID, [*text(50), 7])[0].cached_tokens == 0


def test_a_file_whose_beginning_is_gone_is_dropped(restarts: Restarts) -> None:
    restarts.ask(HYBRID, text(50))
    abandoned = restarts.files()[0].parent / ".writing-1"
    abandoned.mkdir()
    (abandoned / "x.kv").write_bytes(b"left over")
    os.utime(abandoned, (0, 0))
    oldest = min(restarts.files(), key=lambda path: path.stat().st_mtime_ns)
    oldest.unlink()
    finish = restarts.ask(HYBRID, [*text(50), 7])[0]
    assert finish.cached_tokens in (0, 20)
    assert not abandoned.exists()


def test_the_oldest_files_go_when_there_are_too_many(restarts: Restarts) -> None:
    restarts.ask(HYBRID, *(text(60, seed) for seed in range(6)), cache_bytes=120_000)
    total = sum(path.stat().st_size for path in restarts.files())
    assert 30_000 < total <= 120_000
    finishes = restarts.ask(HYBRID, [*text(60, 5), 1], [*text(60, 0), 1])
    assert [finish.cached_tokens for finish in finishes] == [60, 0]


def test_only_what_fits_is_loaded_and_the_rest_stays(restarts: Restarts) -> None:
    restarts.ask(HYBRID, *(text(60, seed) for seed in range(6)))
    count = len(restarts.files())
    restarts.ask(HYBRID, text(30), max_context=64, max_sequences=1)
    assert len(restarts.files()) >= count
    assert restarts.ask(HYBRID, [*text(60, 0), 1])[0].cached_tokens == 60


@ALL
@pytest.mark.parametrize("length", [200, 208])
def test_what_was_evicted_is_read_when_it_is_wanted(restarts: Restarts, model: CausalLM, length: int) -> None:
    first, second = text(length), text(220, 1)
    small: dict[str, Any] = {"max_context": 256, "max_sequences": 1}
    finishes = restarts.ask(model, first, second, [*first, 7], [*second, 7], **small)
    reused = [finish.cached_tokens for finish in finishes]
    whole = [length, 220] if model is not ATTENTION else [length // 16 * 16, 208]
    assert reused == [0, 0, *whole]
    assert restarts.ask(model, [*second, 8], [*first, 8], **small)[1].cached_tokens == whole[0]


def test_a_file_that_is_damaged_while_the_engine_runs_costs_only_its_tokens(
    restarts: Restarts, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = text(200), text(220, 1)
    restarts.ask(HYBRID, first, second)
    with (
        caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"),
        Engine(HYBRID, TOKENIZER, max_context=256, max_sequences=1, cache_dir=restarts.folder) as engine,
    ):
        for path in restarts.files():
            path.write_bytes(path.read_bytes()[:-5])
        for ids in ([*second, 3], [*first, 3], [*second, 4]):
            finish = engine.submit(GenerationRequest(tuple(ids), asked(0, logprobs=None))).result()[1]
            assert finish.token_ids == alone(HYBRID, ids, asked(0))[2]
        engine.check_integrity()
    assert "dropping a damaged cache file" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    restarts: Restarts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with caplog.at_level(logging.WARNING, "godwit.engine.cache.disk"):
        restarts.ask(HYBRID, text(50))
    assert "cannot write to the cache in" in caplog.text
    assert not restarts.files() and not list(restarts.folder.glob("*/.writing-*"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot hold a cache"):
        DiskCache(tmp_path / "file", HYBRID, 1)


def test_parameters_decide_what_is_drawn_and_not_the_cache(restarts: Restarts) -> None:
    params = SamplingParams(seed=4, max_tokens=9)
    made = []
    for _ in range(2):
        with Engine(HYBRID, TOKENIZER, max_context=512, cache_dir=restarts.folder) as engine:
            made.append(engine.submit(GenerationRequest(tuple(text(50)), params)).result()[1])
    assert made[0].token_ids == made[1].token_ids and made[1].cached_tokens == 50
