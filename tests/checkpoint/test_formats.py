"""What Godwit does not read is named for what it is, with a step that leads on and the right exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from godwit.checkpoint import open_checkpoint
from godwit.config import read_config_json
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError
from godwit.text.tokenizer import Tokenizer

WEIGHTS = save({"a": torch.ones(2)})
GGUF = b"GGUF\x03\0\0\0" + b"\0" * 16
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
FETCH = "fetch the original checkpoint in bf16 or FP8"
UNSUPPORTED, DAMAGED = UnsupportedModelError, CheckpointError


FILES: list[tuple[str, bytes, type[GodwitError], tuple[str, ...]]] = [
    ("model.gguf", GGUF, UNSUPPORTED, ("architecture None is not supported",)),
    ("sha256-" + "0a" * 32, GGUF, UNSUPPORTED, ("architecture None is not supported",)),
    ("model.gguf", b"\0" * 40, DAMAGED, ("named like a GGUF file",)),
    ("model.bin", b"tjgg\0\0\0\0", UNSUPPORTED, ("an old GGML file",)),
    ("model.bin", b"PK\x03\x04abc", UNSUPPORTED, ("a PyTorch pickle, which can run code", "convert it")),
    ("model.pt", b"\x80\x02}q", UNSUPPORTED, ("a PyTorch pickle",)),
    ("data", b"\x80\x04\x95", UNSUPPORTED, ("a PyTorch pickle",)),
    ("model.onnx", b"\x08\x07\x12\x07pytorch", UNSUPPORTED, ("an ONNX model",)),
    ("model.h5", b"\x89HDF\r\n", UNSUPPORTED, ("HDF5",)),
    ("weights.npz", b"PK\x03\x04abc", UNSUPPORTED, ("NumPy",)),
    ("model.tar.gz", b"\x1f\x8b\x08", DAMAGED, ("an archive; unpack it",)),
    ("model", LFS, DAMAGED, ("a Git LFS pointer", "git lfs pull")),
    ("model.safetensors", PAGE, DAMAGED, ("a web page", "fetch the file again")),
    ("config.json", b'{"error":"Unauthorized"}', DAMAGED, ("a server's error message",)),
    ("model.bin", b"Entry not found", UNSUPPORTED, ("a PyTorch pickle",)),
    ("model", b"Entry not found", DAMAGED, ("a short text ('Entry not found')",)),
    ("model.safetensors.incomplete", WEIGHTS, DAMAGED, ("an unfinished download",)),
    ("out.godwit.partial", b"\0" * 64, DAMAGED, ("an unfinished packed model", "godwit quantize")),
    ("model.safetensors", WEIGHTS, DAMAGED, ("weights without a config.json",)),
]


@pytest.mark.parametrize(("name", "content", "kind", "words"), FILES)
def test_files(
    name: str, content: bytes, kind: type[GodwitError], words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name, kind, words)


def check(path: Path, kind: type[GodwitError], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert type(caught.value) is kind and message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message


ADAPTER = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
README = b"---\nlicense: mit\nbase_model:\n- org/original\n---\n"
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4}}
DIRECTORIES: list[tuple[dict[str, Any], type[GodwitError], tuple[str, ...]]] = [
    ({}, DAMAGED, ("an empty directory",)),
    ({"x-Q4_K_M.gguf": GGUF}, UNSUPPORTED, ("x-Q4_K_M.gguf: architecture None",)),
    ({"x.gguf": GGUF, "mmproj-x.gguf": GGUF, "config.json": {}}, UNSUPPORTED, ("/x.gguf: architecture",)),
    ({"x-1.gguf": GGUF, "x-2.gguf": GGUF}, DAMAGED, ("several GGUF models", "x-1.gguf, x-2.gguf")),
    ({"x-00002-of-00002.gguf": GGUF}, DAMAGED, ("parts of a model", "the first part")),
    ({"mmproj-x.gguf": GGUF}, DAMAGED, ("go beside one", "the whole model")),
    ({"sha256-" + "00" * 32: GGUF}, DAMAGED, ("Ollama's blobs",)),
    ({"blobs": None, "manifests": None}, DAMAGED, ("Ollama's store", "the name that a model has")),
    (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS},
        UNSUPPORTED,
        ("LoRA", "org/base"),
    ),
    ({"adapter_config.json": {}}, UNSUPPORTED, ("LoRA", "merge it into that model")),
    ({"model_index.json": {}, "x.safetensors": WEIGHTS}, UNSUPPORTED, ("diffusers",)),
    ({"params.json": {}, "consolidated.safetensors": WEIGHTS}, UNSUPPORTED, ("params.json",)),
    ({"pytorch_model.bin": b"", "config.json": {}}, UNSUPPORTED, ("pickles (.bin, .pt, .pth)", "convert it")),
    ({"pytorch_model.bin.index.json": {}}, UNSUPPORTED, ("never opened",)),
    ({"model.pt": b""}, UNSUPPORTED, ("never opened",)),
    ({"model.onnx": b""}, UNSUPPORTED, ("ONNX",)),
    ({"tf_model.h5": b""}, UNSUPPORTED, ("Keras",)),
    ({"flax_model.msgpack": b""}, UNSUPPORTED, ("Flax",)),
    ({"weights.npz": b""}, UNSUPPORTED, ("NumPy",)),
    ({"config.json": {}, "model.safetensors.incomplete": b""}, DAMAGED, ("an unfinished download",)),
    ({"config.json": {}}, DAMAGED, ("no weights",)),
    ({"notes.txt": b""}, DAMAGED, ("not a checkpoint; give",)),
    ({"config.json": AWQ, "model.safetensors": WEIGHTS}, UNSUPPORTED, ("AWQ of 4 bits", FETCH)),
    (
        {"config.json": AWQ | {"_name_or_path": "org/base"}, "model.safetensors": WEIGHTS},
        UNSUPPORTED,
        (f"{FETCH} (org/base) and",),
    ),
    (
        {"config.json": AWQ | {"_name_or_path": "/home/x"}, "a.safetensors": WEIGHTS},
        UNSUPPORTED,
        (f"{FETCH} and",),
    ),
    ({"config.json": PAGE, "a.safetensors": WEIGHTS}, DAMAGED, ("config.json: a web page",)),
    ({"config.json": LFS, "a.safetensors": WEIGHTS}, DAMAGED, ("config.json: a Git LFS pointer",)),
    ({"config.json": {}, "a.safetensors": LFS}, DAMAGED, ("a.safetensors: a Git LFS pointer",)),
    ({"config.json": {}, "a.safetensors": PAGE}, DAMAGED, ("a.safetensors: a web page",)),
    ({"config.json": {}, "a.safetensors": GGUF}, DAMAGED, ("a.safetensors: a GGUF file", "by itself")),
]


def fill(directory: Path, files: dict[str, Any]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        if content is None:
            (directory / name).mkdir()
        else:
            (directory / name).write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
    return directory


@pytest.mark.parametrize(("files", "kind", "words"), DIRECTORIES)
def test_directories(
    files: dict[str, Any], kind: type[GodwitError], words: tuple[str, ...], tmp_path: Path
) -> None:
    directory = fill(tmp_path / "m", files)
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_exit_codes() -> None:
    assert (UNSUPPORTED.exit_code, DAMAGED.exit_code) == (4, 3)


def test_a_repository_of_gguf_files(tmp_path: Path) -> None:
    """Of such a repository only its config is fetched; its name tells."""
    directory = fill(tmp_path / "models--org--name-GGUF", {"config.json": {}})
    with pytest.raises(CheckpointError, match="a repository of GGUF files, none of which is here; fetch one"):
        open_checkpoint(directory)


def test_a_checkpoint_further_down(tmp_path: Path) -> None:
    below = tmp_path / "m" / "snapshots" / "0"
    below.parent.mkdir(parents=True)
    fill(below, {"config.json": {}, "model.safetensors": WEIGHTS})
    with pytest.raises(CheckpointError, match=f"{below} is one; give that directory"):
        open_checkpoint(tmp_path / "m")


def test_a_merged_adapter_is_a_checkpoint(tmp_path: Path) -> None:
    files = {"adapter_config.json": ADAPTER, "config.json": {}, "model.safetensors": WEIGHTS}
    assert open_checkpoint(fill(tmp_path / "m", files)).names() == ["a"]


@pytest.mark.parametrize("content", [LFS, PAGE, b"Entry not found"])
def test_configs_and_tokenizers_that_are_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(content)
    for read in (read_config_json, Tokenizer.from_dir):
        with pytest.raises(CheckpointError, match=r"pointer|web page|a short text"):
            read(tmp_path)
