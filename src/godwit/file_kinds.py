"""Recognise files by their first bytes and name, to explain why one cannot be used and what to do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError
from godwit.safe_files import open_regular

HEAD_BYTES = 1 << 16  # enough to recognise any kind

_AGAIN = "fetch the file again"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: The name of a file in Ollama's store.
OLLAMA_BLOB = re.compile(r"sha256-[0-9a-f]{64}")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        what: its name, with an article.
        remedy: what to do about it; None: use the original weights.
        original: repository of the original weights, if known.
        foreign: the file is intact but its format is not supported.
    """

    what: str
    remedy: str | None = None
    original: str | None = None
    foreign: bool = True


CONVERT = "convert it to safetensors, for example with transformers' save_pretrained"
_PICKLE = Kind("a PyTorch pickle, which can run code and is never opened", CONVERT)
_ARCHIVE = Kind("an archive", "unpack it and give the directory", foreign=False)
_MAGIC = (
    (b"GGUF", Kind("a GGUF file in the wrong place", "give that file by itself", foreign=False)),
    (b"lmgg", Kind("an old GGML file (llama.cpp before GGUF)")),
    (b"fmgg", Kind("an old GGML file (llama.cpp before GGUF)")),
    (b"tjgg", Kind("an old GGML file (llama.cpp before GGUF)")),
    (b"algg", Kind("a LoRA adapter in llama.cpp's old format")),
    (
        b"version https://git-lfs",
        Kind("a Git LFS pointer, not the file itself", "run 'git lfs pull'", foreign=False),
    ),
    (b"\x89HDF", Kind("an HDF5 file (Keras or TensorFlow weights)")),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
)
_SUFFIXES = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".onnx", ".onnx_data", ".ort"), Kind("an ONNX model")),
    **dict.fromkeys((".h5", ".keras"), Kind("a Keras model")),
    **dict.fromkeys((".tar", ".zip", ".gz", ".tgz", ".zst", ".7z"), _ARCHIVE),
    **dict.fromkeys(
        (".incomplete", ".part", ".crdownload", ".aria2", ".download"),
        Kind("an unfinished download", "finish or repeat it", foreign=False),
    ),
    ".partial": Kind(
        "an unfinished packed model", "run the same 'godwit quantize' again to finish it", foreign=False
    ),
    ".gguf": Kind("named like a GGUF file but not one", _AGAIN, foreign=False),
    ".msgpack": Kind("a Flax model"),
    ".npz": Kind("an archive of NumPy arrays (old MLX weights)"),
    ".tflite": Kind("a TensorFlow Lite model"),
    ".mlmodel": Kind("a Core ML model"),
    ".engine": Kind("a TensorRT engine"),
}


def kind_of(head: bytes, size: int, name: str = "") -> Kind | None:
    """The kind of a file of ``size`` bytes that begins with ``head``; None if unknown."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<error", b'{"error"')):
        return Kind(
            "a web page or a server's error message instead of the file",
            f"{_AGAIN}, logging in if that is required",
            foreign=False,
        )
    suffix = Path(name).suffix.lower()
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return _SUFFIXES.get(suffix, _PICKLE)
    return _SUFFIXES.get(suffix) or _short_text(head, size)


def kind_of_file(path: Path) -> Kind | None:
    """The kind of a file on disk; None if it is unknown or cannot be read."""
    try:
        with open_regular(path) as file:
            return kind_of(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size, path.name)
    except (OSError, CheckpointError):
        return None


def refusal(path: object, kind: Kind) -> GodwitError:
    """The error for a file or directory of a kind that cannot be used."""
    error = UnsupportedModelError if kind.foreign else CheckpointError
    return error(f"{path}: {kind.what}; {kind.remedy or next_step(kind.original)}")


def next_step(original: str | None) -> str:
    """What to do about weights in an unsupported format; ``original`` is the repository they come from."""
    which = f" ({original})" if original else ""
    return f"fetch the original checkpoint in bf16 or FP8{which} and pack it with 'godwit quantize'"


def repository(value: object) -> str | None:
    """``value`` if it can be the name of a Hub repository, else None."""
    return value if isinstance(value, str) and _REPOSITORY.fullmatch(value) and value[0] not in "./" else None


def _short_text(head: bytes, size: int) -> Kind | None:
    """A short text, such as a server sends instead of a file that it does not have."""
    if not 0 < size <= 1000:
        return None
    try:
        text = head.decode().strip()
    except UnicodeDecodeError:
        return None
    if not text or not text.isprintable() or text[0] in "{[":  # damaged JSON is diagnosed elsewhere
        return None
    return Kind(f"a short text ({text[:60]!r}) instead of the file", _AGAIN, foreign=False)
