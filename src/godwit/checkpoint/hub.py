"""Resolve a model argument to a directory: a local path, or a Hugging Face Hub repository in the cache."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from godwit.errors import CheckpointError, GodwitError, OfflineError, UsageError
from godwit.file_kinds import kind_of_file, refusal

#: What is downloaded: weights, configuration, tokenizer and chat template, from the top level; never code.
ALLOWED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken")
IGNORED = ("*/*", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py")

_SCHEME = "hf://"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: For the Hub's first response, so that a machine without a network gets an error soon.
_TIMEOUT_SECONDS = 5.0
_NO_CONFIG = "{}: has no config.json, so it is not a model Godwit can read"
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def repository_id(source: str | Path) -> str | None:
    """The Hub repository that ``source`` names, or None if it is a local path.

    ``hf://org/name`` is always a repository; ``org/name`` is one unless that local path exists.
    """
    if isinstance(source, Path):
        return None
    name = source.removeprefix(_SCHEME)
    if not _REPOSITORY.fullmatch(name) or {".", ".."} & set(name.split("/")):
        if name != source:
            raise UsageError(f"{source!r:.100}: not a Hub repository; write it as hf://organisation/name")
        return None
    return name if name != source or not os.path.lexists(source) else None


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint; downloads it if ``source`` is a Hub repository that is not cached.

    Raises:
        CheckpointError: no such directory or repository, or a file instead of a directory.
        UnsupportedModelError: a file in another format.
        OfflineError: the Hub cannot be reached and the cache lacks the repository.
        UsageError: a revision for a local directory.
    """
    repository = repository_id(source)
    if repository is not None:
        return _from_hub(repository, lambda: _download(repository, revision, ALLOWED))
    _refuse_revision(source, revision)
    if os.path.isdir(source) and str(source):
        return Path(source)
    raise _not_a_directory(source)


def locate_config(source: str | Path, revision: str | None = None) -> Path:
    """The ``config.json`` of ``source``: a directory, the file itself or a Hub repository. Ignores weights.

    Raises: the errors of :func:`locate`.
    """
    repository = repository_id(source)
    if repository is not None:
        directory = _from_hub(repository, lambda: _download(repository, revision, ["config.json"]))
        if not (directory / "config.json").is_file():
            raise CheckpointError(_NO_CONFIG.format(repository))
        return directory / "config.json"
    if os.path.isfile(source) and str(source).endswith(".json"):
        _refuse_revision(source, revision)
        return Path(source)
    return locate(source, revision) / "config.json"


def _refuse_revision(source: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{source}: a revision applies to Hub repositories, not to local paths; omit it")


def _not_a_directory(source: str | Path) -> GodwitError:
    text = str(source)
    if not os.path.isfile(source):
        no_such = "no such directory" if not os.path.lexists(source) else "neither a directory nor a file"
        return CheckpointError(
            f"{text or repr(text)}: {no_such}; give a model directory, or a Hub repository as "
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
        "neither a packed model (.godwit) nor a directory with config.json and *.safetensors files; "
        "give one of them"
    )


def _download(repository: str, revision: str | None, files: Sequence[str]) -> str:
    import huggingface_hub  # imported here: it takes 0.2 s, and most models are local

    return huggingface_hub.snapshot_download(
        repository,
        revision=revision,
        allow_patterns=list(files),
        ignore_patterns=list(IGNORED),
        etag_timeout=_TIMEOUT_SECONDS,
    )


def _from_hub(repository: str, fetch: Callable[[], str]) -> Path:
    try:
        return Path(fetch())
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
