"""Write packed files atomically; a killed writer can be resumed.

Data go to ``NAME.partial``; ``NAME.journal`` next to it identifies the source and lists the tensors on disk,
each added only after its data. The prefix is written last, then the file is renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from godwit.checkpoint import publish
from godwit.checkpoint.packed_layout import (
    PREFIX,
    FileBlob,
    TensorBlob,
    arrange,
    data_start,
    header_text,
    prefix_of,
)
from godwit.errors import CheckpointError
from godwit.safe_files import read_bounded

#: Sync after this many bytes; a kill loses at most that much plus one tensor.
SYNC_BYTES = 256 << 20
_KEY = "sha256"
_MAX_JOURNAL = 64 << 20


class PackedWriter:
    """Writes the tensors of a packed file one at a time, in any order; use it in a ``with`` statement.

    Args:
        path: the file to create.
        config: the model's config.
        files: files to embed.
        tensors: the tensors to be written.
        metadata: descriptive text about the file.
        identity: identifies the source; a partial file of another source is not resumed.
        restart: discard such a partial file and start over.

    Raises:
        CheckpointError: the file exists, another process is writing it, there is a partial file of another
            source, the disk is too full, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        tensors: Mapping[str, TensorBlob],
        *,
        metadata: Mapping[str, str],
        identity: str,
        restart: bool = False,
    ) -> None:
        self.path = Path(path)
        publish.refuse_existing(self.path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.journal = self.path.with_name(self.path.name + ".journal")
        blobs = {name: FileBlob(len(data)) for name, data in files.items()}
        self._table = (config, metadata, blobs, dict(tensors))
        draft = header_text(*self._table, {})
        start = data_start(len(draft))
        self._offsets = {key: start + offset for key, offset in arrange(blobs, tensors).items()}
        self._sizes = {("files", name): blob.nbytes for name, blob in blobs.items()}
        self._sizes |= {("tensors", name): blob.nbytes for name, blob in tensors.items()}
        self.nbytes = max(offset + self._sizes[key] for key, offset in self._offsets.items())
        self._identity = _digest(draft, identity.encode(), *files.values())
        self._sums: dict[tuple[str, str], str] = {}
        self._unrecorded: dict[str, int] = {}
        with self._explained():
            self._file = self._claim(restart)
            try:
                for name, data in files.items():
                    self._sums["files", name] = self._put(("files", name), [data])
            except BaseException:
                os.close(self._file)
                raise

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                with suppress(OSError):
                    self._record()  # so that a resumed run repeats as little as possible
        finally:
            os.close(self._file)

    def missing(self) -> list[str]:
        """Tensors still to be written, in file order."""
        return [name for name in self._table[3] if ("tensors", name) not in self._sums]

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write a tensor, given as consecutive uint8 tensors."""
        key = ("tensors", name)
        with self._explained():
            self._sums[key] = self._put(key, (_bytes(part) for part in parts))
            self._unrecorded[name] = self._sizes[key]
            if sum(self._unrecorded.values()) >= SYNC_BYTES:
                self._record()

    def _record(self) -> None:
        """Sync the tensors written since the last call and add them to the journal."""
        os.fsync(self._file)
        with open(self.journal, "ab") as journal:
            for name in self._unrecorded:
                journal.write(_line({"name": name, _KEY: self._sums["tensors", name]}))
            journal.flush()
            os.fsync(journal.fileno())
        self._unrecorded.clear()

    def finish(self) -> None:
        """Write the header and rename the file."""
        if self.missing():
            raise ValueError(f"{self.path}: {', '.join(self.missing()[:5])} not written yet")
        header = header_text(*self._table, self._sums)
        with self._explained():
            _write_at(self._file, header, PREFIX.size)
            os.fsync(self._file)
            _write_at(self._file, prefix_of(header), 0)
            os.fsync(self._file)
            if hasattr(os, "posix_fadvise"):  # drop the small cached pages: the reader wants huge ones
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.rename(self.partial, self.path)
            publish.sync_directory(self.path.parent)
            self.journal.unlink(missing_ok=True)

    def _put(self, key: tuple[str, str], parts: Iterable[Any]) -> str:
        begin = at = self._offsets[key]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
            _write_at(self._file, part, at)
            at += len(part)
        if at - begin != self._sizes[key]:
            raise ValueError(f"{key[1]} has {at - begin} bytes instead of {self._sizes[key]}")
        return digest.hexdigest()

    def _claim(self, restart: bool) -> int:
        """Open and lock the partial file, and find out which tensors it already has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not publish.lock(file) or not publish.is_still(self.partial, file):
                raise CheckpointError(
                    f"{self.path}: another process is writing it; wait, or choose another name"
                )
            try:
                self._resume(file, restart)
            except BaseException:
                if not os.fstat(file).st_size:  # nothing to resume
                    self.partial.unlink()
                    self.journal.unlink(missing_ok=True)
                raise
        except BaseException:
            os.close(file)
            raise
        return file

    def _resume(self, file: int, restart: bool) -> None:
        identity, sums = self._read_journal() if os.fstat(file).st_size else ("", {})
        if identity not in ("", self._identity) and not restart:
            raise CheckpointError(
                f"{self.partial}: made from another model or recipe, so it cannot be continued; start over "
                "with --restart, or choose another name"
            )
        known = identity == self._identity and os.fstat(file).st_size == self.nbytes and not restart
        if known:
            self._sums = {("tensors", name): digest for name, digest in sums.items()}
        else:
            os.ftruncate(file, 0)
        self._check_space(os.fstat(file).st_blocks * 512)
        self._start_journal(sums if known else {})
        os.ftruncate(file, self.nbytes)

    def _start_journal(self, sums: Mapping[str, str]) -> None:
        lines = [{"identity": self._identity}, *({"name": name, _KEY: sums[name]} for name in sums)]
        fresh = self.journal.with_name(self.journal.name + ".new")
        publish.write_file(fresh, b"".join(map(_line, lines)))
        os.replace(fresh, self.journal)

    def _read_journal(self) -> tuple[str, dict[str, str]]:
        """The identity and the checksums of the written tensors; the last line may be truncated."""
        identity, sums = "", dict[str, str]()
        with suppress(OSError, UnicodeDecodeError, CheckpointError):
            content = read_bounded(self.journal, _MAX_JOURNAL)
            for line in content.decode("ascii").splitlines(keepends=True):
                try:
                    fields = json.loads(line)
                except ValueError:
                    break
                if not line.endswith("\n") or not isinstance(fields, dict):
                    break
                identity = identity or str(fields.get("identity", ""))
                if isinstance(fields.get("name"), str) and isinstance(fields.get(_KEY), str):
                    sums[fields["name"]] = fields[_KEY]
        return identity, sums

    def _check_space(self, taken: int) -> None:
        free = shutil.disk_usage(self.partial.parent).free
        if self.nbytes - taken > free:
            raise CheckpointError(
                f"{self.path}: will take {_size(self.nbytes)}, but the disk has {_size(free)} free; free "
                "some space or choose another place"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            begun = os.path.lexists(self.partial)
            rest = f"; the partial file is kept as {self.partial.name}" if begun else "; choose another place"
            raise CheckpointError(
                f"{self.path}: could not be written ({error.strerror or error}){rest}"
            ) from error


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _line(fields: Mapping[str, str]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _bytes(part: torch.Tensor) -> memoryview:
    data: np.ndarray[tuple[int], np.dtype[np.uint8]] = part.contiguous().view(-1).numpy()
    return data.data


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
