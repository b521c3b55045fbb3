"""The files of the disk cache: a stretch of text, its keys and values, and the state at its end.

Layout: magic, length of the header (8 bytes, little-endian), header (JSON), BLAKE2b of all that, the tensors'
bytes, BLAKE2b of the whole. Both sums are made with the secret key of the cache, so nobody without it can
plant a file, and nothing of a file is parsed before the sum of its header is right. Reading a damaged or
planted one raises one of :data:`FAULTS`, whatever the damage.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

MAGIC = b"GODWIT-KV-2\n"
KEY_BYTES = 32
_DIGEST_BYTES = 32
_MAX_HEADER = 64 << 20
#: What reading a damaged file may raise.
FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
Tensors = list[Tensor]


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
        return MAGIC + len(data).to_bytes(8, "little") + data

    @staticmethod
    def read(file: IO[bytes], key: bytes) -> Header:
        """The header at the beginning of a file. Raises: one of the faults of damaged files."""
        beginning = file.read(len(MAGIC) + 8)
        if beginning[: len(MAGIC)] != MAGIC:
            raise ValueError("it begins with something else")
        size = int.from_bytes(beginning[len(MAGIC) :], "little")
        if size > _MAX_HEADER:
            raise ValueError("its header is too long")
        data = file.read(size)
        if not hmac.compare_digest(file.read(_DIGEST_BYTES), _digest(key, beginning, data).digest()):
            raise ValueError("the checksum of its header is not one made with the key of this cache")
        return Header.decode(data)

    @staticmethod
    def decode(data: bytes) -> Header:
        """A header from its JSON. Raises: one of the faults of damaged files."""
        raw = json.loads(data)
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


def write_stretch(file: IO[bytes], header: Header, tensors: Tensors, key: bytes) -> None:
    """Write a stretch and its checksums."""
    beginning = header.encode()
    digest = _digest(key)
    parts: list[bytes | memoryview] = [beginning, _digest(key, beginning).digest(), *map(raw_bytes, tensors)]
    for part in parts:
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def read_stretch(file: IO[bytes], key: bytes) -> tuple[Header, Tensors]:
    """A stretch from its file.

    Raises: one of the faults of damaged files.
    """
    header = Header.read(file, key)
    sizes = [_num_bytes(*one) for one in header.tensors]
    start = file.tell()
    if os.fstat(file.fileno()).st_size != start + sum(sizes) + _DIGEST_BYTES:
        raise ValueError("it has the wrong size")
    file.seek(0)
    digest = _digest(key, file.read(start))
    tensors = []
    for (dtype, shape), size in zip(header.tensors, sizes, strict=True):
        data = bytearray(file.read(size))
        digest.update(data)
        flat = torch.frombuffer(data, dtype=_dtype(dtype)) if size else torch.empty(0, dtype=_dtype(dtype))
        tensors.append(flat.reshape(shape))
    if not hmac.compare_digest(file.read(_DIGEST_BYTES), digest.digest()):
        raise ValueError("its checksum is wrong")
    return header, tensors


def _digest(key: bytes, *parts: bytes) -> hashlib.blake2b:
    digest = hashlib.blake2b(key=key, digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type."""
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
