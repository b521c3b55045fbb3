"""What the loader asks of a model on disk, whatever the format of its files."""

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
    """What :meth:`Checkpoint.tensor` would return, and how it is stored.

    ``stored`` is the name of the stored type; ``nbytes`` counts the file's bytes, with scales.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    nbytes: int


class Checkpoint(Protocol):
    """An open model: headers checked, data mapped and not yet read.

    Opening one does not need a supported model type; :attr:`config` does.
    """

    @property
    def path(self) -> Path:
        """The directory or file, for messages."""

    @property
    def raw_config(self) -> Mapping[str, Any]:
        """The model's config with the fields of a ``config.json``."""

    @property
    def config(self) -> ModelConfig:
        """The same, checked.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
            CheckpointError: a field is missing or makes no sense.
        """

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text about the file that no computation depends on."""

    @property
    def native_names(self) -> bool:
        """Whether tensors have the names of ``CausalLM``'s parameters, rather than published ones."""

    def names(self) -> list[str]:
        """Tensor names, in the order in which reading them is fastest."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor on the CPU, dequantised where it is stored so; a view of the file where it can be.

        Args:
            name: one of :meth:`names`.
            rows: a range of the first dimension (step 1), which is all that is read then.

        Raises:
            CheckpointError: there is no such tensor, or it is damaged.
        """

    def groups(self, name: str, rows: slice | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A matrix that q8 holds exactly: codes ``int8 [rows, cols]``, scales ``float16 [rows, cols / 32]``.

        None for every other tensor.

        Raises:
            CheckpointError: there is no such tensor, or it is damaged.
        """

    def release(self, name: str) -> None:
        """Drop the resident pages of one tensor; a view of it stays valid and reads the file again."""

    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's files, chat template and generation settings, by name.

        Raises:
            CheckpointError: one cannot be read.
        """


def num_parameters(checkpoint: Checkpoint) -> int:
    """Elements of all tensors; scales do not count."""
    return sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names())


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the largest tensor; float32 if there is none."""
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    return max(infos, key=lambda info: info.nbytes).dtype if infos else torch.float32
