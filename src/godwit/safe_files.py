"""Opening files that strangers made: regular files only, bounded reads, no links out of a model's folder.

A downloaded model may hold a named pipe, which would keep a reader waiting for ever, a link to a device
without an end, or a link to a private file of the user, whose content would end up in a packed model. Every
reader of such files opens them here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from godwit.errors import CheckpointError

#: Lists and objects of a JSON file; the headers and indexes of the largest models have about 500,000.
MAX_JSON_PARTS = 1 << 20


def open_regular(path: str | Path, *, folder: str | Path | None = None) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for another process.

    Args:
        path: the file; links are followed.
        folder: the model's folder, which links must not leave. In a snapshot of the Hub's cache they may also
            point to the blobs beside it. None: anywhere, for files that the user named.

    Raises:
        CheckpointError: a directory, pipe, socket or device, or a link out of the folder.
        OSError: there is no such file, or it cannot be read.
    """
    target = os.path.realpath(path) if folder is None else _inside(Path(path), Path(folder))
    # O_NONBLOCK: opening a named pipe must not wait for a writer. Links were resolved; one that takes the
    # file's place in between is an error.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    if not stat.S_ISREG(os.stat(target, follow_symlinks=False).st_mode):  # opening a device may do something
        raise _not_regular(path)
    descriptor = os.open(target, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def read_bounded(path: str | Path, limit: int, *, folder: str | Path | None = None) -> bytes:
    """The content of a file of at most ``limit`` bytes; see :func:`open_regular`.

    Raises:
        CheckpointError: it is larger, no regular file, or a link out of the folder.
        OSError: there is no such file, or it cannot be read.
    """
    with open_regular(path, folder=folder) as file:
        # By its size first: a file full of holes costs nothing to make, but memory to read.
        data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if data is None or len(data) > limit:
        raise CheckpointError(f"{path}: refused, since it is larger than {_size(limit)}, more than any needs")
    return data


def read_beginning(path: str | Path, limit: int, *, folder: str | Path | None = None) -> bytes:
    """The first ``limit`` bytes of a file; raises as :func:`open_regular`."""
    with open_regular(path, folder=folder) as file:
        return file.read(limit)


def check_json(data: bytes, path: object) -> None:
    """Refuse JSON that would take very much memory once it is parsed: an empty list costs 60 bytes.

    Raises:
        CheckpointError: it has too many lists and objects.
    """
    if data.count(b"[") + data.count(b"{") > MAX_JSON_PARTS:
        raise CheckpointError(f"{path}: refused, since it has more than {MAX_JSON_PARTS:,} lists and objects")


def _inside(path: Path, folder: Path) -> str:
    """Where ``path`` leads, which has to be inside ``folder``."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_cache:
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder, so it is not followed; put the file "
            "itself there"
        )
    return str(target)


def _not_regular(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path}: not a regular file but a directory, pipe or device; name a file")


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"
