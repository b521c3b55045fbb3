"""Hub repositories: what counts as one, what is asked of the Hub client, and what its failures become."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors

from godwit.checkpoint import open_checkpoint, read_raw_config
from godwit.checkpoint.hub import HubName, hub_name
from godwit.errors import CheckpointError, GodwitError, OfflineError

MakeModel = Callable[..., Path]
A = {"a": torch.arange(4.0)}


def test_what_counts_as_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen3-Next-80B-A3B-Instruct", "hf://Qwen/Qwen3-Next-80B-A3B-Instruct"):
        assert hub_name(name) == HubName("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert hub_name("hf://org/na.me_1:UD-Q4_K_XL") == HubName("org/na.me_1", "UD-Q4_K_XL")
    assert hub_name("hf.co/org/name:Q8_0") == HubName("org/name", "Q8_0")
    assert hub_name("org/name/sub/x-Q8_0.gguf") == HubName("org/name", None, "sub/x-Q8_0.gguf")
    for local in (
        "name",
        "./name",
        "../name",
        "/org/name",
        "a/b/c",
        "org/",
        "org/na me",
        "~/name",
        "örg/name",
        "",
    ):
        assert hub_name(local) is None
    assert hub_name(Path("org/name")) is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_name("org/name") is None and hub_name("org/other/x.gguf") is None
    assert hub_name("hf://org/name") == HubName("org/name")


def test_download(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model({"model.safetensors": A})
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("hf://org/name", revision="v1")
    assert checkpoint.names() == ["a"]
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1")
    wanted = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
    ]
    wanted += ["chat_template.jinja", "merges.txt", "vocab.json", "tokenizer.model"]
    unwanted = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.pt",
        "x.pth",
        "modeling.py",
        "README.md",
    ]
    unwanted += ["original/model.safetensors", "onnx/config.json", "model.gguf", "x.pkl"]

    def matches(file: str, patterns: list[str]) -> bool:
        return any(fnmatch(file, pattern) for pattern in patterns)

    files = [file for file in wanted + unwanted if matches(file, asked["allow_patterns"])]
    assert [file for file in files if not matches(file, asked["ignore_patterns"])] == wanted


def failure(kind: type[Exception], *values: Any) -> Exception:
    """A Hub error without the HTTP response its constructor wants."""
    error = kind.__new__(kind, *values)
    if isinstance(error, OSError) and values:
        error.errno, error.strerror = values
    return error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            failure(hub_errors.RepositoryNotFoundError),
            CheckpointError,
            "no such repository on the Hub",
        ),
        (failure(hub_errors.GatedRepoError), CheckpointError, "its licence must be accepted first"),
        (failure(hub_errors.RevisionNotFoundError), CheckpointError, "no such revision"),
        (failure(hub_errors.RemoteEntryNotFoundError), CheckpointError, "has no config.json"),
        (hub_errors.HFValidationError("bad"), CheckpointError, "check the name"),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError, "could not be stored"),
        (hub_errors.LocalEntryNotFoundError("x"), OfflineError, "give that directory"),
        (hub_errors.OfflineModeIsEnabled("x"), OfflineError, "hf download org/name --local-dir DIR"),
        (ConnectionError("refused"), OfflineError, "the Hub cannot be reached (ConnectionError)"),
        (RuntimeError("whatever the HTTP library raises"), OfflineError, "RuntimeError"),
    ],
)
def test_failures_become_sentences(
    error: Exception, kind: type[GodwitError], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for call in (open_checkpoint, read_raw_config):
        with pytest.raises(kind) as caught:
            call("org/name")
        assert type(caught.value) is kind
        assert sentence in str(caught.value)
        assert str(caught.value).startswith("org/name: ")


SCRIPT = """
import sys
from godwit.checkpoint import open_checkpoint, read_raw_config
from godwit.errors import GodwitError
try:
    print(read_raw_config(sys.argv[1])["model_type"], open_checkpoint(sys.argv[1]).names())
except GodwitError as error:
    print(type(error).__name__, error)
"""


def offline(home: Path, source: str) -> str:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source],
        env=environment, cwd=home, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_offline_and_not_cached(tmp_path: Path) -> None:
    assert offline(tmp_path, "org/name").startswith(
        "OfflineError org/name: no such local directory, not complete in"
    )


def test_offline_from_the_cache(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model({"model.safetensors": A})
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert offline(tmp_path, "org/name").split(maxsplit=1) == ["qwen3_next", "['a']\n"]
    (snapshot / "model.safetensors").unlink()
    assert "no weights" in offline(tmp_path, "hf://org/name")
    assert json.loads((snapshot / "config.json").read_text())
