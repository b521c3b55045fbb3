"""The folder of a disk cache: nobody else may write to it, and it holds the key to its checksums."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from pathlib import Path

from godwit.engine.cache.disk_file import KEY_BYTES
from godwit.errors import CheckpointError, UsageError
from godwit.safe_files import open_regular

KEY_FILE = "key"
_log = logging.getLogger(__name__)


def open_folder(folder: Path, name: str) -> bytes:
    """Make a cache folder and the one of a model in it, where they are missing.

    Args:
        folder: of all models; the key lies in it.
        name: of the model's own folder.

    Returns:
        The key of the model's files.

    Raises:
        UsageError: it cannot be made or read, belongs to another user, or others may write to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_others(folder, os.stat(folder))
        inner = folder / name
        inner.mkdir(exist_ok=True, mode=0o700)
        _refuse_others(inner, os.stat(inner, follow_symlinks=False))
        secret = _read_key(folder / KEY_FILE) or _make_key(folder / KEY_FILE)
    except OSError as error:
        raise UsageError(f"{folder} cannot keep a cache: {error.strerror or error}") from None
    # A key for each model: a file that is moved to another model's folder is not taken for one of its own.
    return hashlib.blake2b(name.encode(), key=secret, digest_size=KEY_BYTES).digest()


def _refuse_others(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISDIR(state.st_mode):
        raise UsageError(f"{path} cannot keep a cache: it is not a directory; choose another one")
    if state.st_uid != os.geteuid():
        raise UsageError(
            f"{path} cannot keep a cache: it belongs to another user; choose a directory of your own"
        )
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path} cannot keep a cache: other users may write to it; run 'chmod go-w' on it")


def _read_key(path: Path) -> bytes | None:
    """The key in a file that nobody else can have read; None where there is none."""
    if not os.path.lexists(path):
        return None
    try:
        with open_regular(path, folder=path.parent) as file:
            state, data = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except (OSError, CheckpointError):
        state, data = None, b""
    if state is None or len(data) != KEY_BYTES or state.st_mode & 0o077 or state.st_uid != os.geteuid():
        _log.warning(
            "%s is not a key that only this user can read; it is replaced, and the cache begins anew", path
        )
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return None
    return data


def _make_key(path: Path) -> bytes:
    """A new key, or that of another process which was quicker."""
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
