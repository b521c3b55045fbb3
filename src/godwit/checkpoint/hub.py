"""Resolve a model argument to a directory or GGUF file: local, of Ollama, or from the Hub's cache."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from godwit.checkpoint.choice import gguf_in, listed, models_in, ollama_blob, parts_of, pick
from godwit.checkpoint.formats import is_gguf
from godwit.errors import CheckpointError, GodwitError, OfflineError, UsageError
from godwit.file_kinds import kind_of_file, refusal

Fetched = TypeVar("Fetched")

#: What is fetched: weights, configuration, tokenizer and chat template, at the top level only; never code.
ALLOWED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken")
IGNORED = ("*/*", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py")

_SCHEME = "hf://"
_NAME = re.compile(
    r"(hf://|hf\.co/|huggingface\.co/)?([\w.-]+/[\w.-]+)(?::([\w.-]+)|/((?:[\w.-]+/)*[\w.-]+\.gguf))?",
    re.ASCII,
)
#: For the Hub's first response, so that a machine without a network gets an error soon.
_TIMEOUT_SECONDS = 5.0
_NO_CONFIG = (
    "{}: has no config.json, so it is not a model Godwit can read; of a repository of GGUF files name one, "
    "as organisation/name:Q4_K_M"
)
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class HubName:
    """A repository, and the GGUF file in it that is meant: by its ``quant`` (Q4_K_M) or by its name."""

    repository: str
    quant: str | None = None
    file: str | None = None

    @property
    def is_choice(self) -> bool:
        """Whether one file is meant."""
        return bool(self.quant or self.file)


def hub_name(source: str | Path) -> HubName | None:
    """What ``source`` means on the Hub, or None where it means a local path.

    ``hf://org/name`` always is a repository; ``org/name`` is one where no such local path exists.
    ``org/name:QUANT`` and ``org/name/FILE.gguf`` mean one file.

    Raises:
        UsageError: ``hf://`` in front of something else.
    """
    if isinstance(source, Path):
        return None
    match = _NAME.fullmatch(source)
    if match is None or {".", ".."} & set(source.split("/")):
        if source.startswith(_SCHEME):
            raise UsageError(f"{source!r:.100} is not a Hub repository; write it as hf://organisation/name")
        return None
    beside = source.split("/")[0] if match[4] else source  # "models/a/b.gguf" beside a folder "models"
    if match[1] is None and os.path.lexists(beside):
        return None
    return HubName(match[2], match[3], match[4])


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint, or a GGUF file; downloaded first if it is on the Hub and not cached.

    Raises:
        CheckpointError: no such file, directory or repository, or several GGUF files to choose from.
        UnsupportedModelError: a file in another format.
        OfflineError: the Hub cannot be reached and its cache lacks the repository.
        UsageError: a revision for a local path.
    """
    name = hub_name(source)
    if name is not None:
        return _from_hub(name, revision)
    _refuse_revision(source, revision)
    if os.path.isdir(source) and str(source):
        return _in_directory(Path(source))
    if is_gguf(source):
        return Path(source)
    blob = ollama_blob(source) if isinstance(source, str) and not os.path.lexists(source) else None
    if blob is None:
        raise _not_a_directory(source)
    return blob


def _in_directory(directory: Path) -> Path:
    try:
        return gguf_in(directory) or directory
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be read ({error.strerror or error}); check the directory"
        ) from error


def locate_config(source: str | Path, revision: str | None = None) -> Path:
    """The file with the config of ``source``: a ``config.json``, or a GGUF file.

    Raises: the errors of :func:`locate`.
    """
    name = hub_name(source)
    if name is not None and not name.is_choice:
        repository = name.repository
        directory = _guarded(repository, lambda: _download(repository, revision, ["config.json"]))
        if not (directory / "config.json").is_file():
            raise CheckpointError(_NO_CONFIG.format(repository))
        return directory / "config.json"
    if os.path.isfile(source) and str(source).endswith(".json"):
        _refuse_revision(source, revision)
        return Path(source)
    found = locate(source, revision)
    return found / "config.json" if found.is_dir() else found


def _refuse_revision(source: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{source}: a revision applies to Hub repositories, not to local paths; omit it")


def _not_a_directory(source: str | Path) -> GodwitError:
    text = str(source)
    if not os.path.isfile(source):
        no_such = "no such directory" if not os.path.lexists(source) else "neither a directory nor a file"
        return CheckpointError(
            f"{text or repr(text)}: {no_such}; give a model directory, a GGUF file, or a Hub repository as "
            "organisation/name"
        )
    if text.endswith(".godwit"):
        return CheckpointError(f"{text}: already packed; give the original checkpoint")
    kind = kind_of_file(Path(source))
    if kind is not None:
        return refusal(text, kind)
    return CheckpointError(f"{text}: {_alone(text)}")


def _alone(name: str) -> str:
    """The error for a file that is one part of a checkpoint, or of an unknown kind."""
    if name.endswith(".json"):
        return "a config without weights; give the directory that has it and the *.safetensors files"
    if name.endswith(".safetensors"):
        return "weights without a config.json; give the directory that has both"
    return (
        "neither a packed model (.godwit), nor a GGUF file, nor a directory with config.json and "
        "*.safetensors files; give one of them"
    )


def _download(
    repository: str, revision: str | None, files: Sequence[str], ignored: Sequence[str] = IGNORED
) -> Path:
    import huggingface_hub  # here, since most models are local and it takes a fifth of a second

    directory = huggingface_hub.snapshot_download(
        repository,
        revision=revision,
        allow_patterns=list(files),
        ignore_patterns=list(ignored),
        etag_timeout=_TIMEOUT_SECONDS,
    )
    return Path(directory)


def _from_hub(name: HubName, revision: str | None) -> Path:
    """A repository's checkpoint or, where it has GGUF files alone or one is named, such a file."""
    repository = name.repository
    if not name.is_choice:
        directory = _guarded(repository, lambda: _download(repository, revision, ALLOWED))
        if any(directory.glob("*.safetensors")):
            return directory
        try:
            names = _guarded(repository, lambda: _files_of(repository, revision))
        except OfflineError:
            return directory  # whose error says what it lacks
        if not models_in(names):
            return directory
    else:
        names = _guarded(repository, lambda: _files_of(repository, revision))
    if name.file is not None and name.file not in names:
        raise CheckpointError(f"{repository}: has no file {name.file}; it has: {listed(models_in(names))}")
    file = name.file or pick(repository, names, name.quant)
    parts = [glob.escape(part) for part in parts_of(file, names)]
    return _guarded(repository, lambda: _download(repository, revision, parts, ())) / file


def _files_of(repository: str, revision: str | None) -> list[str]:
    """The names of a repository's files, or of the GGUF files in the cache where the Hub cannot be asked."""
    import huggingface_hub

    try:
        found = (
            huggingface_hub.model_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS).siblings or []
        )
        return [file.rfilename for file in found]
    except Exception as error:
        if type(_explain(repository, error)) is not OfflineError:
            raise
        cached = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
        names = [path.relative_to(cached).as_posix() for path in sorted(cached.rglob("*.gguf"))]
        if not names:
            raise
        return names


def _guarded(repository: str, fetch: Callable[[], Fetched]) -> Fetched:
    try:
        return fetch()
    except Exception as error:
        # The Hub client passes on the errors of its HTTP library, which depend on its version.
        raise _explain(repository, error) from error


def _explain(repository: str, error: Exception) -> GodwitError:
    from huggingface_hub import errors as hub_errors

    if isinstance(error, hub_errors.GatedRepoError):
        return CheckpointError(
            f"{repository}: its licence must be accepted first; accept it at "
            f"https://huggingface.co/{repository}, then log in with 'hf auth login'"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError | hub_errors.HFValidationError):
        return CheckpointError(
            f"{repository}: no such local directory, and no such repository on the Hub; "
            "check the name, or log in with 'hf auth login' if it is private"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return CheckpointError(f"{repository}: no such revision on the Hub; check its name")
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(
        error, hub_errors.LocalEntryNotFoundError
    ):
        return CheckpointError(_NO_CONFIG.format(repository))
    if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
        return CheckpointError(
            f"{repository}: the download could not be stored ({error.strerror}); "
            "free some disk space or set HF_HOME to another directory"
        )
    return OfflineError(
        f"{repository}: no such local directory, not complete in the cache, and the Hub cannot be reached "
        f"({type(error).__name__}); download it on a machine with network access "
        f"('hf download {repository} --local-dir DIR') and give that directory"
    )
