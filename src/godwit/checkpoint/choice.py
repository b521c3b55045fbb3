"""Which of several GGUF files is meant: in a directory, in a Hub repository, in Ollama's store."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from godwit.errors import CheckpointError
from godwit.safe_files import read_bounded

SUFFIX = ".gguf"
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
#: What a repository's name alone stands for, as in llama.cpp and Ollama.
USUAL = "Q4_K_M"

_BESIDE = ("mmproj", "imatrix", "mtp-")  # vision projectors, importances, draft heads without their model
_LISTED = 30
_MAX_MANIFEST = 1 << 20
_MODEL_LAYER = "application/vnd.ollama.image.model"
_OLLAMA_NAME = re.compile(r"([\w][\w.-]*)(?::([\w][\w.-]*))?", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def models_in(names: Iterable[str]) -> list[str]:
    """The names that are models: one for each split set, its first part; nothing that goes beside a model."""
    found = []
    for name in sorted(names):
        last = PurePosixPath(name).name.lower()
        split = SPLIT.fullmatch(name)
        if last.endswith(SUFFIX) and not last.startswith(_BESIDE) and (split is None or int(split[2]) == 1):
            found.append(name)
    return found


def parts_of(name: str, names: Iterable[str]) -> list[str]:
    """``name`` and the other parts of its split set."""
    split = SPLIT.fullmatch(name)
    if split is None:
        return [name]
    own = (split[1], split[3])
    splits = {other: SPLIT.fullmatch(other) for other in sorted(names)}
    return [other for other, match in splits.items() if match and (match[1], match[3]) == own]


def pick(where: str, names: Iterable[str], quant: str | None) -> str:
    """The model of a repository that ``quant`` asks for; without it :data:`USUAL`, or the only one.

    Raises:
        CheckpointError: none, or several; the sentence lists what there is.
    """
    found = models_in(names)
    fitting = _labelled(found, quant or USUAL)
    if quant is None and not fitting:
        fitting = found
    if len(fitting) == 1:
        return fitting[0]
    what = "has several GGUF files" if fitting else f"has no GGUF file {quant}"
    raise CheckpointError(f"{where}: {what}; give one of these as {where}/FILE: {listed(fitting or found)}")


def _labelled(names: list[str], quant: str) -> list[str]:
    """The names with the label ``quant``; among "X-Q4_K_XL" and "X-UD-Q4_K_XL" the one that says no more."""
    label = re.escape(quant.lower())
    fitting = [name for name in names if re.search(rf"(?:^|[-./]){label}(?:[-./]|$)", name.lower())]
    plain = [name for name in fitting if f"ud-{quant.lower()}" not in name.lower()]
    return plain or fitting


def listed(names: list[str]) -> str:
    """Names for a sentence."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if names[_LISTED:] else "")


def gguf_in(directory: Path) -> Path | None:
    """The one GGUF model in a directory that holds no safetensors; None if there is none.

    Raises:
        CheckpointError: several models.
        OSError: the directory cannot be read.
    """
    names = os.listdir(directory)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) and name[0] != "." for name in names):
        return None
    found = models_in(names)
    if len(found) > 1:
        raise CheckpointError(f"{directory}: holds several GGUF models; give one of them: {listed(found)}")
    return directory / found[0] if found else None


def ollama_blob(name: str) -> Path | None:
    """The file of a model that Ollama has pulled, by the name it has there, such as ``llama3.2:1b``.

    Raises:
        CheckpointError: the model is listed, but its file is not there or the list is damaged.
    """
    match = _OLLAMA_NAME.fullmatch(name)
    if match is None:
        return None
    for store in _ollama_stores():
        library = store / "manifests" / "registry.ollama.ai" / "library"
        manifest = library / match[1] / (match[2] or "latest")
        if os.path.isfile(manifest):  # which a name too long for a file is not
            return _blob(store, manifest)
    return None


def _ollama_stores() -> list[Path]:
    own = os.environ.get("OLLAMA_MODELS")
    return [
        *([Path(own)] if own else []),
        Path.home() / ".ollama" / "models",
        Path("/usr/share/ollama/.ollama/models"),
    ]


def _blob(store: Path, manifest: Path) -> Path:
    try:
        content = json.loads(read_bounded(manifest, _MAX_MANIFEST))
        digests = [layer["digest"] for layer in content["layers"] if layer["mediaType"] == _MODEL_LAYER]
        match = _DIGEST.fullmatch(digests[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        match = None
    if match is None:
        raise CheckpointError(f"{manifest}: names no model; pull it again with Ollama")
    blob = store / "blobs" / f"sha256-{match[1]}"
    if not blob.is_file():
        raise CheckpointError(f"{blob}: missing, but named by {manifest}; pull the model again with Ollama")
    return blob
