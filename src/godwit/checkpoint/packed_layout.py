"""The table of a packed file: its blobs, their offsets, and the header that lists them.

docs/packed-format.md specifies every byte. Offsets follow from the order and sizes of the blobs, and sizes
from formats and shapes, so an entry is checked by computing it from its few independent fields.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from godwit.checkpoint.safetensors import shown, strict_json
from godwit.errors import CheckpointError
from godwit.qtensor import FORMATS, QuantExperts, QuantTensor, expert_layout, weight_bytes

SUFFIX = ".godwit"
MAGIC = b"GODWIT\0\0"
VERSION = 2
PREFIX = struct.Struct("<8sIIQ32s8x")  # magic, version, 0, header bytes, SHA-256 of the header, zeros
PAGE = 4096  # alignment of the first blob and of experts
ALIGNMENT = 64  # of every other tensor and embedded file
MAX_HEADER_BYTES = 64 << 20
MAX_FILE_BYTES = 256 << 20  # per embedded file
NO_SUM = "0" * 64

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
MAX_RANK = 4
MAX_NAME = 200
MAX_TEXT = 1000  # of the metadata
_MAX_DIM = 2**40
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,15}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SUM = re.compile(r"[0-9a-f]{64}")

Packed = torch.Tensor | QuantTensor | QuantExperts


@dataclass(frozen=True)
class FileBlob:
    """An embedded file of ``nbytes`` bytes."""

    nbytes: int
    alignment = ALIGNMENT

    def fields(self) -> dict[str, Any]:
        return {"nbytes": self.nbytes}


@dataclass(frozen=True)
class Plain:
    """An unquantised tensor: row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    alignment = ALIGNMENT

    @property
    def nbytes(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count * DTYPES[self.dtype].itemsize

    @property
    def num_weights(self) -> int:
        return self.nbytes // DTYPES[self.dtype].itemsize

    def fields(self) -> dict[str, Any]:
        return {"kind": "plain", "dtype": self.dtype, "shape": list(self.shape), "nbytes": self.nbytes}

    def view(self, data: torch.Tensor) -> Packed:
        return data.view(DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class Matrix:
    """A matrix in one of the formats of :mod:`godwit.qtensor`."""

    format: str
    shape: tuple[int, int]
    alignment = ALIGNMENT

    @property
    def nbytes(self) -> int:
        return weight_bytes(self.format, *self.shape)

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def fields(self) -> dict[str, Any]:
        return {"kind": "matrix", "format": self.format, "shape": list(self.shape), "nbytes": self.nbytes}

    def view(self, data: torch.Tensor) -> Packed:
        return QuantTensor(self.format, self.shape, data)


@dataclass(frozen=True)
class ExpertStack:
    """The routed experts of a layer, each starting at a page boundary."""

    format13: str
    format2: str
    num_experts: int
    hidden: int
    intermediate: int
    alignment = PAGE

    @property
    def layout(self) -> tuple[int, int]:
        """Offset of ``w2`` in an expert, and the distance between experts, in bytes."""
        return expert_layout(self.format13, self.format2, self.hidden, self.intermediate)

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.layout[1]

    @property
    def num_weights(self) -> int:
        return 3 * self.num_experts * self.hidden * self.intermediate

    def fields(self) -> dict[str, Any]:
        offset2, stride = self.layout
        sizes = {name: getattr(self, name) for name in ("num_experts", "hidden", "intermediate")}
        formats = {"format13": self.format13, "format2": self.format2}
        return {
            "kind": "experts",
            **formats,
            **sizes,
            "stride": stride,
            "offset2": offset2,
            "nbytes": self.nbytes,
        }

    def view(self, data: torch.Tensor) -> Packed:
        offset2, stride = self.layout
        sizes = (self.num_experts, self.hidden, self.intermediate)
        return QuantExperts(self.format13, self.format2, *sizes, stride, offset2, data)


TensorBlob = Plain | Matrix | ExpertStack
Blob = FileBlob | TensorBlob


@dataclass(frozen=True)
class Place:
    """A blob, its absolute offset, and the SHA-256 of its bytes in hexadecimal."""

    blob: Blob
    offset: int
    sha256: str

    @property
    def end(self) -> int:
        return self.offset + self.blob.nbytes


def data_start(header_bytes: int) -> int:
    """Start of the blobs after a header of ``header_bytes``; offsets are relative to it."""
    return -(-(PREFIX.size + header_bytes) // PAGE) * PAGE


def arrange(files: Mapping[str, FileBlob], tensors: Mapping[str, TensorBlob]) -> dict[tuple[str, str], int]:
    """Offset of each ("files" or "tensors", name); files come first, and each is aligned as required."""
    offsets, at = dict[tuple[str, str], int](), 0
    for table, blobs in (("files", files), ("tensors", tensors)):
        for name, blob in blobs.items():
            offsets[table, name] = -(-at // blob.alignment) * blob.alignment
            at = offsets[table, name] + blob.nbytes
    return offsets


@dataclass(frozen=True)
class Table:
    """A parsed header; offsets are absolute, tensors and files are in file order."""

    start: int  # of the blobs: the end of the header, rounded up
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    files: Mapping[str, Place]
    tensors: Mapping[str, Place]


def header_text(
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    files: Mapping[str, FileBlob],
    tensors: Mapping[str, TensorBlob],
    sums: Mapping[tuple[str, str], str],
) -> bytes:
    """The header; missing checksums are zeros, so that its length is known before the data are written."""
    offsets = arrange(files, tensors)

    def entry(table: str, name: str, blob: Blob) -> dict[str, Any]:
        key = (table, name)
        return {**blob.fields(), "offset": offsets[key], "sha256": sums.get(key, NO_SUM)}

    content = {
        "config": dict(config),
        "metadata": dict(metadata),
        "files": {name: entry("files", name, blob) for name, blob in files.items()},
        "tensors": {name: entry("tensors", name, blob) for name, blob in tensors.items()},
    }
    return json.dumps(content, separators=(",", ":")).encode()


def prefix_of(header: bytes) -> bytes:
    """The prefix of a header."""
    return PREFIX.pack(MAGIC, VERSION, 0, len(header), hashlib.sha256(header).digest())


def read_table(file: BinaryIO, size: int, path: Path) -> Table:
    """Read and check everything before the blobs of a file of ``size`` bytes.

    Raises:
        CheckpointError: not a complete packed file; the message says why.
    """
    first = file.read(PREFIX.size)
    if first[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"{path}: not a packed model, or an unfinished one; pack it again")
    if len(first) < PREFIX.size:
        damaged(path, f"only {size} bytes long, too short for a packed model")
    _, version, zero, length, digest = PREFIX.unpack(first)
    if version != VERSION:
        remedy = "quantize the model again" if version < VERSION else "update Godwit"
        raise CheckpointError(
            f"{path}: has version {version} of the packed format, but this Godwit reads version {VERSION}; "
            f"{remedy}"
        )
    if zero or any(first[-8:]):
        damaged(path, "the reserved bytes of its prefix are not zero")
    if length > MAX_HEADER_BYTES:
        damaged(path, f"claims a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    header = file.read(length) if PREFIX.size + length <= size else b""
    if len(header) != length:
        damaged(path, f"cut short: its header should have {length} bytes, {size - PREFIX.size} are there")
    if hashlib.sha256(header).digest() != digest:
        damaged(path, "its header does not match its checksum")
    start = data_start(length)
    if any(file.read(start - PREFIX.size - length)):
        damaged(path, "the bytes after its header are not zero")
    return _HeaderReader(path, size, start).table(strict_json(header, path, "header"))


class _HeaderReader:
    """Converts a parsed header to a table."""

    def __init__(self, path: Path, size: int, start: int) -> None:
        self.path, self.size, self.start = path, size, start

    def table(self, header: dict[str, Any]) -> Table:
        if header.keys() != {"config", "metadata", "files", "tensors"}:
            damaged(self.path, "its header does not consist of config, metadata, files and tensors")
        for name, part in header.items():
            if not isinstance(part, dict):
                damaged(self.path, f"the {name} of its header are not a JSON object")
        metadata = header["metadata"]
        texts = [text for pair in metadata.items() for text in pair]
        if not all(isinstance(text, str) and text.isprintable() and len(text) <= MAX_TEXT for text in texts):
            damaged(self.path, "the metadata of its header are not short printable texts")
        if not header["tensors"]:
            damaged(self.path, "it has no tensors")
        files = {name: self._file(name, entry) for name, entry in header["files"].items()}
        tensors = {name: self._tensor(name, entry) for name, entry in header["tensors"].items()}
        return self._placed(header, files, tensors)

    def _placed(
        self, header: dict[str, Any], files: dict[str, FileBlob], tensors: dict[str, TensorBlob]
    ) -> Table:
        end = self.start
        places: dict[str, dict[str, Place]] = {"files": {}, "tensors": {}}
        for (table, name), offset in arrange(files, tensors).items():
            entry = header[table][name]
            blob = files[name] if table == "files" else tensors[name]
            digest = entry.get("sha256")
            if not isinstance(digest, str) or not _SUM.fullmatch(digest):
                damaged(self.path, f"{shown(name)} has no checksum")
            # The entry must be exactly as Godwit would write it: same offset and size, no other fields.
            if not _same(entry, {**blob.fields(), "offset": offset, "sha256": digest}):
                damaged(self.path, f"the entry of {shown(name)} contradicts itself or its offset")
            place = Place(blob, self.start + offset, digest)
            places[table][name], end = place, place.end
        if end != self.size:
            what = "cut short" if end > self.size else "too long"
            damaged(self.path, f"{what}: its header describes {end} bytes, {self.size} are there")
        return Table(self.start, header["config"], header["metadata"], places["files"], places["tensors"])

    def _file(self, name: str, entry: object) -> FileBlob:
        if not _FILE_NAME.fullmatch(name):
            damaged(self.path, f"{shown(name)} is not a valid name of an embedded file")
        if not isinstance(entry, dict):
            damaged(self.path, f"the entry of {shown(name)} is not a JSON object")
        return FileBlob(self._count(entry, "nbytes", name, 0, MAX_FILE_BYTES))

    def _tensor(self, name: str, entry: object) -> TensorBlob:
        if not _TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME:
            damaged(self.path, f"{shown(name)} is not a valid name of a tensor")
        if not isinstance(entry, dict):
            damaged(self.path, f"the entry of {shown(name)} is not a JSON object")
        kind = entry.get("kind")
        if kind == "plain":
            return Plain(self._choice(entry, "dtype", name, DTYPES), self._shape(entry, name, 1, MAX_RANK))
        if kind == "matrix":
            rows, cols = self._shape(entry, name, 2, 2)
            return Matrix(self._choice(entry, "format", name, FORMATS), (rows, cols))
        if kind == "experts":
            first, second = (self._choice(entry, field, name, FORMATS) for field in ("format13", "format2"))
            sizes = ("num_experts", "hidden", "intermediate")
            return ExpertStack(
                first, second, *(self._count(entry, field, name, 1, _MAX_DIM) for field in sizes)
            )
        damaged(self.path, f"{shown(name)} is of the unknown kind {shown(kind)}")

    def _choice(self, entry: dict[str, Any], field: str, name: str, allowed: Iterable[str]) -> str:
        value = entry.get(field)
        if not isinstance(value, str) or value not in allowed:
            damaged(self.path, f"the {field} of {shown(name)} is {shown(value)}, not {' or '.join(allowed)}")
        return value

    def _count(self, entry: dict[str, Any], field: str, name: str, low: int, high: int) -> int:
        value = entry.get(field)
        if type(value) is not int or not low <= value <= high:
            damaged(self.path, f"the {field} of {shown(name)} is {shown(value)}, not {low} to {high}")
        return value

    def _shape(self, entry: dict[str, Any], name: str, low: int, high: int) -> tuple[int, ...]:
        shape = entry.get("shape")
        if isinstance(shape, list) and low <= len(shape) <= high:
            dims = tuple(dim for dim in shape if type(dim) is int and 1 <= dim <= _MAX_DIM)
            if len(dims) == len(shape):
                return dims
        damaged(self.path, f"the shape of {shown(name)} is {shown(shape)}, which is impossible")


def _same(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    # Compare types too: in Python, 64 == 64.0 and 1 == True.
    return entry.keys() == wanted.keys() and all(
        type(entry[name]) is type(value) and entry[name] == value for name, value in wanted.items()
    )


def damaged(path: Path, why: str) -> NoReturn:
    """Raise the error for a damaged file."""
    raise CheckpointError(f"{path}: {why}; the file is damaged, fetch or pack it again")
