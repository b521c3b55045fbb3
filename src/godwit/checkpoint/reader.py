"""SafetensorsCheckpoint: the tensors of a model directory under their logical names."""

from __future__ import annotations

import logging
import math
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from godwit.checkpoint import fp8
from godwit.checkpoint.companions import read_companions
from godwit.checkpoint.formats import check_directory, is_gguf, name_of_tensors, original_of
from godwit.checkpoint.hub import locate, locate_config
from godwit.checkpoint.layout import open_shards
from godwit.checkpoint.protocol import TensorInfo, num_parameters
from godwit.checkpoint.safetensors import DTYPES, SafetensorsFile, TensorEntry, shown
from godwit.checkpoint.spelling import EMBEDDING, HEAD, canonical_name
from godwit.config import ModelConfig, read_config_json
from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.file_kinds import next_step

if TYPE_CHECKING:
    from godwit.checkpoint.gguf import GgufCheckpoint

# Tensors that accompany quantised weights: those of GPTQ, AWQ, compressed-tensors and bitsandbytes, and
# scales in other layouts. A weight read without them would be noise.
_COMPANION = re.compile(
    r"(?:.*[._])?(?:qweight|qzeros|scales?|scale_inv|scale_2|g_idx|weight_packed|zero_point|weight_shape"
    r"|absmax|quant_map|trellis|suh|svh|q_weight|W_q)"
)

_ROWS = 1024  # rows compared at a time, of head and embedding
_log = logging.getLogger(__name__)


class SafetensorsCheckpoint:
    """An open checkpoint directory: its headers are checked, its data are mapped but not read.

    A :class:`~godwit.checkpoint.protocol.Checkpoint`. Code in the directory (``auto_map``) is never run.
    """

    native_names = False

    def __init__(self, path: Path) -> None:
        """Open the directory ``path``; see :func:`open_checkpoint`."""
        self.path = path
        try:
            check_directory(path)
            self.raw_config: dict[str, Any] = read_config_json(path)
            self._original = original_of(path, self.raw_config)
            self._block = self._block_size()
            self._shards = open_shards(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check the directory"
            ) from error
        self._scales = self._pair_scales()
        self._hidden = frozenset(self._scales.values())

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration, untied if the files have a head that differs from the embedding.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
        """
        config = ModelConfig.from_dict(self.raw_config)
        if not config.tie_embeddings or not self._has_own_head():
            return config
        _log.warning(
            "%s: config.json ties the head to the embedding, but the checkpoint has a separate head, which "
            "is used (tie_word_embeddings should be false)",
            self.path,
        )
        return config.untied()

    def names(self) -> list[str]:
        """Logical tensor names in file order, without the scales of FP8 weights."""
        return [name for name in self._shards if name not in self._hidden]

    def __contains__(self, name: str) -> bool:
        return name in self._shards and name not in self._hidden

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self._entry(name)
        scale = self._scales.get(name)
        if scale is None:
            return TensorInfo(entry.shape, DTYPES[entry.dtype], entry.dtype, entry.nbytes)
        return TensorInfo(entry.shape, torch.bfloat16, entry.dtype, entry.nbytes + self._entry(scale).nbytes)

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor on the CPU.

        A plain tensor is a view of the memory map (writing to it changes a private copy, never the file); an
        FP8 weight is dequantised to a new bfloat16 tensor.

        Args:
            name: one of :meth:`names`.
            rows: read only this range of the first dimension.

        Raises:
            CheckpointError: there is no such tensor, or its scales are damaged.
        """
        self._entry(name)
        if name in self._scales:
            return self._dequantize(name, None, rows)
        whole = self._shards[name].tensor(name)
        return whole if rows is None else whole[rows]

    def groups(self, name: str, rows: slice | None = None) -> None:
        """None: plain and FP8 weights are not integers times a scale."""

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Copy one tensor into ``target`` (same shape, any dtype and device), then drop the file's pages.

        Loading a model this way keeps only one tensor of the file resident at a time.

        Raises:
            CheckpointError: there is no such tensor, its shape differs, or its scales are damaged.
        """
        entry = self._entry(name)
        if entry.shape != tuple(target.shape):
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} has shape {list(entry.shape)}, but the model expects "
                f"{list(target.shape)}, so config.json does not match the weights; fetch the checkpoint again"
            )
        with torch.no_grad():
            if name in self._scales:
                self._dequantize(name, target, None)
            else:
                target.copy_(self._shards[name].tensor(name))
        self.release(name)

    def release(self, name: str) -> None:
        """Drop the resident pages of one tensor; views of it stay valid and read the file again.

        Changes made through views are lost.
        """
        for stored in filter(None, (name, self._scales.get(name))):
            self._entry(stored)
            self._shards[stored].release(stored)

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files, chat template and generation settings.

        Raises:
            CheckpointError: one cannot be read, is not a regular file, or links out of the directory.
        """
        return read_companions(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata in the files' headers."""
        return {key: text for shard in self._shards.values() for key, text in shard.metadata.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in the files, including FP8 scales."""
        return sum(shard.entries[name].nbytes for name, shard in self._shards.items())

    @property
    def num_parameters(self) -> int:
        """Number of elements of all logical tensors, without FP8 scales."""
        return num_parameters(self)

    def _entry(self, name: str) -> TensorEntry:
        shard: SafetensorsFile | None = self._shards.get(name)
        if shard is None:
            raise CheckpointError(
                f"{self.path}: has no tensor {shown(name)}, so config.json does not match the weights; fetch "
                "the checkpoint again"
            )
        return shard.entries[name]

    def _has_own_head(self) -> bool:
        """Whether there is a head, and it differs from the embedding."""
        actual = {canonical_name(name): name for name in self.names()}
        head, embedding = actual.get(HEAD), actual.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        pair = self.tensor(head), self.tensor(embedding)
        same = pair[0].shape == pair[1].shape and all(
            torch.equal(ours.float(), theirs.float())
            for ours, theirs in zip(*(torch.split(part, _ROWS) for part in pair), strict=True)
        )
        self.release(head)
        self.release(embedding)
        return not same

    def _dequantize(self, name: str, out: torch.Tensor | None, rows: slice | None) -> torch.Tensor:
        q, scale = (self._shards[stored].tensor(stored) for stored in (name, self._scales[name]))
        try:
            return fp8.dequantize_fp8(q, scale, self._block, out=out, rows=rows)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {shown(name)}: {error}") from None

    def _block_size(self) -> tuple[int, int]:
        try:
            return fp8.fp8_block_size(self.raw_config, self._original)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.path}: {error}") from None

    def _pair_scales(self) -> dict[str, str]:
        """FP8 weight -> its scale tensor, after checking each pair; rejects all other quantisation."""
        pairs: dict[str, str] = {}
        for name in self._shards:
            if self._entry(name).dtype.startswith("F8"):
                pairs[name] = self._scale_of(name)
        known = set(pairs.values())
        for name in self._shards:
            if name not in known and _COMPANION.fullmatch(name):
                method = name_of_tensors(self.path, self._shards)
                what = f"quantised with {method}" if method else "quantised in a format"
                raise UnsupportedModelError(
                    f"{self.path}: its weights are {what} that is not supported (tensor {shown(name)}); "
                    f"{next_step(self._original)}"
                )
        return pairs

    def _scale_of(self, name: str) -> str:
        weight, scale = self._entry(name), name + fp8.SCALE_SUFFIX
        if scale not in self._shards and any(other in self._shards for other in _coarse_names(name)):
            raise self._coarse()
        if scale not in self._shards:
            raise CheckpointError(
                f"{self.path}: FP8 tensor {shown(name)} has no {shown(scale)}; fetch the checkpoint again"
            )
        stored = self._entry(scale)
        wanted = fp8.fp8_scale_shape(weight.shape, self._block) if len(weight.shape) >= 2 else None
        if stored.shape != wanted and _is_coarse(weight.shape, stored.shape):
            raise self._coarse()
        if stored.shape != wanted or stored.dtype not in ("F32", "BF16"):
            raise CheckpointError(
                f"{self.path}: FP8 tensor {shown(name)} of shape {list(weight.shape)} has scales of shape "
                f"{list(stored.shape)} and dtype {stored.dtype}, which do not fit blocks of "
                f"{self._block[0]} x {self._block[1]} in F32 or BF16; fetch the checkpoint again"
            )
        return scale

    def _coarse(self) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {fp8.coarse_scales(self._original)}")


def _coarse_names(weight: str) -> tuple[str, str]:
    """Names of the per-tensor or per-channel scales of an FP8 weight."""
    return weight + "_scale", weight.removesuffix("weight") + "scale_weight"


def _is_coarse(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether there is one scale for the whole tensor or one per row."""
    return math.prod(scale) == 1 or math.prod(scale) == math.prod(weight[:-1])


def open_checkpoint(
    source: str | Path, *, revision: str | None = None
) -> SafetensorsCheckpoint | GgufCheckpoint:
    """Open a checkpoint: a directory, a GGUF file, or a Hub repository, which is downloaded unless cached.

    Text of the form ``organisation/name`` names a repository if no such local path exists; the prefix ``hf://``
    always does, and a :class:`~pathlib.Path` is always local. ``organisation/name:Q4_K_M`` and
    ``organisation/name/FILE.gguf`` name a GGUF file of a repository, and ``name:tag`` a model that Ollama has
    pulled. ``revision`` is a branch, tag or commit of the repository.

    Raises:
        CheckpointError: missing, damaged, malicious or incomplete; also a config without weights.
        UnsupportedModelError: quantised in an unsupported format.
        OfflineError: the Hub cannot be reached and the cache lacks the repository.
    """
    path = locate(source, revision)
    return _open_gguf(path) if is_gguf(path) else SafetensorsCheckpoint(path)


def read_raw_config(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The config of a directory, a bare ``config.json``, a GGUF file or a Hub repository; no weights needed.

    Raises:
        CheckpointError: missing, too large or not a JSON object.
        OfflineError: the Hub cannot be reached and the cache lacks the file.
    """
    path = locate_config(source, revision)
    return _open_gguf(path).raw_config if is_gguf(path) else read_config_json(path)


def _open_gguf(path: Path) -> GgufCheckpoint:
    from godwit.checkpoint.gguf import GgufCheckpoint  # most models need nothing of it

    return GgufCheckpoint(path)
