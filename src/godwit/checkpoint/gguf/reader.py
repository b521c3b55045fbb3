"""GgufCheckpoint: a GGUF file, or the parts of one, as a checkpoint with Hugging Face names."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from godwit.checkpoint.gguf import metadata, tokenizer
from godwit.checkpoint.gguf.container import GgufFile, open_parts
from godwit.checkpoint.gguf.metadata import Metadata
from godwit.checkpoint.gguf.tensors import Heads, Names, Source
from godwit.checkpoint.gguf.types import GROUP, BlockType, as_groups, decode
from godwit.checkpoint.protocol import TensorInfo
from godwit.checkpoint.safetensors import shown
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UnsupportedModelError


class GgufCheckpoint:
    """An open GGUF file: its header is checked, its data are mapped.

    A :class:`~godwit.checkpoint.protocol.Checkpoint`: config, tokenizer and chat template come from the
    file's keys. Block types are decoded to float32, exactly as the format defines.
    """

    native_names = False

    def __init__(self, path: Path) -> None:
        """Open ``path``, which may be the first part of a split file.

        Raises:
            CheckpointError: missing, damaged or incomplete, or a tensor that its architecture does not have.
            UnsupportedModelError: an unsupported architecture or tensor type.
        """
        self.path = path
        parts = open_parts(path)
        self._files: dict[str, GgufFile] = {name: part for part in parts for name in part.entries}
        self._keys = Metadata(path, parts[0].keys)
        self._check_whole()
        self.raw_config: dict[str, Any] = self._read_config()
        self._sources = self._read_names()

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration. Raises UnsupportedModelError or CheckpointError."""
        return ModelConfig.from_dict(self.raw_config)

    @property
    def metadata(self) -> dict[str, str]:
        """The text values of the file's general keys, such as name, licence and source."""
        return {key: value for key, value in self._keys.keys.items()
                if key.startswith("general.") and isinstance(value, str)}  # fmt: skip

    def names(self) -> list[str]:
        """Hugging Face names in file order."""
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor; ``stored`` is its block type. Raises CheckpointError."""
        source, kind = self._source(name), self._kind(name)
        dtype = torch.float32 if kind.dtype is None or source.undo is not None else kind.dtype
        nbytes = math.prod(source.shape) // kind.elements * kind.bytes
        return TensorInfo(source.shape, dtype, kind.name, nbytes)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """The values of one tensor, or of a range of its rows. Raises CheckpointError."""
        source, kind = self._source(name), self._kind(name)
        values = decode(self._raw(source, rows), kind)
        if (scale := self._second_scale(source)) is not None:
            values = values.float() * scale
        if source.undo is not None:
            values = source.undo(values.float())
        if source.columns is not None:
            values = values[..., source.columns]
        return values.reshape(values.shape[0] if rows is not None else source.shape[0], *source.shape[1:])

    def groups(self, name: str, rows: slice | None = None) -> tuple[Tensor, Tensor] | None:
        """A matrix as q8 holds it: codes ``int8 [rows, cols]``, scales ``float16 [rows, cols / 32]``.

        None where the stored type is none of those that are q8 exactly. Raises CheckpointError.
        """
        source, kind = self._source(name), self._kind(name)
        if source.undo is not None or len(source.shape) != 2 or self._second_scale(source) is not None:
            return None
        found = as_groups(self._raw(source, rows), kind)
        if found is None or source.columns is None:
            return found
        codes, scales = found
        first = source.columns.view(-1, GROUP)[:, :1] if source.columns.numel() % GROUP == 0 else None
        if first is None or not torch.equal(source.columns.view(-1, GROUP), first + torch.arange(GROUP)):
            return None  # value heads that are no whole groups
        return codes[:, source.columns], scales[:, first.flatten() // GROUP]

    def release(self, name: str) -> None:
        """Drop the resident pages of the file's tensor that contains ``name``."""
        source = self._source(name)
        self._files[source.name].release(source.name)

    def files(self) -> dict[str, bytes]:
        """The tokenizer, chat template and generation settings as files of a checkpoint directory.

        None where the file holds no tokenizer.

        Raises:
            CheckpointError: a damaged tokenizer.
            UnsupportedModelError: its tokenizer is of a kind that is not read.
        """
        return tokenizer.as_files(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(part.entries[name].nbytes for name, part in self._files.items())

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors of the model."""
        return sum(math.prod(source.shape) for source in self._sources.values())

    # ---- Opening ---------------------------------------------------------------------------------------

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.entries[name].shape for name, part in self._files.items()}

    def _check_whole(self) -> None:
        """Raises CheckpointError for the draft head of another file."""
        if self._keys.architecture and "blk.0.attn_norm.weight" not in self._files:
            what = (
                "only the MTP layers of a model" if "output_norm.weight" in self._files else "no first layer"
            )
            raise CheckpointError(f"{self.path}: holds {what}; give the GGUF file of the whole model")

    def _read_config(self) -> dict[str, Any]:
        config = metadata.read_config(self._keys, self._shapes())
        if "rope_freqs.weight" in self._files:
            divisors = decode(self._files["rope_freqs.weight"].raw("rope_freqs.weight"),
                              self._entry("rope_freqs.weight")).flatten().double().numpy()  # fmt: skip
            rotary = metadata.llama3_rotary(divisors, config["rope_parameters"]["rope_theta"])
            if rotary is None:
                raise UnsupportedModelError(f"{self.path}: its rope_freqs are not those of a Llama 3 model")
            config["rope_parameters"] = rotary
        return config

    def _read_names(self) -> dict[str, Source]:
        arch, config = self._keys.architecture, self.raw_config
        num_layers = len(self.config.layers)  # checked first: orders of rows are as long as heads are wide
        try:
            names = Names(
                self._shapes(),
                num_layers,
                Heads.of(config, pairs=arch == "llama", tiled=self._tiled(arch)),
                zero_centered=arch in ("qwen3next", "qwen35", "qwen35moe"),
                mixtral=config["model_type"] == "mixtral",
            )
            return dict(names.sources())
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _tiled(self, arch: str) -> bool:
        """Whether value heads are in tiled order; a file of Ollama's converter says so itself."""
        said = self._keys.get("ssm.v_head_reordered")
        return arch in ("qwen35", "qwen35moe") and (said is None or bool(said))

    # ---- Reading ---------------------------------------------------------------------------------------

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}; its keys and tensors disagree")
        return source

    def _entry(self, name: str) -> BlockType:
        return self._files[name].entries[name].type

    def _kind(self, name: str) -> BlockType:
        return self._entry(self._source(name).name)

    def _raw(self, source: Source, rows: slice | None) -> Tensor:
        """The bytes of the rows that make up a tensor, in its own order."""
        raw = self._files[source.name].raw(source.name)
        if source.expert is not None:
            raw = raw[source.expert]
        chosen: Tensor | slice = slice(None) if source.rows is None else source.rows
        if rows is not None and isinstance(chosen, slice):
            chosen = slice(*chosen.indices(raw.shape[0]))
            chosen = slice(*(index + chosen.start for index in rows.indices(chosen.stop - chosen.start)[:2]))
        elif rows is not None and isinstance(chosen, Tensor):
            chosen = chosen[rows]
        return raw[chosen]

    def _second_scale(self, source: Source) -> Tensor | None:
        """What NVFP4 multiplies a whole tensor, or each expert, with."""
        name = source.name.removesuffix("weight") + "scale"
        if name not in self._files:
            return None
        scale = decode(self._files[name].raw(name), self._entry(name)).flatten().float()
        return scale[source.expert] if source.expert is not None and scale.numel() > 1 else scale
