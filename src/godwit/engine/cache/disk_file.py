"""The files of the disk cache: a segment of a text, its keys and values, and the state at its end.

A file is in the safetensors format. Besides the numbered tensors of the caches it holds ``header`` (JSON) and
two message authentication codes made with the secret key of the cache: ``header_mac`` of the header and
``mac`` of everything. Nobody without the key can plant a file, and the header is not parsed before its code
has been checked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from godwit.checkpoint.safetensors import SafetensorsFile
from godwit.checkpoint.writer import save_tensors
from godwit.errors import CheckpointError, UnsupportedModelError

KEY_BYTES = 32
_FORMAT = b"godwit-kv-3"
_MAX_HEADER = 64 << 20
#: What parsing a damaged file may raise.
_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class SegmentHeader:
    """Nodes of the prefix index, each the child of the one before.

    Attributes:
        root, parent: keys of the root of the text and of the node above the first one.
        keys, tokens: of each node.
        num_state, pending: tensors of the state at the end, None without one; tokens in its journal.
        has_logits: whether the last tensor holds logits.
        state_bytes: of the state and the logits.
    """

    root: bytes
    parent: bytes
    keys: list[bytes]
    tokens: list[tuple[int, ...]]
    num_state: int | None = None
    pending: int = 0
    has_logits: bool = False
    state_bytes: int = 0

    @property
    def file_name(self) -> str:
        """The name of the file: that of its last node, and whether there is a state."""
        return self.keys[-1].hex() + ("" if self.num_state is None else "-state") + ".kv"

    def encode(self) -> bytes:
        raw = {
            **vars(self),
            "root": self.root.hex(),
            "parent": self.parent.hex(),
            "keys": [key.hex() for key in self.keys],
        }
        return json.dumps(raw).encode()

    @staticmethod
    def decode(data: bytes) -> SegmentHeader:
        """A header from its JSON. Raises: one of ``_FAULTS``."""
        raw = json.loads(data)
        header = SegmentHeader(
            bytes.fromhex(raw["root"]),
            bytes.fromhex(raw["parent"]),
            [bytes.fromhex(key) for key in raw["keys"]],
            [tuple(map(int, tokens)) for tokens in raw["tokens"]],
            None if raw["num_state"] is None else int(raw["num_state"]),
            int(raw["pending"]),
            bool(raw["has_logits"]),
            int(raw["state_bytes"]),
        )
        if not header.keys or len(header.keys) != len(header.tokens):
            raise ValueError("its header contradicts itself")
        if header.state_bytes < 0 or (header.num_state or 0) < 0:
            raise ValueError("its header contradicts itself")
        return header


def write_segment(path: Path, header: SegmentHeader, tensors: list[Tensor], key: bytes) -> None:
    """Write a segment to a new file, which appears whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    raw = header.encode()
    parts = {str(number): tensor for number, tensor in enumerate(tensors)}
    parts |= {"header": _as_tensor(raw), "header_mac": _as_tensor(_mac(key, raw, []))}
    save_tensors(path, {**parts, "mac": _as_tensor(_mac(key, raw, tensors))}, {})


def read_header(path: Path, key: bytes) -> tuple[SegmentHeader, list[Tensor]]:
    """As :func:`read_segment`, but without reading the tensors.

    Raises:
        CheckpointError: the file is missing or damaged, or was made with another key.
    """
    try:
        return SegmentHeader.decode(_authentic_header(SafetensorsFile(path, folder=path.parent), key)), []
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from error
    except _FAULTS as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_segment(path: Path, key: bytes) -> tuple[SegmentHeader, list[Tensor]]:
    """A whole file, in memory.

    Raises:
        CheckpointError: the file is missing or damaged, or was made with another key.
        MemoryBudgetError: this process cannot map it.
    """
    try:
        file = SafetensorsFile(path, folder=path.parent)
        raw = _authentic_header(file, key)
        tensors = [file.tensor(str(number)).clone() for number in range(len(file.entries) - 3)]
        if not hmac.compare_digest(_content(file, "mac"), _mac(key, raw, tensors)):
            raise ValueError("its checksum is wrong")
        return SegmentHeader.decode(raw), tensors
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from error
    except _FAULTS as error:
        raise CheckpointError(f"{path}: {error}") from error


def _authentic_header(file: SafetensorsFile, key: bytes) -> bytes:
    if file.entries["header"].nbytes > _MAX_HEADER:
        raise ValueError("its header is too long")
    raw = _content(file, "header")
    if not hmac.compare_digest(_content(file, "header_mac"), _mac(key, raw, [])):
        raise ValueError("the checksum of its header was not made with the key of this cache")
    return raw


def _mac(key: bytes, header: bytes, tensors: list[Tensor]) -> bytes:
    digest = hashlib.blake2b(header, key=key, digest_size=32, person=_FORMAT)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.digest()


def _content(file: SafetensorsFile, name: str) -> bytes:
    return bytes(raw_bytes(file.tensor(name)))


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype."""
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data
