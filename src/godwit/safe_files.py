"""Opening untrusted files: regular files only, bounded reads, no links out of the model's folder.

A downloaded model may contain a named pipe, which would block the reader forever, a link to an endless
device, or a link to a private file of the user, whose content would end up in a packed model. All readers
of model files open them through this module.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from godwit.errors import CheckpointError

#: Limit on the lists and objects in a JSON file; the headers and indexes of the largest models have 500,000.
MAX_JSON_PARTS = 1 << 20


def open_regular(path: str | Path, *, folder: str | Path | None = None) -> BinaryIO:
    """Open a regular file for reading; never blocks on another process.

    Args:
        path: the file; links are followed.
        folder: the model's folder, which links must not leave; in a snapshot of the Hub's cache they may also
            point to the cache's blobs. None: links may point anywhere, for files that the user named.

    Raises:
        CheckpointError: a directory, pipe, socket or device, or a link out of the folder.
        OSError: the file does not exist or cannot be read.
    """
    target = os.path.realpath(path) if folder is None else _inside(Path(path), Path(folder))
    # O_NONBLOCK: opening a named pipe must not wait for a writer. O_NOFOLLOW: links are resolved already, so
    # a link here has replaced the file in the meantime.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    if not stat.S_ISREG(os.stat(target, follow_symlinks=False).st_mode):  # opening a device can do things
        raise _not_regular(path)
    descriptor = os.open(target, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def read_bounded(path: str | Path, limit: int, *, folder: str | Path | None = None) -> bytes:
    """The content of a file of at most ``limit`` bytes; see :func:`open_regular`.

    Raises:
        CheckpointError: it is larger, not a regular file, or a link out of the folder.
        OSError: the file does not exist or cannot be read.
    """
    with open_regular(path, folder=folder) as file:
        # Check the size first: a sparse file is cheap to make but takes memory to read.
        data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if data is None or len(data) > limit:
        raise CheckpointError(f"{path}: larger than {_size(limit)}, the most that such a file may have")
    return data


def read_beginning(path: str | Path, limit: int, *, folder: str | Path | None = None) -> bytes:
    """The first ``limit`` bytes of a file; raises the errors of :func:`open_regular`."""
    with open_regular(path, folder=folder) as file:
        return file.read(limit)


def check_json(data: bytes, path: object) -> None:
    """Refuse JSON that would take too much memory to parse: an empty list alone takes 60 bytes.

    Raises:
        CheckpointError: there are too many lists and objects.
    """
    if data.count(b"[") + data.count(b"{") > MAX_JSON_PARTS:
        raise CheckpointError(f"{path}: more than {MAX_JSON_PARTS:,} lists and objects, which is the limit")


def _inside(path: Path, folder: Path) -> str:
    """The resolved path, which must be inside ``folder``."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_cache:
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder, which is not followed; replace it with a "
            "copy of the file"
        )
    return str(target)


def _not_regular(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path}: not a regular file but a directory, pipe or device; give a file")


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"
