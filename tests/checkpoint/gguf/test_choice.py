"""Which GGUF file is meant: in a directory, in a repository of the Hub, by the name that Ollama gave it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from godwit.checkpoint import open_checkpoint, read_raw_config
from godwit.checkpoint.choice import models_in, parts_of, pick
from godwit.errors import CheckpointError, OfflineError
from tests.checkpoint.gguf.convert import Converter, make_model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("qwen3", num_hidden_layers=1)
    return Converter("qwen3", model).write(tmp_path_factory.mktemp("gguf") / "m.gguf")


NAMES = [
    "README.md", "config.json", "mmproj-F16.gguf", "imatrix_unsloth.gguf", "mtp-x.gguf", "X-Q8_0.gguf",
    "X-Q4_K_M.gguf", "X-UD-Q4_K_XL.gguf", "X-Q4_K_XL.gguf", "BF16/X-BF16-00001-of-00002.gguf",
    "BF16/X-BF16-00002-of-00002.gguf", "Q2_K/X-00001-of-00001.gguf",
]  # fmt: skip


def test_what_is_a_model() -> None:
    assert models_in(NAMES) == [
        "BF16/X-BF16-00001-of-00002.gguf", "Q2_K/X-00001-of-00001.gguf", "X-Q4_K_M.gguf",
        "X-Q4_K_XL.gguf", "X-Q8_0.gguf", "X-UD-Q4_K_XL.gguf",
    ]  # fmt: skip
    assert parts_of("BF16/X-BF16-00001-of-00002.gguf", NAMES) == NAMES[9:11]
    assert parts_of("X-Q8_0.gguf", NAMES) == ["X-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        (None, "X-Q4_K_M.gguf"),
        ("Q8_0", "X-Q8_0.gguf"),
        ("q8_0", "X-Q8_0.gguf"),
        ("Q4_K_XL", "X-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "X-UD-Q4_K_XL.gguf"),
        ("BF16", "BF16/X-BF16-00001-of-00002.gguf"),
        ("Q2_K", "Q2_K/X-00001-of-00001.gguf"),
    ],
)
def test_a_quantisation_is_picked(quant: str | None, file: str) -> None:
    assert pick("org/name", NAMES, quant) == file


def test_what_cannot_be_picked_is_listed() -> None:
    with pytest.raises(CheckpointError, match=r"no GGUF file Q4; .*/FILE: BF16.*, X-UD-Q4_K_XL\.gguf$"):
        pick("org/name", NAMES, "Q4")
    with pytest.raises(CheckpointError, match="several GGUF files; give one of these"):
        pick("org/name", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0")
    with pytest.raises(CheckpointError, match="several GGUF files"):
        pick("org/name", ["a-Q8_0.gguf", "a-Q6_K.gguf"], None)
    assert pick("org/name", ["a-Q8_0.gguf", "mmproj-a.gguf"], None) == "a-Q8_0.gguf"


def test_directories(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "x-Q8_0.gguf")
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(tmp_path).path == tmp_path / "x-Q8_0.gguf"
    assert read_raw_config(tmp_path)["model_type"] == "qwen3"
    shutil.copy(file, tmp_path / "x-Q6_K.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF models; .*x-Q6_K\.gguf, x-Q8_0\.gguf"):
        open_checkpoint(tmp_path)


# ---- The Hub -----------------------------------------------------------------------------------------------


class Hub:
    """A repository of GGUF files; what is downloaded appears in ``folder``."""

    def __init__(self, folder: Path, content: dict[str, bytes]) -> None:
        self.folder, self.content, self.fetched = folder, content, list[str]()
        self.online = True

    def snapshot_download(self, repository: str, **asked: Any) -> str:
        if not self.online and not asked.get("local_files_only") and not self.folder.exists():
            raise hub_errors.LocalEntryNotFoundError("x")
        allowed, ignored = asked.get("allow_patterns"), asked.get("ignore_patterns") or ()
        for name, data in self.content.items() if self.online else ():
            wanted = any(fnmatch(name, pattern) for pattern in allowed or ("*",))
            if wanted and not any(fnmatch(name, pattern) for pattern in ignored):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                self.fetched.append(name)
        return str(self.folder)

    def model_info(self, repository: str, **asked: Any) -> Any:
        if not self.online:
            raise ConnectionError("no network")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.content])


@pytest.fixture
def hub(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> Hub:
        made = Hub(tmp_path / "cache", dict.fromkeys(names, file.read_bytes()))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "model_info", made.model_info)
        return made

    return make


def test_a_repository_of_gguf_files(hub: Callable[..., Hub]) -> None:
    made = hub("X-Q4_K_M.gguf", "sub/X-Q8_0.gguf", "README.md", "mmproj-F16.gguf", "X-[a]-Q2_K.gguf")
    assert open_checkpoint("org/name-GGUF").path == made.folder / "X-Q4_K_M.gguf"
    assert made.fetched == ["X-Q4_K_M.gguf"]
    for source in ("org/name:Q8_0", "hf://org/name:q8_0", "org/name/sub/X-Q8_0.gguf"):
        made.fetched.clear()
        assert open_checkpoint(source).path == made.folder / "sub" / "X-Q8_0.gguf"
        assert made.fetched == ["sub/X-Q8_0.gguf"]
    assert open_checkpoint("org/name:Q2_K").path.name == "X-[a]-Q2_K.gguf"
    with pytest.raises(CheckpointError, match=r"^org/name: has no file y\.gguf; it has: X-"):
        open_checkpoint("org/name/y.gguf")
    with pytest.raises(CheckpointError, match=r"^org/name: has no GGUF file Q6_K; give one of these"):
        open_checkpoint("org/name:Q6_K")
    with pytest.raises(CheckpointError, match=r"no config\.json.*organisation/name:Q4_K_M"):
        read_raw_config("org/name")
    assert read_raw_config("org/name:Q8_0")["model_type"] == "qwen3"


def test_without_a_network_the_cache_answers(hub: Callable[..., Hub]) -> None:
    made = hub("X-Q4_K_M.gguf", "X-Q8_0.gguf")
    made.online = False
    with pytest.raises(OfflineError):
        open_checkpoint("org/name:Q8_0")
    made.online = True
    open_checkpoint("org/name:Q8_0")
    made.online = False
    assert open_checkpoint("org/name:Q8_0").path.name == "X-Q8_0.gguf"
    assert open_checkpoint("org/name").path.name == "X-Q8_0.gguf"
    with pytest.raises(CheckpointError, match="no GGUF file Q4_K_M"):
        open_checkpoint("org/name:Q4_K_M")


# ---- Ollama ------------------------------------------------------------------------------------------------


def test_models_that_ollama_has(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = "ab" * 32
    blob = tmp_path / "blobs" / f"sha256-{digest}"
    library = tmp_path / "manifests" / "registry.ollama.ai" / "library"
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    for tag in ("latest", "1b"):
        (library / "tiny").mkdir(parents=True, exist_ok=True)
        (library / "tiny" / tag).write_text(json.dumps({"layers": layers}))
    (library / "tiny" / "odd").write_text(json.dumps({"layers": [{"digest": "sha256:../../x"}]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"sha256-{digest}: missing"):
        open_checkpoint("tiny")
    blob.parent.mkdir()
    shutil.copy(file, blob)
    for name in ("tiny", "tiny:1b", str(blob)):
        assert open_checkpoint(name).path == blob
    for name in ("tiny:2b", "other", "tiny:..", "..:1b"):
        with pytest.raises(CheckpointError, match="no such directory"):
            open_checkpoint(name)
    with pytest.raises(CheckpointError, match="names no model"):
        open_checkpoint("tiny:odd")
