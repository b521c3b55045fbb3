"""DiskCache: what the prefix index knows, kept in files, so that conversations survive a restart.

A file holds a stretch of text: the blocks after those that another file holds, and the state at its end. It
is written under a temporary name and renamed, and carries checksums made with a secret key; what is damaged
or was planted is dropped when it is read, what lacks its beginning when an engine starts. What memory has no
room for is read when it is wanted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from godwit import __version__, _native
from godwit.engine.cache.disk_file import FAULTS, Header, Tensors, raw_bytes, read_stretch, write_stretch
from godwit.engine.cache.disk_folder import open_folder
from godwit.engine.cache.hybrid import HybridCache, StateSnapshot
from godwit.engine.cache.nodes import Node, Snapshot, root_key
from godwit.engine.cache.prefix import Hit, PrefixIndex
from godwit.errors import CheckpointError, MemoryBudgetError
from godwit.models.batch import BLOCK_SIZE
from godwit.models.caches import PagedKV
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import QuantExperts, QuantTensor
from godwit.safe_files import open_regular

#: Stretches that wait to be written; when the disk is slower than the engine, the newest are not kept.
_MAX_WAITING = 8
#: A state this many tokens after the one before it is written; of the others only the last two of a text.
_MIN_SAVED = 256
#: Fewer tokens than these are read by the model sooner than from a file.
_MIN_FETCHED = 64
#: Share of the bytes that is left where files have to go.
_KEPT = 0.9
_SAMPLES = 4096
_ABANDONED_SECONDS = 600

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """What is known of a file.

    Attributes:
        root, parent, keys: as in its header.
        tail: tokens of its last node, if these are less than a block.
        state_bytes: 0 where it has no state.
        whole: the text at its end can be gone on from without another token.
    """

    root: bytes
    parent: bytes
    keys: tuple[bytes, ...]
    tail: tuple[int, ...]
    state_bytes: int
    whole: bool

    @staticmethod
    def of(header: Header) -> _Entry:
        tail = header.tokens[-1] if len(header.tokens[-1]) < BLOCK_SIZE else ()
        state, keys = header.state_bytes, tuple(header.keys)
        return _Entry(header.root, header.parent, keys, tail, state, header.has_logits)

    @property
    def before_last(self) -> bytes:
        """Key of the node above its last one."""
        return self.keys[-2] if len(self.keys) > 1 else self.parent


class DiskCache:
    """The files of one model in a directory.

    Args:
        folder: for all models; each has its own folder in it.
        model: which one.
        max_bytes: of the files; the oldest go first.

    Raises:
        UsageError: the directory cannot be made, belongs to someone else, or others may write to it.
    """

    def __init__(self, folder: Path, model: CausalLM, max_bytes: int) -> None:
        name = fingerprint(model)
        self.folder = folder / name
        self._key = open_folder(folder, name)
        self.max_bytes = max_bytes
        self._vocab_size = model.config.vocab_size
        self._num_bytes = 0  # of the files, about
        self._lock = threading.Lock()  # guards the three below
        self._entries: dict[str, _Entry] = {}  # by the file's name
        self._known: dict[bytes, str] = {}  # key of each node in a file -> name of the file
        self._tails: dict[bytes, set[str]] = {}  # key of a node -> files that end less than a block after it
        self._waiting: queue.Queue[tuple[Header, Tensors] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="godwit-cache-writer", daemon=True)
        self._thread.start()

    # writing

    def save(self, end: Node, cache: HybridCache) -> None:
        """Let the text that ends with ``end`` be written, as far as it is not yet; only copies it now."""
        with self._lock:
            names = {self._known[node.key] for node in end.ancestors() if node.key in self._known}
        self._use(names)
        places = [end, *(node for node in end.prefixes() if node.snapshot)]
        for rank, node in reversed(list(enumerate(places))):
            if rank < 2 or node.saved_tokens >= _MIN_SAVED:
                self._save_one(node, cache)

    def _use(self, names: Iterable[str]) -> None:
        """Let them be the last to be pruned."""
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)

    def _save_one(self, node: Node, cache: HybridCache) -> None:
        name = _name(node.key)
        with self._lock:
            written = self._known.get(node.key)
            if written == name or (written and node.snapshot is None) or self._waiting.full():
                return
            nodes = [node]
            while (above := nodes[0].parent) and above.parent and above.key not in self._known:
                nodes.insert(0, above)
        stretch = _copied(nodes, cache)
        self._register(name, stretch[0])
        self._waiting.put(stretch)

    def _register(self, name: str, header: Header) -> None:
        entry = _Entry.of(header)
        with self._lock:
            self._entries[name] = entry
            self._known |= dict.fromkeys(entry.keys, name)
            if entry.tail:
                self._tails.setdefault(entry.before_last, set()).add(name)

    def close(self) -> None:
        """Write what waits."""
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (stretch := self._waiting.get()) is not None:
            try:
                self._num_bytes += self._write(*stretch)
                if self._num_bytes > self.max_bytes:
                    self._prune()
            except OSError as error:
                self._forget(_name(stretch[0].keys[-1]))
                _log.warning("the cache in %s cannot be written: %s", self.folder, error)

    def _write(self, header: Header, tensors: Tensors) -> int:
        path = self.folder / _name(header.keys[-1])
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                write_stretch(file, header, tensors, self._key)
                size = file.tell()
            os.replace(temporary, path)
            return size
        finally:
            temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Drop the oldest files, and some more, so that not each new one has to look for what may go."""
        files = self._files()
        self._num_bytes = sum(size for size, _ in files)
        for size, path in files:
            if self._num_bytes <= _KEPT * self.max_bytes:
                return
            self._num_bytes -= size
            self._drop(path)

    def _files(self) -> list[tuple[int, Path]]:
        """Size and path of each regular file, the oldest first; whatever else there is is not ours."""
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
        self._forget(path.name)

    def _forget(self, name: str) -> None:
        with self._lock:
            entry = self._entries.pop(name, None)
            for key in entry.keys if entry else ():
                if self._known.get(key) == name:
                    del self._known[key]
            if entry and entry.tail:
                self._tails.get(entry.before_last, set()).discard(name)

    # reading

    def load(self, index: PrefixIndex, cache: HybridCache) -> int:
        """Put what the files hold into an index, the newest first as far as it fits; how many files."""
        for path in self.folder.glob("*.tmp*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        files = self._files()
        self._num_bytes = sum(size for size, _ in files)
        for _, path in reversed(files):
            if header := self._header(path):
                self._register(path.name, header)
        while orphans := [n for n, e in self._entries.items() if e.parent not in {e.root, *self._known}]:
            for name in orphans:
                self._drop(self.folder / name)
        return sum(self._load_one(name, index, cache) for name in self._choose(cache, index.max_bytes))

    def _choose(self, cache: HybridCache, num_bytes: int) -> list[str]:
        """Files that fit, each after the one that it goes on from."""
        num_blocks = cache.blocks.num_free
        chosen: dict[str, None] = {}
        for name in self._entries:
            line = [name]
            while above := self._known.get(self._entries[line[0]].parent):
                if above in chosen or above in line:
                    break
                line.insert(0, above)
            line = [one for one in line if one not in chosen]
            num_blocks -= sum(len(self._entries[one].keys) for one in line)
            num_bytes -= sum(self._entries[one].state_bytes for one in line)
            if num_blocks < 0 or num_bytes < 0:
                break
            chosen |= dict.fromkeys(line)
        return list(chosen)

    def fetch(
        self,
        ids: Sequence[int],
        salt: str,
        chain: Sequence[bytes],
        hit: Hit,
        index: PrefixIndex,
        cache: HybridCache,
    ) -> bool:
        """Put into the index what files know of ``ids`` beyond a hit; whether there was anything.

        What the caches have no room for is left where it is, also if other texts would have to go for it
        that are being answered.
        """
        names = self._wanted(ids, root_key(salt), chain, hit.position, index)
        if not names:
            return False
        index.keep(chain)
        with self._lock:
            missing = sum(len(self._entries[name].keys) for name in names) - cache.blocks.num_free
        if missing > 0 and index.evict(missing) < missing:
            return False
        self._use(names)
        return any([self._load_one(name, index, cache) for name in names])

    def _wanted(
        self, ids: Sequence[int], root: bytes, chain: Sequence[bytes], known: int, index: PrefixIndex
    ) -> list[str]:
        """The files that let ``ids`` be resumed the furthest, each after the one that it goes on from."""
        way: dict[str, None] = {}
        best: list[str] = []
        least = known + _MIN_FETCHED
        with self._lock:
            for place, key in enumerate((root, *chain)):
                ends = []
                if place:
                    if (name := self._known.get(key)) is None:
                        break
                    way[name] = None
                    if not index.recurrent or self._entries[name].keys[-1] == key:
                        ends.append((place * BLOCK_SIZE, name))
                ends += [
                    (place * BLOCK_SIZE + len(self._entries[n].tail), n) for n in self._tails.get(key, ())
                ]
                for end, name in ends:
                    entry = self._entries[name]
                    fits = tuple(ids[end - len(entry.tail) : end]) == entry.tail
                    if end >= least and fits and end < len(ids) + entry.whole:
                        best, least = list(dict.fromkeys((*way, name))), end + 1
            return [n for n in best if n == best[-1] or not index.contains(self._entries[n].keys)]

    def _header(self, path: Path) -> Header | None:
        try:
            with open_regular(path, folder=self.folder) as file:
                return self._checked(path, Header.read(file, self._key))
        except (CheckpointError, *FAULTS) as error:
            self._complain(path, error)
            return None

    def _load_one(self, name: str, index: PrefixIndex, cache: HybridCache) -> bool:
        path = self.folder / name
        try:
            with open_regular(path, folder=self.folder) as file:
                header, tensors = read_stretch(file, self._key)
            self._checked(path, header)
            if header.has_logits and tensors[-1].shape != (self._vocab_size,):
                raise ValueError("its scores are not those of this model")
            return _graft(header, tensors, index, cache)
        except (MemoryBudgetError, FileNotFoundError):  # not written yet, or pruned meanwhile
            return False
        except (CheckpointError, *FAULTS) as error:
            self._complain(path, error)
            return False

    def _checked(self, path: Path, header: Header) -> Header:
        if path.name != _name(header.keys[-1]):
            raise ValueError("it is another one under its name")
        return header

    def _complain(self, path: Path, error: Exception) -> None:
        _log.warning("%s is damaged and is dropped (%s)", path, error)
        self._drop(path)


def _name(key: bytes) -> str:
    """Of the file that ends with this node."""
    return key.hex() + ".kv"


def _paged(cache: HybridCache) -> list[PagedKV]:
    return [layer for layer in (*cache.caches.layers, *cache.caches.mtp) if isinstance(layer, PagedKV)]


def _copied(nodes: list[Node], cache: HybridCache) -> tuple[Header, Tensors]:
    """A stretch as a file keeps it."""
    blocks = [node.block for node in nodes]
    tensors = [part[blocks].cpu() for layer in _paged(cache) for part in (layer.k, layer.v)]
    resumable = nodes[-1].snapshot
    num_state, pending, has_logits = None, 0, False
    if resumable is not None:
        tensors += resumable.state.tensors
        num_state, pending = len(resumable.state.tensors), resumable.state.pending
        if resumable.logits is not None:
            has_logits = True
            tensors.append(resumable.logits)
    *_, top = nodes[0].ancestors()
    if top.parent is None or nodes[0].parent is None:
        raise RuntimeError("a node has no root")
    header = Header(
        top.parent.key,
        nodes[0].parent.key,
        [node.key for node in nodes],
        [node.tokens for node in nodes],
        [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors],
        num_state,
        pending,
        has_logits,
    )
    return header, tensors


def _graft(header: Header, tensors: Tensors, index: PrefixIndex, cache: HybridCache) -> bool:
    """Put a stretch into the index; False if what it goes on from is not there.

    Raises:
        ValueError: it is not of this model.
        MemoryBudgetError: no room is left.
    """
    layers, count = _paged(cache), len(header.keys)
    if not index.can_graft(header.root, header.parent):
        return False
    kept = tensors[2 * len(layers) :]
    logits = kept.pop() if header.has_logits else None
    pairs = zip([part for layer in layers for part in (layer.k, layer.v)], tensors, strict=False)
    if any(saved.shape != (count, *part.shape[1:]) or saved.dtype != part.dtype for part, saved in pairs):
        raise ValueError("its blocks are not those of this model")
    blocks = cache.blocks.allocate(count)
    try:
        for place, layer in enumerate(layers):
            layer.k[blocks] = tensors[2 * place].to(layer.k.device)
            layer.v[blocks] = tensors[2 * place + 1].to(layer.v.device)
        state = None
        if header.num_state is not None:
            state = Snapshot(StateSnapshot(tuple(kept), header.pending), logits)
            if len(kept) != header.num_state or not cache.accepts(state.state):
                raise ValueError("its state is not that of this model")
        index.graft(header.root, header.parent, header.tokens, header.keys, blocks, state)
    finally:
        cache.blocks.free(blocks)
    return True


def fingerprint(model: CausalLM) -> str:
    """A name for what the numbers in the caches depend on: the config, the weights (sampled), the kernels."""
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
