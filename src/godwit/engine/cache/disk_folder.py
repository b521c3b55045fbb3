"""The folder of a disk cache: only its owner may write to it, and it holds the key of the checksums."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from pathlib import Path

from torch import Tensor

from godwit import __version__, _native
from godwit.engine.cache.disk_file import KEY_BYTES, raw_bytes
from godwit.errors import CheckpointError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import QuantExperts, QuantTensor
from godwit.safe_files import open_regular

KEY_FILE = "key"
_SAMPLES = 4096
_log = logging.getLogger(__name__)


def open_folder(folder: Path, name: str) -> bytes:
    """Create a cache folder, and a model's folder in it, where they are missing.

    Args:
        folder: the cache folder; it holds the key.
        name: of the model's folder.

    Returns:
        The key of the model's files.

    Raises:
        UsageError: a folder cannot be created or read, belongs to another user, or others may write to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_others(folder, os.stat(folder))
        inner = folder / name
        inner.mkdir(exist_ok=True, mode=0o700)
        _refuse_others(inner, os.stat(inner, follow_symlinks=False))
        secret = _read_key(folder / KEY_FILE) or _make_key(folder / KEY_FILE)
    except OSError as error:
        raise UsageError(f"{folder} cannot hold a cache: {error.strerror or error}") from None
    # Each model has its own key, so that a file moved to another model's folder is refused.
    return hashlib.blake2b(name.encode(), key=secret, digest_size=KEY_BYTES).digest()


def _refuse_others(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISDIR(state.st_mode):
        raise UsageError(f"{path} cannot hold a cache: it is not a directory; choose another one")
    if state.st_uid != os.geteuid():
        raise UsageError(
            f"{path} cannot hold a cache: it belongs to another user; choose a directory of your own"
        )
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path} cannot hold a cache: other users may write to it; run 'chmod go-w' on it")


def _read_key(path: Path) -> bytes | None:
    """The key in a file that only this user can read; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        with open_regular(path, folder=path.parent) as file:
            state, data = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except (OSError, CheckpointError):
        state, data = None, b""
    if state is None or len(data) != KEY_BYTES or state.st_mode & 0o077 or state.st_uid != os.geteuid():
        _log.warning(
            "%s is not a key that only this user can read; it is replaced, and the cache starts empty", path
        )
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return None
    return data


def _make_key(path: Path) -> bytes:
    """A new key, or that of another process that created one first."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    data = secrets.token_bytes(KEY_BYTES)
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, path)  # unlike a rename, it does not replace what is there
    except FileExistsError:
        return _read_key(path) or data
    finally:
        fresh.unlink(missing_ok=True)
    return data


def fingerprint(model: CausalLM) -> str:
    """A name for all that cached numbers depend on: version, kernels, config and weights (sampled)."""
    digest = hashlib.blake2b(digest_size=16)
    kernels = "torch" if model.stack is None else f"native {_native.instruction_set()}"
    digest.update(f"{__version__} {kernels} {model.config!r} {model.dtype}".encode())
    for name, module in model.named_modules():
        values = {**dict(module.named_parameters(recurse=False)), **vars(module)}
        for leaf in ("weight", "packed", *dict(module.named_parameters(recurse=False))):
            value = values.get(leaf)
            data = value.data if isinstance(value, QuantTensor | QuantExperts | Tensor) else None
            if data is not None:
                flat = data.detach().flatten()
                sample = flat[:: max(1, flat.numel() // _SAMPLES)]
                digest.update(f"{name}.{leaf} {tuple(data.shape)} {data.dtype}".encode())
                digest.update(raw_bytes(sample))
    return digest.hexdigest()
