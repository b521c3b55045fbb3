"""Hostile tokenizers end another process, or are refused before; this one pays almost nothing for them."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import CheckpointError
from godwit.text import trial
from godwit.text.tokenizer import Tokenizer
from godwit.text.trial_worker import TEXTS, use
from godwit.worker import Worker

Make = Callable[..., dict[str, Any]]


def files(raw: dict[str, Any], **others: object) -> dict[str, bytes]:
    contents = {"tokenizer": raw, **others}
    return {f"{name}.json": json.dumps(content).encode() for name, content in contents.items()}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


HOSTILE_STEPS = (
    chain(*[replace({"String": "a"}, "aa")] * 40),
    chain(*[replace({"Regex": "."}, "zzzz")] * 7),
    chain(*[replace({"String": ""}, "a")] * 40),
    chain(*[{"type": "Lowercase"}] * 65),
    replace({"Regex": "zq"}, "z" * 5000),
    chain(chain(chain(*[replace({"String": "zq"}, "zqzq")] * 13))),
)


@pytest.mark.parametrize("normalizer", HOSTILE_STEPS, ids=range(len(HOSTILE_STEPS)))
def test_steps_that_multiply_texts_are_refused(make: Make, normalizer: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="longer; use another tokenizer") as caught:
        Tokenizer.from_files(files(make("bytes") | {"normalizer": normalizer}), "here", trusted=True)
    assert "\n" not in str(caught.value)


def test_usual_steps_are_not(make: Make) -> None:
    usual = chain(
        {"type": "Prepend", "prepend": "\u2581"},
        replace({"String": " "}, "\u2581"),
        *[replace({"String": old}, new) for old, new in (("``", '"'), ("''", '"'), ("\u2019", "'"))],
        {"type": "NFKD"},
        replace({"Regex": " {2,}"}, " "),
    )
    Tokenizer.from_files(files(make("bytes") | {"normalizer": usual}), "here", trusted=True)


def test_long_added_tokens_are_refused(make: Make) -> None:
    raw = make("bytes")
    raw["added_tokens"] = [{**raw["added_tokens"][0], "content": "<" + "x" * (1 << 20)}]
    with pytest.raises(CheckpointError, match="an added token has 1048577 letters"):
        Tokenizer.from_files(files(raw), "here")


def test_many_tokens_around_a_text_are_refused(make: Make) -> None:
    raw = make("bytes")
    around = [{"SpecialToken": {"id": "a", "type_id": 0}}] * 100
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*around, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
    }
    with pytest.raises(CheckpointError, match="more than 64 tokens around"):
        Tokenizer.from_files(files(raw), "here")


def test_a_limit_of_memory_ends_the_trial(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no check foresees takes all it can get, in the other process."""
    monkeypatch.setattr(trial, "MEMORY_BYTES", 128 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF)
    raw = make("bytes")
    many = [{**raw["added_tokens"][0], "id": i, "content": f"<{i}{'x' * 900}"} for i in range(500)]
    with pytest.raises(CheckpointError, match=r"^here: its tokenizer was stopped"):
        Tokenizer.from_files(files(raw | {"added_tokens": many}), "here")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 64 << 10  # KiB
    assert after.ru_utime - before.ru_utime < 2


def test_a_trial_is_made_once_for_the_same_files(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def ask(*args: object) -> dict[str, str]:
        calls.append(args)
        return {}

    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(Worker, "ask", ask)
    content = files(make("bytes"), tokenizer_config={"a": 1})
    for _ in range(2):
        Tokenizer.from_files(content, "here")
    Tokenizer.from_files(content | {"vocab.json": b"not read"}, "there")
    Tokenizer.from_files(content, "here", trusted=True)
    assert len(calls) == 1
    Tokenizer.from_files(files(make("bytes"), tokenizer_config={"a": 2}), "here")
    assert len(calls) == 2


@pytest.mark.parametrize("answer", [None, {"error": "MemoryError"}])
def test_a_failed_trial_is_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(Worker, "ask", lambda *args: answer)
    for _ in range(2):  # what failed is tried again
        with pytest.raises(CheckpointError, match=r"^here: its tokenizer was stopped: .*; use another one$"):
            Tokenizer.from_files(files(make("bytes")), "here")


def test_the_worker_uses_any_tokenizer(make: Make) -> None:
    use(Tokenizer(make("bytes")))
    assert len("".join(TEXTS)) > 5000


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_pipes_devices_and_links_are_refused_at_once(tmp_path: Path, make: Make, name: str) -> None:
    for file, data in files(make("bytes")).items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        Tokenizer.from_dir(tmp_path)
    for target in ("/dev/zero", "/etc/passwd"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{name}: a link that leads out"):
            Tokenizer.from_dir(tmp_path)
