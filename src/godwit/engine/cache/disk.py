"""DiskCache: the prefix index in files, so that conversations survive a restart.

A file holds a segment of a text: the blocks after those of another file, and perhaps the state at its end.
Files are written behind answers and read while other requests run, both in threads of their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from godwit.engine.cache.disk_catalog import DiskCatalog
from godwit.engine.cache.disk_file import read_header, read_segment, write_segment
from godwit.engine.cache.disk_folder import fingerprint, open_folder
from godwit.engine.cache.disk_segment import Segment, bytes_per_block, copy_segment, graft_segment
from godwit.engine.cache.hybrid import HybridCache
from godwit.engine.cache.nodes import Node, root_key
from godwit.engine.cache.prefix import PrefixIndex
from godwit.errors import CheckpointError, MemoryBudgetError
from godwit.models.causal_lm import CausalLM

#: A state is written if it saves so many tokens, and always if it is one of the last two of a text.
MIN_SAVED = 256
#: The model computes fewer tokens than these sooner than a file is read.
MIN_FETCHED = 64
#: What waits to be written or was just read takes this share of the memory for caches, and at most so much.
_BUFFER_SHARE = 8
_MAX_BUFFER = 512 << 20
#: Share of the bytes that pruning leaves.
_PRUNE_TO = 0.9
_TEMPORARY = ".writing-"
_ABANDONED_SECONDS = 600

_log = logging.getLogger(__name__)


@dataclass
class DiskStats:
    """What the disk cache has done since the start; counts are of files.

    Attributes:
        skipped: not written, because too many bytes were waiting to be written.
        queued_bytes: of the segments that wait to be written now.
    """

    written: int = 0
    skipped: int = 0
    read: int = 0
    queued_bytes: int = 0


@dataclass(frozen=True)
class DiskRead:
    """Files ``names`` that are being read for a text with the keys ``chain``."""

    names: list[str]
    chain: list[bytes]
    segments: Future[list[Segment]]


def buffer_bytes(max_bytes: int | None) -> int:
    """Memory for buffers of a disk cache, of ``max_bytes`` for all caches."""
    return _MAX_BUFFER if max_bytes is None else min(_MAX_BUFFER, max_bytes // _BUFFER_SHARE)


class DiskCache:
    """The files of one model in a directory.

    Args:
        folder: for all models; each has its own folder in it.
        model: the model.
        max_bytes: for the files; the least recently used are deleted first.
        max_buffer: bytes of memory: half for what waits to be written, half for what was read.

    Raises:
        UsageError: the directory cannot be created, belongs to another user, or others may write to it.
    """

    def __init__(self, folder: Path, model: CausalLM, max_bytes: int, max_buffer: int = _MAX_BUFFER) -> None:
        name = fingerprint(model)
        self.folder = folder / name
        self.stats = DiskStats()
        self._key = open_folder(folder, name)
        self._max_bytes = max_bytes
        self._max_buffer = max_buffer // 2
        self._vocab_size = model.config.vocab_size
        self._catalog = DiskCatalog()
        self._num_bytes = 0  # of the files, approximately
        self._lock = threading.Lock()  # guards the two below, and the stats
        self._used: dict[str, None] = {}  # files since the last pruning, the last used last
        self._read: DiskRead | None = None
        self._writer = ThreadPoolExecutor(1, "godwit-cache-writer")
        self._reader = ThreadPoolExecutor(1, "godwit-cache-reader")

    # writing

    def save(self, end: Node, cache: HybridCache) -> None:
        """Queue what no file holds yet of the text that ends at ``end``; only copies it now."""
        self._use(self._catalog.files_of(end.ancestors()))
        ends: list[Node] = [end]
        while ends[-1].previous is not None:
            ends.append(ends[-1].previous)
        for rank, node in reversed(list(enumerate(ends))):
            if rank < 2 or node.saved_tokens >= MIN_SAVED:
                self._save_to(node, cache)

    def _save_to(self, end: Node, cache: HybridCache) -> None:
        nodes = self._catalog.unsaved(end)
        per_block = bytes_per_block(cache)
        count = max(1, self._max_buffer // 4 // max(1, per_block))
        for first in range(0, len(nodes), count):
            part = nodes[first : first + count]
            snapshot = end.snapshot if part[-1] is end else None
            num_bytes = len(part) * per_block + (0 if snapshot is None else snapshot.nbytes)
            if not self._reserve(num_bytes):
                return
            segment = copy_segment(part, snapshot, cache)
            self._catalog.add(segment.header, num_bytes, written=False)
            self._writer.submit(_logged, partial(self._write, segment, num_bytes))

    def _reserve(self, num_bytes: int) -> bool:
        with self._lock:
            fits = self.stats.queued_bytes + num_bytes <= self._max_buffer
            if fits:
                self.stats.queued_bytes += num_bytes
            else:
                self.stats.skipped += 1
            return fits

    def _use(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._used.pop(name, None)
                self._used[name] = None

    def close(self) -> None:
        """Write what waits to be written."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.submit(_logged, self._touch_used)
        self._writer.shutdown()

    def _write(self, segment: Segment, num_bytes: int) -> None:
        name = segment.header.file_name
        try:
            self._num_bytes += self._write_file(name, segment)
            self._catalog.mark_written(name)
            self.stats.written += 1
            if self._num_bytes > self._max_bytes:
                self._prune()
        except (OSError, CheckpointError) as error:
            self._catalog.forget(name)
            _log.warning("cannot write to the cache in %s: %s", self.folder, error)
        finally:
            with self._lock:
                self.stats.queued_bytes -= num_bytes

    def _write_file(self, name: str, segment: Segment) -> int:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self.folder) as private:
            path = Path(private) / name
            write_segment(path, segment.header, segment.tensors, self._key)
            path.chmod(0o600)
            size = path.stat().st_size
            os.replace(path, self.folder / name)
            return size

    def _prune(self) -> None:
        """Delete the least recently used files, and some more, so that not every new file has to prune."""
        self._touch_used()
        files = self._files()
        self._num_bytes = sum(size for size, _ in files)
        for size, path in files:
            if self._num_bytes <= _PRUNE_TO * self._max_bytes:
                return
            self._num_bytes -= size
            self._drop(path)

    def _touch_used(self) -> None:
        with self._lock:
            used, self._used = self._used, {}
        for name in used:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)

    def _files(self) -> list[tuple[int, Path]]:
        """Size and path of each regular file, the least recently used first."""
        found = []
        for path in self.folder.glob("*.kv"):
            with contextlib.suppress(OSError):
                state = path.stat(follow_symlinks=False)
                if stat.S_ISREG(state.st_mode):
                    found.append((state.st_mtime_ns, state.st_size, path))
        return [(size, path) for _, size, path in sorted(found)]

    def _drop(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._catalog.forget(path.name)

    # reading

    def load(self, index: PrefixIndex, cache: HybridCache) -> None:
        """Put the files into an index that nothing uses yet, the newest first, as far as they fit."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path)
        files = self._files()
        self._num_bytes = sum(size for size, _ in files)
        for size, path in reversed(files):
            if found := self._open(path, whole=False):
                self._catalog.add(found.header, size, written=True)
        while orphans := self._catalog.orphans():
            for name in orphans:
                self._drop(self.folder / name)
        for name in self._catalog.fitting(cache.blocks.num_free, index.max_bytes):
            for segment in self._read_files([name]):
                self._graft(segment, index, cache)

    def fetch(
        self,
        ids: Sequence[int],
        salt: str,
        chain: list[bytes],
        position: int,
        index: PrefixIndex,
        cache: HybridCache,
    ) -> bool:
        """Whether files that continue ``ids`` after ``position`` are being read; starts to read them.

        One text is read at a time; others wait for their turn. What the caches have no room for stays where
        it is. Call :meth:`receive` before.
        """
        names = self._catalog.find(ids, root_key(salt), chain, position + MIN_FETCHED, index)
        if not names or not self._have_room(names, chain, index, cache):
            return False
        if self._read is None:
            batch = self._batch(names)
            if not batch:
                return False
            self._use(names)
            self._read = DiskRead(batch, chain[:], self._reader.submit(self._read_files, batch))
        return True

    def receive(self, index: PrefixIndex, cache: HybridCache) -> None:
        """Put what has been read by now into the index, for whatever request it was."""
        if self._read is None or not self._read.segments.done():
            return
        read, self._read = self._read, None
        try:
            segments = read.segments.result()
        except Exception:
            _log.exception("cache files cannot be read")
            for name in read.names:
                self._catalog.forget(name)
            return
        index.keep(read.chain)
        for segment in segments:
            missing = len(segment.header.keys) - cache.blocks.num_free
            if missing > 0 and index.evict(missing) < missing:
                return
            self._graft(segment, index, cache)

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the files that are being read."""
        if self._read is not None:
            wait([self._read.segments], seconds)

    def _have_room(
        self, names: list[str], chain: list[bytes], index: PrefixIndex, cache: HybridCache
    ) -> bool:
        missing = sum(len(self._catalog[name].keys) for name in names)
        owned = cache.num_owned(index.blocks_of(chain))
        return owned + missing <= cache.blocks.num_blocks

    def _batch(self, names: list[str]) -> list[str]:
        """The first of these files, as far as the buffer holds them."""
        batch, num_bytes = list[str](), 0
        for name in names:
            num_bytes += self._catalog[name].num_bytes
            if num_bytes > self._max_buffer:
                break
            batch.append(name)
        return batch

    def _read_files(self, names: Iterable[str]) -> list[Segment]:
        """The segments of these files up to the first one that is damaged."""
        segments = []
        for name in names:
            segment = self._open(self.folder / name, whole=True)
            if segment is None:
                break
            segments.append(segment)
            self.stats.read += 1
        return segments

    def _open(self, path: Path, *, whole: bool) -> Segment | None:
        """What a file holds, or its header alone; a damaged file is deleted."""
        try:
            segment = Segment(*(read_segment if whole else read_header)(path, self._key))
            if path.name != segment.header.file_name:
                raise CheckpointError(f"{path}: its content belongs under another name")
            return segment
        except CheckpointError as error:
            if os.path.lexists(path):  # another process may have pruned it
                _log.warning("dropping a damaged cache file: %s", error)
            self._drop(path)
        except MemoryBudgetError as error:
            _log.warning("cannot read a cache file: %s", error)
            self._catalog.forget(path.name)
        return None

    def _graft(self, segment: Segment, index: PrefixIndex, cache: HybridCache) -> None:
        """Put a segment into the index, if its parent is there."""
        header = segment.header
        if not index.can_graft(header.root, header.parent):
            return
        try:
            resumes = graft_segment(segment, self._vocab_size, index, cache)
        except MemoryBudgetError:
            return
        except (ValueError, OverflowError) as error:
            _log.warning("dropping a damaged cache file: %s: %s", self.folder / header.file_name, error)
            return self._drop(self.folder / header.file_name)
        if header.num_state is not None and not resumes:
            self._catalog.forget(header.file_name)  # it would only be read again and again


def _logged(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:
        _log.exception("a task of the disk cache failed")
