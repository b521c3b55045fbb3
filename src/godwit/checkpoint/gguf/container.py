"""GGUF files: all counts and offsets are checked, and tensors are views of a private memory map.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; little-endian): "GGUF", u32 version, u64
number of tensors, u64 number of keys, the keys with their values, the tensors' names, dimensions, types and
offsets, padding, the tensors' bytes. No data is returned before the whole header has been checked against the
file, and allocations never exceed the file's size.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from godwit.checkpoint.choice import SPLIT
from godwit.checkpoint.gguf.types import REPACKED, TYPES, BlockType
from godwit.checkpoint.safetensors import map_file, release_pages, shown
from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.safe_files import open_regular

MAGIC = b"GGUF"
MAX_STRING = 64 << 20
MAX_NAME = 63
MAX_DIMS = 4
_MAX_ELEMENTS = 1 << 62
_SMALLEST_KEY = 8 + 1 + 4 + 1  # a key of one letter, its type and a value of one byte
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, int]] = {
    0: ("<u1", 1), 1: ("<i1", 1), 2: ("<u2", 2), 3: ("<i2", 2), 4: ("<u4", 4), 5: ("<i4", 4), 6: ("<f4", 4),
    _BOOL: ("<u1", 1), 10: ("<u8", 8), 11: ("<i8", 8), 12: ("<f8", 8),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a file: its type, shape (rows first, as PyTorch has it) and absolute byte range."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class GgufFile:
    """An open GGUF file: ``keys`` (metadata) and ``entries`` (tensors by name, in file order).

    Raises:
        CheckpointError: missing, damaged, truncated or inconsistent.
        UnsupportedModelError: an unsupported version or tensor type.
        MemoryBudgetError: it cannot be mapped.
    """

    def __init__(self, path: Path, *, folder: Path | None = None) -> None:
        """Open ``path``; links must not leave ``folder``, if one is given."""
        self.path = path
        try:
            with open_regular(path, folder=folder) as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    _damaged(path, f"only {self.size} bytes long, too short for a GGUF file")
                self._map = map_file(file.fileno(), self.size, path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check the file"
            ) from error
        reader = _Reader(path, self._map, self.size)
        self.keys, self.entries = reader.header()

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, ``uint8 [rows..., bytes of a row]``: a view of the map.

        A vector has as many rows as values.
        """
        entry = self.entries[name]
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        rows = entry.shape if len(entry.shape) == 1 and entry.type.elements == 1 else entry.shape[:-1]
        return flat.view(*rows, -1)

    def release(self, name: str) -> None:
        """Drop the resident pages that only this tensor occupies; views of it read the file again."""
        entry = self.entries[name]
        release_pages(self._map, entry.begin, entry.end)


def open_parts(path: Path) -> list[GgufFile]:
    """A file and, where it is the first of a split set, all the others.

    Raises:
        CheckpointError: a part is missing, is out of order or does not belong to the set.
    """
    first = GgufFile(path)
    count = int(first.keys.get("split.count", 0) or 0)
    if count <= 1:
        return [first]
    match = SPLIT.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path}: one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf; "
            "give the parts their original names"
        )
    if int(first.keys.get("split.no", 0)) != 0 or int(match[2]) != 1 or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: not the first of its {count} parts; give {match[1]}-00001-of-{count:05d}.gguf"
        )
    parts = [first]
    for number in range(2, count + 1):
        name = path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not name.exists():
            raise CheckpointError(f"{path}: part {name.name} is missing; fetch all {count} parts")
        parts.append(GgufFile(name))
        if parts[-1].keys.get("split.no") != number - 1 or parts[-1].keys.get("split.count") != count:
            raise CheckpointError(f"{name}: not part {number} of {count}; fetch the parts again")
    _check_set(path, parts)
    return parts


def _check_set(path: Path, parts: list[GgufFile]) -> None:
    names = [name for part in parts for name in part.entries]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: two of its parts hold the same tensor; fetch the parts again")
    total = parts[0].keys.get("split.tensors.count")
    if total is not None and total != len(names):
        raise CheckpointError(f"{path}: its parts hold {len(names)} tensors, not {total}; fetch them again")


class _Reader:
    """Reads a header from a map; checks each count against the file's size before using it."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 4

    def header(self) -> tuple[dict[str, Any], dict[str, GgufEntry]]:
        if self._data[:4] != MAGIC:
            self._fail("it does not begin with GGUF")
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self._path}: a big-endian GGUF file; fetch the little-endian one")
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self._path}: GGUF version {version}; Godwit reads 2 and 3")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_keys * _SMALLEST_KEY + num_tensors * _SMALLEST_TENSOR > self._size - self._at:
            self._fail(f"it claims {num_tensors} tensors and {num_keys} keys, more than it can hold")
        keys = self._keys(num_keys)
        infos = [self._info() for _ in range(num_tensors)]
        return keys, self._entries(infos, self._alignment(keys))

    def _keys(self, count: int) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("a key")
            if not key or key in keys:
                self._fail(f"it has the key {shown(key)} twice" if key else "it has an empty key")
            kind = self._number("<I")
            keys[key] = self._array(key) if kind == _ARRAY else self._value(kind, key)
        return keys

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {shown(key)}")
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            if count * 8 > self._size - self._at:
                self._fail(f"the list {shown(key)} of {count} texts is longer than the file")
            return [self._string(f"a text of {shown(key)}") for _ in range(count)]
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            self._fail(f"the value of {shown(key)} has the unknown type {kind}")
        dtype, width = _SCALARS[kind]
        if count * width > self._size - self._at:
            self._fail(f"the value of {shown(key)} is longer than the file")
        values = np.frombuffer(self._data, dtype, count, self._at).copy()
        self._at += count * width
        return values.astype(bool) if kind == _BOOL else values

    def _info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string("the name of a tensor")
        if not 0 < len(name.encode()) <= MAX_NAME:
            self._fail(f"a tensor has the impossible name {shown(name)}")
        num_dims = self._number("<I")
        if num_dims > MAX_DIMS:
            self._fail(f"tensor {shown(name)} has {num_dims} dimensions, more than {MAX_DIMS}")
        dims = tuple(self._number("<Q") for _ in range(num_dims))
        return name, self._number("<I"), dims, self._number("<Q")

    def _entries(
        self, infos: list[tuple[str, int, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufEntry]:
        start = -(-self._at // alignment) * alignment
        entries: dict[str, GgufEntry] = {}
        at = 0
        for name, number, dims, offset in infos:
            kind, shape = self._type(name, number), tuple(reversed(dims)) or (1,)
            size = self._tensor_bytes(name, kind, shape)
            if name in entries:
                self._fail(f"it has the tensor {shown(name)} twice")
            if offset != at:
                self._fail(f"tensor {shown(name)} lies at {offset} of the data, not at {at} after the last")
            if start + at + size > self._size:
                self._fail(f"cut short: tensor {shown(name)} ends beyond the file's {self._size} bytes")
            entries[name] = GgufEntry(name, kind, shape, start + at, start + at + size)
            at = -(-(at + size) // alignment) * alignment
        return entries

    def _type(self, name: str, number: int) -> BlockType:
        if number in TYPES:
            return TYPES[number]
        if number in REPACKED:
            why = "repacked for one CPU by an old llama.cpp; fetch the plain file"
        elif number >= 97:
            why = "known to ik_llama.cpp alone; fetch a file made for llama.cpp"
        else:
            why = "not read by Godwit; fetch another file of this model, such as Q4_K_M or Q8_0"
        raise UnsupportedModelError(f"{self._path}: tensor {shown(name)} has type {number}, {why}")

    def _tensor_bytes(self, name: str, kind: BlockType, shape: tuple[int, ...]) -> int:
        elements = 1
        for dim in shape:
            elements *= dim
            if dim < 1 or elements > _MAX_ELEMENTS:
                self._fail(f"tensor {shown(name)} has the impossible shape {list(shape)}")
        if shape[-1] % kind.elements:
            self._fail(f"rows of {shape[-1]} in tensor {shown(name)} are no whole blocks of {kind.name}")
        return elements // kind.elements * kind.bytes

    def _alignment(self, keys: dict[str, Any]) -> int:
        value = keys.get("general.alignment", 32)
        if not isinstance(value, int) or not 1 <= value <= 1 << 20 or value & (value - 1):
            self._fail(f"general.alignment {shown(value)} is no power of two up to a MiB")
        return int(value)

    def _string(self, what: str) -> str:
        length = self._number("<Q")
        if length > min(MAX_STRING, self._size - self._at):
            self._fail(f"{what} claims {length} bytes")
        text = self._data[self._at : self._at + length]
        self._at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _number(self, layout: str) -> int:
        width = struct.calcsize(layout)
        if self._at + width > self._size:
            self._fail("cut short inside its header")
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += width
        return int(value)

    def _fail(self, why: str) -> NoReturn:
        _damaged(self._path, why)


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}; the GGUF file is damaged, fetch it again")
