"""Safetensors files: a fully validated header, and tensors as views of a private memory map.

Format (https://github.com/huggingface/safetensors): a little-endian u64 header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}``, then the tensors,
row-major and little-endian, at offsets counted from the end of the header, with neither overlaps nor gaps.

No data is returned before the whole header has been checked against the file.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

import torch

from godwit.errors import CheckpointError, MemoryBudgetError, UnsupportedModelError
from godwit.file_kinds import HEAD_BYTES, kind_of, refusal
from godwit.safe_files import check_json, open_regular

#: Less than the 100 MB of the reference implementation: headers of the largest models have less than 15 MB,
#: and parsing takes many times their size in memory.
MAX_HEADER_BYTES = 32 << 20
MAX_NAME = 1000
MAX_RANK = 16
_INT64_MAX = 2**63 - 1
_LENGTH_BYTES = 8

#: dtype strings of the format -> torch. Sub-byte and microscaling types are omitted: no supported checkpoint
#: has them as plain tensors.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "U16": torch.uint16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)

# Without this flag the kernel's overcommit heuristic refuses a private writable map of a file larger than
# memory, although its pages are never written. Older Pythons lack the constant.
_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: the stored dtype string, its shape and the absolute byte range [begin, end)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def shown(name: object) -> str:
    """A name from a file, escaped and shortened for an error message."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-12:]}"


def strict_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object; names must not be repeated.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, too large once parsed, a repeated name, or
            not an object.
    """
    check_json(data, path)
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except _RepeatedNameError as error:
        raise CheckpointError(f"{path}: its {what} has {error} twice; fetch the file again") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its {what} is nested too deeply; fetch the file again") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: its {what} is not JSON ({error}); fetch the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: its {what} is not a JSON object; fetch the file again")
    return parsed


class _RepeatedNameError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _RepeatedNameError(shown(name))
            seen.add(name)
    return found


class SafetensorsFile:
    """An open safetensors file: ``entries`` in file order, and tensors as views of a memory map.

    The map is private: writing to a view changes this process's copy of a page, never the file. Views keep
    the map alive. As with any map, truncating the file while it is mapped kills the process on access.

    Raises:
        CheckpointError: the file is missing, damaged, truncated or inconsistent.
        MemoryBudgetError: it cannot be mapped.
        UnsupportedModelError: a tensor has an unsupported dtype.
    """

    def __init__(self, path: Path, *, folder: Path | None = None) -> None:
        """Open ``path``; links must not leave ``folder``, if one is given."""
        self.path = path
        try:
            with open_regular(path, folder=folder) as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _read_header(file, size, path)
                self._map = map_file(file.fileno(), size, path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check the file"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the tensor, or a copy if its bytes are misaligned or it is boolean."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        if dtype is torch.bool:
            return (raw != 0).reshape(entry.shape)
        if entry.begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Drop the resident pages that only this tensor occupies; views of it read the file again."""
        entry = self.entries[name]
        release_pages(self._map, entry.begin, entry.end)


def release_pages(area: mmap.mmap, begin: int, end: int) -> None:
    """Drop the resident pages within bytes [begin, end) of a private map."""
    page = mmap.PAGESIZE
    first, last = -(-begin // page) * page, end // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        area.madvise(mmap.MADV_DONTNEED, first, last - first)


def map_file(descriptor: int, size: int, path: Path) -> mmap.mmap:
    """A private map of a whole file: writing to it changes this process's pages, never the file.

    Raises:
        MemoryBudgetError: this process has no room for as many addresses; they take no memory by themselves.
    """
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return mmap.mmap(descriptor, size, flags=flags, prot=prot)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryBudgetError(
            f"{path}: its {size / 1e9:,.1f} GB cannot be mapped within the address space of this process; "
            "raise that limit (ulimit -v), or choose a smaller model"
        ) from None


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors in the order of their bytes, and the header's metadata."""
    first = file.read(_LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    if length >> 32:  # no header is that long, so this is another kind of file
        kind = kind_of(first + file.read(HEAD_BYTES), size)
        if kind is not None:
            raise refusal(path, kind)
    if size < _LENGTH_BYTES:
        _damaged(path, f"only {size} bytes long, too short for a safetensors file")
    if length > MAX_HEADER_BYTES:
        _damaged(path, f"claims a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    start = _LENGTH_BYTES + length
    if start > size:
        _damaged(path, f"cut short: its header should have {length} bytes, {size - _LENGTH_BYTES} are there")
    data = file.read(length)
    if not data.startswith(b"{"):
        _damaged(path, "its header does not start with '{', so it is not a safetensors file")
    header = strict_json(data, path, "header")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    entries = [_entry(name, fields, start, path) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(entries, start, size, path)
    return {entry.name: entry for entry in entries}, metadata


def _metadata(metadata: object, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    # Some exporters write null for unknown values; anything else is a sign of damage.
    if not isinstance(metadata, dict) or not all(
        value is None or isinstance(value, str) for value in metadata.values()
    ):
        _damaged(path, "the __metadata__ of its header does not map text to text")
    return {key: value for key, value in metadata.items() if value is not None}


def _entry(name: str, fields: object, start: int, path: Path) -> TensorEntry:
    if len(name) > MAX_NAME:
        _damaged(path, f"the name {shown(name)} of a tensor has {len(name)} letters, more than {MAX_NAME}")
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        _damaged(path, f"tensor {shown(name)} lacks a dtype, a shape or data_offsets")
    dtype, shape = fields["dtype"], _shape(fields["shape"], name, path)
    begin, end = _offsets(fields["data_offsets"], name, path)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {shown(name)} has dtype {shown(dtype)}; Godwit reads {', '.join(DTYPES)}"
        )
    expected = DTYPES[dtype].itemsize
    for dim in shape:
        expected *= dim
    if end - begin != expected:
        _damaged(
            path,
            f"tensor {shown(name)} of shape {list(shape)} and dtype {dtype} needs {expected} bytes, "
            f"its offsets span {end - begin}",
        )
    return TensorEntry(name, dtype, shape, start + begin, start + end)


def _shape(value: object, name: str, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(dim) is int for dim in value):
        _damaged(path, f"the shape of tensor {shown(name)} is not a list of whole numbers")
    if len(value) > MAX_RANK:
        _damaged(path, f"tensor {shown(name)} has {len(value)} dimensions, more than {MAX_RANK}")
    elements = 1
    for dim in value:
        # Zeros count as one: the strides of an empty tensor must not overflow either.
        elements *= max(dim, 1)
        if dim < 0 or elements > _INT64_MAX // 8:
            _damaged(path, f"tensor {shown(name)} has the impossible shape {shown(value)}")
    return tuple(value)


def _offsets(value: object, name: str, path: Path) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(offset) is int for offset in value):
        _damaged(path, f"the data_offsets of tensor {shown(name)} are not two whole numbers")
    begin, end = value
    if not 0 <= begin <= end <= _INT64_MAX:
        _damaged(path, f"the data_offsets {shown(value)} of tensor {shown(name)} are out of order or range")
    return begin, end


def _check_layout(entries: list[TensorEntry], start: int, size: int, path: Path) -> None:
    at = start
    for entry in entries:
        if entry.end > size:
            _damaged(
                path,
                f"cut short or damaged: tensor {shown(entry.name)} ends at byte {entry.end}, "
                f"the file has {size}",
            )
        if entry.begin < at:
            _damaged(path, f"tensor {shown(entry.name)} overlaps the one before it")
        if entry.begin > at:
            _damaged(path, f"{entry.begin - at} unused bytes before tensor {shown(entry.name)}")
        at = entry.end
    if at != size:
        _damaged(path, f"{size - at} bytes after the last tensor")


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}; the file is damaged, fetch it again")
