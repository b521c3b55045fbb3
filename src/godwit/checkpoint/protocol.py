"""The interface of a model on disk, independent of its file format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from godwit.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype that :meth:`Checkpoint.tensor` returns, and how the tensor is stored.

    ``stored`` is the name of the stored type; ``nbytes`` is its size in the file, including scales.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    nbytes: int


class Checkpoint(Protocol):
    """An open model: its headers are checked, its data are mapped but not read.

    Any model type can be opened; :attr:`config` requires a supported one.
    """

    @property
    def path(self) -> Path:
        """The directory or file, for messages."""

    @property
    def raw_config(self) -> Mapping[str, Any]:
        """The model's config, with the fields of a ``config.json``."""

    @property
    def config(self) -> ModelConfig:
        """The validated config.

        Raises:
            UnsupportedModelError: the model type or one of its features is not supported.
            CheckpointError: a field is missing or invalid.
        """

    @property
    def metadata(self) -> Mapping[str, str]:
        """Descriptive text about the file; does not affect results."""

    @property
    def native_names(self) -> bool:
        """Whether tensors are named like ``CausalLM``'s parameters rather than as published."""

    def names(self) -> list[str]:
        """Tensor names, in the fastest order for reading."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor on the CPU, dequantised if necessary; a view of the file if possible.

        Args:
            name: one of :meth:`names`.
            rows: read only this range of the first dimension (step 1).

        Raises:
            CheckpointError: there is no such tensor, or it is damaged.
        """

    def groups(self, name: str, rows: slice | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes ``int8 [rows, cols]`` and scales ``float16 [rows, cols / 32]`` of a matrix that q8 can
        represent exactly; None for other tensors.

        Raises:
            CheckpointError: there is no such tensor, or it is damaged.
        """

    def release(self, name: str) -> None:
        """Drop the resident pages of one tensor; views of it stay valid and read the file again."""

    def files(self) -> Mapping[str, bytes]:
        """The files of the tokenizer, chat template and generation settings, by name.

        Raises:
            CheckpointError: one of them cannot be read.
        """


def num_parameters(checkpoint: Checkpoint) -> int:
    """Number of elements of all tensors, without scales."""
    return sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names())


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the largest tensor; float32 if there is none."""
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    return max(infos, key=lambda info: info.nbytes).dtype if infos else torch.float32
