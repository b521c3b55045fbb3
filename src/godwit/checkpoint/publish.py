"""Write directories atomically, even if the writing process is killed.

New content is written to a sibling ``.<name>.saving`` and renamed when complete. A directory that it replaces
is first renamed to ``.<name>.previous`` and removed last. The next save cleans up after one that was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from godwit.errors import CheckpointError

_MARKER = "config.json"


@contextmanager
def published_directory(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A staging directory to fill, which becomes ``path`` if the block ends without an error.

    ``path`` must be missing or empty; with ``overwrite`` it may also be a checkpoint, which is replaced as a
    whole.

    Raises:
        CheckpointError: ``path`` has other content, another save is in progress, or it cannot be written.
    """
    destination = Path(os.path.realpath(path))
    if not destination.name:
        raise CheckpointError(f"{destination}: cannot be a checkpoint; give a directory to create")
    staging = destination.with_name(f".{destination.name}.saving")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(staging, destination):
            _recover(destination)
            _check_destination(destination, overwrite)
            yield staging
            _publish(staging, destination)
    except OSError as error:
        raise CheckpointError(
            f"{destination}: could not be written ({error.strerror or error}); nothing was changed there"
        ) from error


def refuse_existing(path: Path) -> None:
    """Check that no file has this name yet.

    Raises:
        CheckpointError: the path exists already, or is not a file name.
    """
    if not path.name:
        raise CheckpointError(f"{str(path)!r}: not a file name; give the file to create")
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; remove it or choose another name")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and sync it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: not a directory; choose another name")
    names = os.listdir(destination)
    if names and not overwrite:
        raise CheckpointError(f"{destination}: not empty; choose another name, or allow overwriting it")
    if names and _MARKER not in names:
        raise CheckpointError(
            f"{destination}: not empty and has no {_MARKER}, so it is not a checkpoint to overwrite; choose "
            "another name"
        )


@contextmanager
def _claimed(staging: Path, destination: Path) -> Iterator[None]:
    """Lock and empty the staging directory; remove it if the save fails."""
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # The previous holder of the lock may have published the directory of this descriptor.
        if not lock(descriptor) or not is_still(staging, descriptor):
            raise CheckpointError(
                f"{destination}: another process is saving there; wait, or choose another name"
            )
        try:
            _empty(staging)
            yield
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    for entry in list(os.scandir(directory)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems cannot lock directories; there, the user must avoid concurrent saves.
        return True
    return True


def is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    return False


def _previous(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.previous")


def _recover(destination: Path) -> None:
    """Complete or undo a replacement that was interrupted between or after its renames."""
    previous = _previous(destination)
    if not previous.is_dir():
        return
    if os.path.lexists(destination):
        shutil.rmtree(previous)
    else:
        os.rename(previous, destination)


def _publish(staging: Path, destination: Path) -> None:
    sync_directory(staging)
    if destination.is_dir() and os.listdir(destination):
        _replace(staging, destination)
    else:
        os.rename(staging, destination)
    sync_directory(destination.parent)


def _replace(staging: Path, destination: Path) -> None:
    """Replace a checkpoint by ``staging``; if interrupted, :func:`_recover` completes it."""
    # The lock keeps another save from using the old directory as its staging while it is being removed.
    old = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(old)
        previous = _previous(destination)
        os.rename(destination, previous)
        try:
            os.rename(staging, destination)
        except OSError:
            os.rename(previous, destination)
            raise
        sync_directory(destination.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        os.close(old)


def sync_directory(path: Path) -> None:
    """Sync a directory, so that renames in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
