"""Packed files: a model in one file, in the layout of the native kernels (docs/packed-format.md).

The whole header is checked against the file's size first; tensors are views of a private memory map.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from godwit.checkpoint import safetensors
from godwit.checkpoint.packed_layout import (
    DTYPES,
    MAGIC,
    SUFFIX,
    ExpertStack,
    FileBlob,
    Matrix,
    Packed,
    Place,
    Plain,
    TensorBlob,
    damaged,
    read_table,
)
from godwit.checkpoint.protocol import TensorInfo
from godwit.checkpoint.safetensors import shown
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.pages import ask_for_large_pages
from godwit.qtensor import QuantExperts, QuantTensor, weight_bytes
from godwit.safe_files import open_regular, read_beginning

_CHUNK = 1 << 20
_W13, _W2 = ".w13", ".w2"  # suffixes of the parameters of a stack of experts


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is a file with the magic bytes or the suffix of a packed model."""
    file = Path(path)
    if not file.is_file():
        return False
    try:
        return read_beginning(file, len(MAGIC)) == MAGIC or file.suffix == SUFFIX
    except (OSError, CheckpointError):
        return file.suffix == SUFFIX


class PackedFile:
    """An open packed model: its header is checked, its data are mapped but not read.

    As a :class:`~godwit.checkpoint.protocol.Checkpoint` it has the tensors of the unpacked model, in float32;
    :meth:`packed` returns them as stored. The map is private: writing to a view changes this process's copy
    of a page, never the file.
    """

    native_names = True

    def __init__(self, path: Path) -> None:
        """Open the file ``path``; see :meth:`open`."""
        self.path = path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                table = read_table(file, size, path)
                self._map = safetensors.map_file(file.fileno(), size, path)
                ask_for_large_pages(self._map)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check the file"
            ) from error
        self.raw_config: dict[str, Any] = dict(table.config)
        self.metadata: dict[str, str] = dict(table.metadata)
        self.nbytes = size
        self._files, self._tensors = table.files, table.tensors

    @staticmethod
    def open(path: str | Path) -> PackedFile:
        """Open a packed file.

        Raises:
            CheckpointError: missing, unfinished, damaged, truncated or malicious.
        """
        return PackedFile(Path(path))

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
        """
        return ModelConfig.from_dict(self.raw_config)

    @property
    def blobs(self) -> dict[str, TensorBlob]:
        """The stored blobs in file order, by the parameter names of ``CausalLM``.

        A stack of experts is one blob, named after the module of its two parameters.
        """
        return {name: self._place(name)[0] for name in self._tensors}

    def packed(self, name: str) -> Packed:
        """One of :attr:`blobs` as views of the memory map.

        Raises:
            CheckpointError: there is no such tensor.
        """
        blob, place = self._place(name)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=blob.nbytes, offset=place.offset)
        return blob.view(data)

    def names(self) -> list[str]:
        """The parameter names of ``CausalLM``, in file order."""
        return [name for blob in self._tensors for name in self._parts(blob)]

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and format of one parameter, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        blob = self._place(self._blob_of(name))[0]
        if isinstance(blob, Plain):
            return TensorInfo(blob.shape, DTYPES[blob.dtype], blob.dtype, blob.nbytes)
        if isinstance(blob, Matrix):
            return TensorInfo(blob.shape, torch.float32, blob.format, blob.nbytes)
        rows, cols, format = (
            (2 * blob.intermediate, blob.hidden, blob.format13)
            if name.endswith(_W13)
            else (blob.hidden, blob.intermediate, blob.format2)
        )
        nbytes = blob.num_experts * weight_bytes(format, rows, cols)
        return TensorInfo((blob.num_experts, rows, cols), torch.float32, format, nbytes)

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One parameter, dequantised to float32 if it is quantised.

        Args:
            name: one of :meth:`names`.
            rows: read only this range of the first dimension.

        Raises:
            CheckpointError: there is no such tensor.
        """
        value = self.packed(self._blob_of(name))
        wanted = slice(None) if rows is None else rows
        if isinstance(value, QuantExperts):
            which = 0 if name.endswith(_W13) else 1
            chosen = range(*wanted.indices(value.num_experts))
            out = torch.empty(len(chosen), *self.info(name).shape[1:])
            for place, index in enumerate(chosen):
                out[place] = value.expert(index)[which].dequantize()
            return out
        return (value.dequantize() if isinstance(value, QuantTensor) else value)[wanted]

    def groups(self, name: str, rows: slice | None = None) -> None:
        """None: packed files are not packed again."""

    def release(self, name: str) -> None:
        """Drop the resident pages of a parameter's blob."""
        place = self._place(self._blob_of(name))[1]
        safetensors.release_pages(self._map, place.offset, place.end)

    def files(self) -> dict[str, bytes]:
        """The embedded files, such as tokenizer and chat template.

        Raises:
            CheckpointError: one of them does not match its checksum.
        """
        found = {}
        for name, place in self._files.items():
            found[name] = bytes(self._map[place.offset : place.end])
            if hashlib.sha256(found[name]).hexdigest() != place.sha256:
                damaged(self.path, f"the embedded file {name} does not match its checksum")
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every byte of the file: all checksums, and that the padding is zero.

        ``progress`` is called with (bytes done, total bytes).

        Raises:
            CheckpointError: the file is damaged; the message lists up to ten of the damaged parts.
        """
        wrong, done = [], 0
        try:
            with open_regular(self.path) as file:
                table = read_table(file, os.fstat(file.fileno()).st_size, self.path)
                places = {**table.files, **table.tensors}
                total, end = sum(place.blob.nbytes for place in places.values()), table.start
                for name, place in places.items():
                    if any(_between(file, end, place.offset)):
                        damaged(self.path, f"the bytes before {name} are not zero")
                    end = place.end
                    digest = hashlib.sha256()
                    for chunk in _chunks(file, place.offset, place.end):
                        digest.update(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(done, total)
                    if digest.hexdigest() != place.sha256:
                        wrong.append(name)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror or error}); check the disk"
            ) from error
        if wrong:
            listed = ", ".join(wrong[:10]) + (", ..." if wrong[10:] else "")
            damaged(self.path, f"{len(wrong)} of {len(places)} parts do not match their checksums: {listed}")

    def _parts(self, blob: str) -> tuple[str, ...]:
        stack = isinstance(self._tensors[blob].blob, ExpertStack)
        return (blob + _W13, blob + _W2) if stack else (blob,)

    def _blob_of(self, name: str) -> str:
        """The name of a parameter's blob: its own, or the stack of experts that contains it."""
        stack = name.removesuffix(_W13).removesuffix(_W2)
        return stack if stack in self._tensors and name in self._parts(stack) else name

    def _place(self, name: str) -> tuple[TensorBlob, Place]:
        place = self._tensors.get(name)
        if place is None or isinstance(place.blob, FileBlob):
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}; pack the model again")
        return place.blob, place


def _between(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _chunks(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    for at in range(begin, end, _CHUNK):
        yield _between(file, at, min(end, at + _CHUNK))
