"""A directory that appears whole or not at all, even if the process that writes it is killed.

The new content grows in a sibling ``.<name>.saving`` and is renamed when complete. A directory that it
replaces is renamed to ``.<name>.previous`` first and removed last. The next save cleans up after a killed
one.
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
    """A staging directory to fill; if the block ends without an error, it becomes ``path``.

    ``path`` may be missing or empty; with ``overwrite`` it may also be a checkpoint, which is then replaced
    as a whole.

    Raises:
        CheckpointError: ``path`` holds something else, another save is under way, or the disk refuses.
    """
    destination = Path(os.path.realpath(path))
    if not destination.name:
        raise CheckpointError(f"{destination}: cannot be a checkpoint; name a directory to create")
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
    """Make sure that a file can be created under this name.

    Raises:
        CheckpointError: the path exists already, or does not name a file.
    """
    if not path.name:
        raise CheckpointError(f"{str(path)!r}: not a file name; name the file to create")
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; remove it or choose another name")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise CheckpointError(
            f"{destination}: not a directory a checkpoint can be saved to; choose another name"
        )
    names = os.listdir(destination)
    if names and not overwrite:
        raise CheckpointError(f"{destination}: not empty; choose another name, or ask to overwrite it")
    if names and _MARKER not in names:
        raise CheckpointError(
            f"{destination}: holds files but no {_MARKER}, so it is not a checkpoint and is not overwritten; "
            "choose another name"
        )


@contextmanager
def _claimed(staging: Path, destination: Path) -> Iterator[None]:
    """Lock and empty the staging directory; remove it if the save fails."""
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # The save that held the lock before may have published the directory behind this descriptor.
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
        # Some network file systems cannot lock directories; there, concurrent saves are up to the user.
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
    """Complete or undo a replacement that was cut off between or after its renames."""
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
    """Put ``staging`` in the place of a checkpoint; :func:`_recover` completes it if this is cut off."""
    # The lock keeps another save from taking the old directory for its staging while it is removed.
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
    """Make renames in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
