"""Write checkpoints: streamed shards, an index, ``config.json`` and extra files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from godwit.checkpoint.layout import INDEX, WEIGHTS
from godwit.checkpoint.publish import published_directory, refuse_existing, write_file
from godwit.checkpoint.safetensors import DTYPES, MAX_HEADER_BYTES, shown
from godwit.errors import CheckpointError

_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
_NO_FILES: Mapping[str, bytes] = MappingProxyType({})
_OF_TORCH: Mapping[str, str] = MappingProxyType({"format": "pt"})  # required by transformers


@dataclass(frozen=True)
class TensorSource:
    """A tensor to save: its description, and ``load`` to produce it when it is written.

    ``load`` is called once and must return exactly this shape and dtype, on any device and with any strides;
    its result is freed after it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
    path: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor] | TensorSource],
    raw_config: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes] = _NO_FILES,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a model directory atomically; ``safetensors`` and ``transformers`` can read it.

    Given a generator of pairs, at most one shard and the tensor after it are in memory; given
    :class:`TensorSource` objects, one tensor.

    Args:
        path: the directory to create. It must be missing or empty, unless ``overwrite`` is set and it is a
            checkpoint, which is then replaced as a whole, including files that this save does not write.
        tensors: pairs or sources with unique names; they are written in this order, shard by shard.
        raw_config: becomes ``config.json``.
        extra_files: file name -> content, such as the tokenizer's files.
        max_shard_bytes: tensor bytes per shard; a larger tensor gets its own shard.
        overwrite: replace an existing checkpoint.

    Raises:
        CheckpointError: the destination exists, cannot be written, or the tensors cannot be stored.
    """
    config = _config_bytes(raw_config)
    _check_extra_files(extra_files)
    with published_directory(path, overwrite=overwrite) as staging:
        stored = _write_shards(staging, tensors, max_shard_bytes)
        _check_quantization(raw_config, stored)
        write_file(staging / "config.json", config)
        for name, content in extra_files.items():
            write_file(staging / name, content)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically.

    Args:
        path: the file to create.
        tensors: the tensors by name.
        metadata: descriptive text about the file.

    Raises:
        CheckpointError: the file exists or cannot be written.
    """
    refuse_existing(path)
    temporary = path.with_name(f".{path.name}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_shard(temporary, list(_sources(tensors.items())), metadata)
            os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}); choose another place"
        ) from error


def _config_bytes(raw_config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(dict(raw_config), indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's config cannot be written as JSON ({error})") from None


def _check_extra_files(files: Mapping[str, bytes]) -> None:
    for name in files:
        plain = name == PureWindowsPath(name).name and name not in ("", ".", "..") and "\0" not in name
        if not plain or name in ("config.json", INDEX) or name.endswith(".safetensors"):
            raise CheckpointError(f"{shown(name)} cannot be the name of an extra file of a checkpoint")


def _check_quantization(raw_config: Mapping[str, Any], stored: set[torch.dtype]) -> None:
    if raw_config.get("quantization_config") is not None and torch.float8_e4m3fn not in stored:
        raise CheckpointError(
            "the config has a quantization_config, but no tensor to save is FP8; remove that section"
        )


def _write_shards(
    staging: Path, tensors: Iterable[tuple[str, torch.Tensor] | TensorSource], max_bytes: int
) -> set[torch.dtype]:
    """Write all shards, and an index if there are several; return the dtypes written."""
    shard_names: list[list[str]] = []
    total_bytes = total_elements = 0
    dtypes: set[torch.dtype] = set()
    for shard in _shards(_sources(tensors), max_bytes):
        shard_names.append([source.name for source in shard])
        total_bytes += sum(source.nbytes for source in shard)
        total_elements += sum(math.prod(source.shape) for source in shard)
        dtypes.update(source.dtype for source in shard)
        _write_shard(_numbered(staging, len(shard_names)), shard)
        # Free this shard's tensors before the generator fills the next one.
        shard.clear()
    if not shard_names:
        raise CheckpointError("there are no tensors to save")
    if len(shard_names) == 1:
        os.rename(_numbered(staging, 1), staging / WEIGHTS)
        return dtypes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shard_names, 1):
        final = f"model-{number:05d}-of-{len(shard_names):05d}.safetensors"
        os.rename(_numbered(staging, number), staging / final)
        weight_map.update(dict.fromkeys(names, final))
    metadata = {"total_size": total_bytes, "total_parameters": total_elements}
    index = {"metadata": metadata, "weight_map": weight_map}
    write_file(staging / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return dtypes


def _numbered(staging: Path, number: int) -> Path:
    return staging / f"shard-{number}"


def _sources(tensors: Iterable[tuple[str, torch.Tensor] | TensorSource]) -> Iterator[TensorSource]:
    seen = {"__metadata__"}
    for item in tensors:
        source = item if isinstance(item, TensorSource) else _source_of(*item)
        if source.name in seen:
            raise CheckpointError(
                f"tensor name {shown(source.name)} is used twice or reserved; rename one of the tensors"
            )
        if source.dtype not in _NAMES:
            raise CheckpointError(
                f"tensor {shown(source.name)} has dtype {source.dtype}, which cannot be saved"
            )
        seen.add(source.name)
        yield source


def _source_of(name: str, tensor: torch.Tensor) -> TensorSource:
    return TensorSource(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _shards(sources: Iterable[TensorSource], max_bytes: int) -> Iterator[list[TensorSource]]:
    shard: list[TensorSource] = []
    size = 0
    for source in sources:
        if shard and size + source.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(source)
        size += source.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, shard: list[TensorSource], metadata: Mapping[str, str] = _OF_TORCH) -> None:
    # Wide elements first, as in the reference writer, so that every tensor is aligned to its element size.
    ordered = sorted(shard, key=lambda source: -source.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {**_OF_TORCH, **metadata}}
    at = 0
    for source in ordered:
        header[source.name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [at, at + source.nbytes],
        }
        at += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError("too many tensors for one shard; save with a smaller max_shard_bytes")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in ordered:
            file.write(_bytes_of(source))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(source: TensorSource) -> memoryview:
    tensor = source.load().detach()
    if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype or tensor.is_meta:
        raise CheckpointError(
            f"tensor {shown(source.name)} came as {list(tensor.shape)} {tensor.dtype} on {tensor.device}, "
            f"expected {list(source.shape)} {source.dtype}"
        )
    flat = tensor.to("cpu").contiguous().reshape(-1)
    data: np.ndarray[tuple[int], np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return data.data
