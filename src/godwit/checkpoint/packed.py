"""The packed file: one model in one file, laid out as the native kernels read it (docs/packed-format.md).

Everything is checked against the file's size before anything is handed out; what is handed out are views of a
private memory map.
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
    MAGIC,
    SUFFIX,
    FileBlob,
    Packed,
    Place,
    TensorBlob,
    damaged,
    read_table,
)
from godwit.checkpoint.safetensors import shown
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.pages import ask_for_large_pages
from godwit.safe_files import open_regular, read_beginning

_CHUNK = 1 << 20


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is a file that begins like a packed model, or is named like one."""
    file = Path(path)
    if not file.is_file():
        return False
    try:
        return read_beginning(file, len(MAGIC)) == MAGIC or file.suffix == SUFFIX
    except (OSError, CheckpointError):
        return file.suffix == SUFFIX


class PackedFile:
    """An open packed model: header checked, data mapped and not yet read.

    The map is private: writing to a view changes this process's copy of a page, never the file.
    """

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
            CheckpointError: missing, unfinished, damaged, cut short or hostile; the sentence says which.
        """
        return PackedFile(Path(path))

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
        """
        return ModelConfig.from_dict(self.raw_config)

    def names(self) -> list[str]:
        """Tensor names in the order of their bytes: the parameter names of ``CausalLM``."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def blob(self, name: str) -> TensorBlob:
        """What a tensor is, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._place(name)[0]

    def tensor(self, name: str) -> Packed:
        """A tensor as views of the memory map.

        Raises:
            CheckpointError: there is no such tensor.
        """
        blob, place = self._place(name)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=blob.nbytes, offset=place.offset)
        return blob.view(data)

    def files(self) -> dict[str, bytes]:
        """The embedded files: tokenizer, chat template and their like.

        Raises:
            CheckpointError: one of them is not what its checksum says.
        """
        found = {}
        for name, place in self._files.items():
            found[name] = bytes(self._map[place.offset : place.end])
            if hashlib.sha256(found[name]).hexdigest() != place.sha256:
                damaged(self.path, f"the embedded file {name} does not have its checksum")
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the whole file again: every checksum, and the bytes between the parts, which have to be zeros.

        ``progress`` is called with (bytes done, bytes in all).

        Raises:
            CheckpointError: names what is damaged, up to a limit.
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
            damaged(self.path, f"{len(wrong)} of {len(places)} parts do not have their checksum: {listed}")

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
