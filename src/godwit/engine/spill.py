"""DiskCache: what the prefix index knows, kept in files, so that conversations survive a restart.

A file holds a stretch of text: the blocks after those that another file holds, and the state at its end. It
is written under a temporary name and renamed, and ends with a checksum; what is damaged or lacks what it goes
on from is dropped when an engine starts. Layout: magic, length of the header (8 bytes, little-endian), header
(JSON), the tensors' bytes, BLAKE2b of all that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from godwit import __version__, _native
from godwit.engine.cache import HybridCache, StateSnapshot
from godwit.engine.nodes import Node, Resumable
from godwit.engine.prefix import PrefixIndex
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.caches import PagedKV
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import QuantExperts, QuantTensor

_MAGIC = b"GODWIT-KV-1\n"
_DIGEST_BYTES = 32
_MAX_HEADER = 64 << 20
#: Stretches that wait to be written; when the disk is slower than the engine, the newest are not kept.
_MAX_WAITING = 8
#: A state this many tokens after the one before it is written; of the others only the last two of a text.
_MIN_SAVED = 256
_SAMPLES = 4096
_ABANDONED_SECONDS = 600

_log = logging.getLogger(__name__)


#: What reading a damaged file may raise.
_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_Tensors = list[Tensor]


@dataclass(frozen=True)
class Header:
    """Some nodes of the index one below the other.

    Attributes:
        root, parent: keys of the text's root and of the node above the first one.
        keys, tokens: of each node.
        tensors: dtype and shape of each: keys and values of all nodes layer by layer, state, scores.
        num_state, pending: tensors of the state at the end, None if there is none; tokens in its journal.
        has_logits: whether the last tensor is scores.
    """

    root: bytes
    parent: bytes
    keys: list[bytes]
    tokens: list[tuple[int, ...]]
    tensors: list[tuple[str, tuple[int, ...]]]
    num_state: int | None = None
    pending: int = 0
    has_logits: bool = False

    @property
    def state_bytes(self) -> int:
        if self.num_state is None:
            return 0
        return sum(_num_bytes(*one) for one in self.tensors[-self.num_state - self.has_logits :])

    def encode(self) -> bytes:
        raw = {
            **vars(self),
            "root": self.root.hex(),
            "parent": self.parent.hex(),
            "keys": [key.hex() for key in self.keys],
        }
        data = json.dumps(raw).encode()
        return _MAGIC + len(data).to_bytes(8, "little") + data

    @staticmethod
    def read(file: IO[bytes]) -> Header:
        """Raises: one of the faults of damaged files."""
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it begins with something else")
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError("its header is too long")
        raw = json.loads(file.read(size))
        header = Header(
            bytes.fromhex(raw["root"]),
            bytes.fromhex(raw["parent"]),
            [bytes.fromhex(key) for key in raw["keys"]],
            [tuple(map(int, tokens)) for tokens in raw["tokens"]],
            [(str(dtype), tuple(map(int, shape))) for dtype, shape in raw["tensors"]],
            None if raw["num_state"] is None else int(raw["num_state"]),
            int(raw["pending"]),
            bool(raw["has_logits"]),
        )
        sizes = [_num_bytes(dtype, shape) for dtype, shape in header.tensors]
        num_others = len(sizes) - (header.num_state or 0) - header.has_logits
        if not header.keys or len(header.keys) != len(header.tokens) or min(num_others, *sizes) < 0:
            raise ValueError("its header contradicts itself")
        return header


class DiskCache:
    """The files of one model in a directory.

    Args:
        folder: for all models; each has its own folder in it.
        model: which one.
        max_bytes: of the files; the oldest go first.

    Raises:
        UsageError: the directory cannot be made.
    """

    def __init__(self, folder: Path, model: CausalLM, max_bytes: int) -> None:
        self.folder = folder / fingerprint(model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(f"{folder} cannot keep a cache: {error.strerror or error}") from None
        self.max_bytes = max_bytes
        self._vocab_size = model.config.vocab_size
        self._known: dict[bytes, str] = {}  # key of each node in a file -> name of the file
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[Header, _Tensors] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="godwit-cache-writer", daemon=True)
        self._thread.start()

    def save(self, end: Node, cache: HybridCache) -> None:
        """Let the text that ends with ``end`` be written, as far as it is not yet; only copies it now."""
        with self._lock:
            names = {self._known[node.key] for node in end.upwards() if node.key in self._known}
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)  # the last to be pruned
        places = [end, *(node for node in end.beginnings() if node.resumable)]
        for rank, node in reversed(list(enumerate(places))):
            if rank < 2 or node.saves >= _MIN_SAVED:
                self._save_one(node, cache)

    def _save_one(self, node: Node, cache: HybridCache) -> None:
        name = node.key.hex() + ".kv"
        with self._lock:
            written = self._known.get(node.key)
            if written == name or (written and node.resumable is None) or self._waiting.full():
                return
            nodes = [node]
            while (above := nodes[0].parent) and above.parent and above.key not in self._known:
                nodes.insert(0, above)
            self._known |= {one.key: name for one in nodes}
        self._waiting.put(_copied(nodes, cache))

    def close(self) -> None:
        """Write what waits."""
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (stretch := self._waiting.get()) is not None:
            try:
                self._write(*stretch)
                self._prune()
            except OSError as error:
                _log.warning("the cache in %s cannot be written: %s", self.folder, error)

    def _write(self, header: Header, tensors: _Tensors) -> None:
        path = self.folder / f"{header.keys[-1].hex()}.kv"
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                _write(file, header, tensors)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        files = sorted(
            (path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.kv")
        )
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.max_bytes:
                return
            total -= size
            self._drop(path)

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with self._lock:
            self._known = {key: name for key, name in self._known.items() if name != path.name}

    def load(self, index: PrefixIndex, cache: HybridCache) -> int:
        """Put what the files hold into an index, the newest first as far as it fits; how many files."""
        for path in self.folder.glob("*.tmp*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        return sum(self._load_one(path, index, cache) for path in self._choose(cache, index.max_bytes))

    def _choose(self, cache: HybridCache, num_bytes: int) -> list[Path]:
        """Files that fit, each after the one that it goes on from."""
        newest = sorted(self.folder.glob("*.kv"), key=lambda path: -path.stat().st_mtime_ns)
        headers = {path: header for path in newest if (header := self._header(path)) is not None}
        owner = {key: path for path, header in headers.items() for key in header.keys}
        num_blocks = cache.blocks.num_free
        chosen: list[Path] = []
        for path in headers:
            line = [path]
            while (above := owner.get(headers[line[0]].parent)) and above not in chosen and above not in line:
                line.insert(0, above)
            line = [one for one in line if one not in chosen]
            num_blocks -= sum(len(headers[one].keys) for one in line)
            num_bytes -= sum(headers[one].state_bytes for one in line)
            if num_blocks < 0 or num_bytes < 0:
                break
            chosen += line
        return chosen

    def _header(self, path: Path) -> Header | None:
        try:
            with path.open("rb") as file:
                return Header.read(file)
        except _FAULTS as error:
            self._complain(path, error)
            return None

    def _load_one(self, path: Path, index: PrefixIndex, cache: HybridCache) -> bool:
        try:
            with path.open("rb") as file:
                header, tensors = _read(file)
            if header.has_logits and tensors[-1].shape != (self._vocab_size,):
                raise ValueError("its scores are not those of this model")
            loaded = _graft(header, tensors, index, cache)
        except MemoryBudgetError:
            return False
        except _FAULTS as error:
            self._complain(path, error)
            return False
        if not loaded:
            self._drop(path)
            return False
        with self._lock:
            self._known |= dict.fromkeys(header.keys, path.name)
        return True

    def _complain(self, path: Path, error: Exception) -> None:
        _log.warning("%s is damaged and is dropped (%s)", path, error)
        self._drop(path)


def _paged(cache: HybridCache) -> list[PagedKV]:
    return [layer for layer in (*cache.caches.layers, *cache.caches.mtp) if isinstance(layer, PagedKV)]


def _copied(nodes: list[Node], cache: HybridCache) -> tuple[Header, _Tensors]:
    """A stretch as a file keeps it."""
    blocks = [node.block for node in nodes]
    tensors = [part[blocks].cpu() for layer in _paged(cache) for part in (layer.k, layer.v)]
    resumable = nodes[-1].resumable
    num_state, pending, has_logits = None, 0, False
    if resumable is not None:
        tensors += resumable.state.tensors
        num_state, pending = len(resumable.state.tensors), resumable.state.pending
        if resumable.logits is not None:
            has_logits = True
            tensors.append(resumable.logits)
    *_, top = nodes[0].upwards()
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


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    if min(shape, default=0) < 0:
        raise ValueError(f"{shape} is no shape")
    return math.prod(shape) * _dtype(dtype).itemsize


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name} is no type of numbers that caches have")
    return dtype


def _write(file: IO[bytes], header: Header, tensors: _Tensors) -> None:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    parts: list[bytes | memoryview] = [header.encode(), *map(_bytes, tensors)]
    for part in parts:
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def _read(file: IO[bytes]) -> tuple[Header, _Tensors]:
    """A stretch from its file.

    Raises: one of the faults of damaged files.
    """
    header = Header.read(file)
    sizes = [_num_bytes(*one) for one in header.tensors]
    start = file.tell()
    if os.fstat(file.fileno()).st_size != start + sum(sizes) + _DIGEST_BYTES:
        raise ValueError("it has the wrong size")
    file.seek(0)
    digest = hashlib.blake2b(file.read(start), digest_size=_DIGEST_BYTES)
    tensors = []
    for (dtype, shape), size in zip(header.tensors, sizes, strict=True):
        data = bytearray(file.read(size))
        digest.update(data)
        flat = torch.frombuffer(data, dtype=_dtype(dtype)) if size else torch.empty(0, dtype=_dtype(dtype))
        tensors.append(flat.reshape(shape))
    if file.read() != digest.digest():
        raise ValueError("its checksum is wrong")
    return header, tensors


def _graft(header: Header, tensors: _Tensors, index: PrefixIndex, cache: HybridCache) -> bool:
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
            state = Resumable(StateSnapshot(tuple(kept), header.pending), logits)
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
                digest.update(_bytes(sample))
    return digest.hexdigest()
