"""Random packed models of full size, to measure speed and memory without the real weights.

Codes are drawn directly, about as fast as a disk writes. Matrices preserve the magnitude of their inputs and
layers add little to the hidden states, so activations and logits stay in the usual range for any number of
layers.

Random routers choose experts almost uniformly; real ones do not. With ``skew`` every expert of a layer has
its own popularity: the first 32 hidden dimensions have the same constant for every token (the embedding sets
it, no layer writes to them, and only routers read them), so that the routers' weights for them act as a bias
per expert. Popularities are normally distributed, with a standard deviation of :data:`POPULARITY` times that
of the token-dependent part of the logits. This reproduces how often real text uses each expert, but not the
order: there is no locality, topics do not change, and all layers are alike.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import godwit
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.checkpoint.packed_writer import PackedWriter
from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.models.recipe import QuantRecipe, tensor_blobs
from godwit.qtensor import (
    CODE_BYTES,
    GROUP,
    SPAN,
    TILE_ROWS,
    QuantTensor,
    groups,
    join_expert,
    quantize,
    spans,
    weight_bytes,
)
from godwit.shrink.quantize import PackingReport

#: With 0.45, 300 tokens of ten experts each use 440 of 512; the 64 most used get 45 % of the choices, and an
#: LRU cache of 18, 36, 54 or 73 % of the experts hits 35, 60, 75 or 83 % of the time.
POPULARITY = 0.45
_ROWS = 8192  # rows drawn at a time; a multiple of the tile's 16
_CONSTANT = 3.0  # squared norm of the constant's dimensions relative to the embedding's other dimensions
_OUT = 0.5  # magnitude of outputs relative to inputs, for maps whose outputs are added to the hidden states
_OUT_SKEWED = 0.15  # smaller, so that the constant keeps its share through many layers
_GAINS = (("router.weight", 2.0), ("head.weight", 2.5))
_RMS = {"q4": 58.5, "q8": 73.61}  # of uniform codes; for q4 multiplied by the steps


def synthesize(
    raw_config: Mapping[str, Any],
    out: str | Path,
    *,
    num_layers: int | None = None,
    format: str = "q4",
    seed: int = 0,
    skew: bool = False,
    progress: Callable[[int, int], None] | None = None,
    restart: bool = False,
) -> PackingReport:
    """Write a random model.

    Args:
        raw_config: the config of the real model.
        out: the packed file to create.
        num_layers: only its first layers; None: all.
        format: a built-in recipe's name, or a recipe file.
        seed: the same seed gives the same bytes.
        skew: make some experts more popular than others; see above.
        progress: called with (weights done, weights in total).
        restart: start over if there is a partial file of another model.

    Raises:
        UsageError: more layers than the model has, or an unknown recipe.
        CheckpointError: the file exists or cannot be written, or the config is invalid.
    """
    started = time.monotonic()
    raw = first_layers(raw_config, num_layers)
    config = ModelConfig.from_dict(raw)
    blobs = tensor_blobs(config, config.num_mtp_layers or 0, QuantRecipe.find(format))
    source = f"synthetic, seed {seed}, {'skewed' if skew else 'uniform'} routing"
    with PackedWriter(
        out,
        raw,
        {},
        blobs,
        metadata={"godwit": godwit.__version__, "recipe": format, "source": source},
        identity=source,
        restart=restart,
    ) as writer:
        missing = writer.missing()
        counter = _WeightCounter(blobs, missing, progress)
        for name in missing:
            parts = _Maker(config, name, seed, skew).parts(blobs[name])
            writer.write(name, counter.counted(parts, blobs[name]))
        writer.finish()
        return PackingReport(
            writer.path,
            writer.nbytes,
            blobs,
            time.monotonic() - started,
            len(blobs) - len(missing),
        )


def first_layers(raw_config: Mapping[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The config of the first ``num_layers`` layers.

    Raises:
        UsageError: the model has fewer.
    """
    whole = ModelConfig.from_dict(raw_config)
    if num_layers is not None and not 1 <= num_layers <= len(whole.layers):
        raise UsageError(f"--layers {num_layers}: give a number from 1 to {len(whole.layers)}")
    raw = {key: value for key, value in raw_config.items() if key != "quantization_config"}
    if num_layers is None:
        return raw
    nested = isinstance(raw.get("text_config"), Mapping)
    text = dict(raw["text_config"]) if nested else raw
    text["num_hidden_layers"] = num_layers
    if isinstance(text.get("layer_types"), list):
        text["layer_types"] = text["layer_types"][:num_layers]
    if all(layer.mixer.part != "attention" for layer in whole.layers[:num_layers]):
        # The MTP module copies an attention layer.
        text |= {name: 0 for name in ("mtp_num_hidden_layers", "num_nextn_predict_layers") if text.get(name)}
    return {**raw, "text_config": text} if nested else text


class _WeightCounter:
    """Reports progress in weights while bytes pass through."""

    def __init__(
        self, blobs: Mapping[str, TensorBlob], missing: list[str], progress: Callable[[int, int], None] | None
    ) -> None:
        self.total = sum(blob.num_weights for blob in blobs.values())
        self.done = self.total - sum(blobs[name].num_weights for name in missing)
        self.progress = progress

    def counted(self, parts: Iterator[Tensor], blob: TensorBlob) -> Iterator[Tensor]:
        sent = 0
        for part in parts:
            yield part
            sent += part.numel()
            if self.progress is not None:
                self.progress(self.done + blob.num_weights * sent // blob.nbytes, self.total)
        self.done += blob.num_weights


class _Maker:
    """Draws one tensor, which depends only on the seed and its name."""

    def __init__(self, config: ModelConfig, name: str, seed: int, skew: bool) -> None:
        self.config, self.name = config, name
        # The constant needs its own dimensions, and an MTP module would not pass it on.
        self.skew = skew and config.hidden_size >= 4 * GROUP and not name.startswith("mtp.")
        self.out = _OUT_SKEWED if self.skew else _OUT
        self.random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))

    def parts(self, blob: TensorBlob) -> Iterator[Tensor]:
        """The uint8 tensors that make up a blob."""
        if isinstance(blob, Plain):
            yield self._plain(blob).float().contiguous().view(-1).view(torch.uint8)
        elif isinstance(blob, Matrix):
            yield from self._matrix(blob)
        else:
            yield from self._experts(blob)

    def _plain(self, blob: Plain) -> Tensor:
        last = self.name.rpartition(".")[2]
        normal = torch.from_numpy(self.random.standard_normal(blob.shape, dtype=np.float32))
        if last == "conv_weight":
            return normal / math.sqrt(blob.shape[1])
        if last == "A_log":  # states decay within a few to a few thousand tokens
            return torch.from_numpy(self.random.uniform(math.log(1e-3), 0.0, blob.shape))
        if last == "bias":
            return torch.zeros(blob.shape)
        if self.name.endswith("shared_gate.weight"):
            return normal / math.sqrt(blob.shape[1])
        zero_centered = self.config.family.norm == "zero_centered" and last == "weight"
        return 0.05 * normal + (0.0 if zero_centered else 1.0)

    def _matrix(self, blob: Matrix) -> Iterator[Tensor]:
        rows, cols = blob.shape
        adds = self.name.endswith((".out_proj.weight", ".w2.weight"))
        gain = next((gain for end, gain in _GAINS if self.name.endswith(end)), self.out if adds else 1.0)
        if self.name == "embedding.weight":
            gain = 2.5 if self.config.tie_embeddings else math.sqrt(cols)
        if self.skew and self.name.endswith("router.weight"):
            yield self._biased(blob, gain)
            return
        reads = not adds and self.name != "embedding.weight" and cols == self.config.hidden_size
        for begin in range(0, rows, _ROWS):
            data = self._random(blob.format, min(_ROWS, rows - begin), cols, gain, reads=reads)
            view = _View(data, blob.format, cols)
            if self.skew and self.name == "embedding.weight":
                view.fill_first_group(gain / math.sqrt(cols) * math.sqrt(_CONSTANT * cols / GROUP))
            elif self.skew and reads:
                view.clear_first_group()
            elif self.skew and adds and begin == 0:
                view.clear_first_rows()
            yield data

    def _experts(self, blob: ExpertStack) -> Iterator[Tensor]:
        shape13, shape2 = (2 * blob.intermediate, blob.hidden), (blob.hidden, blob.intermediate)
        for _ in range(blob.num_experts):
            w13 = self._random(blob.format13, *shape13, 1.0, reads=True)
            w2 = self._random(blob.format2, *shape2, self.out)
            if self.skew:
                _View(w13, blob.format13, blob.hidden).clear_first_group()
                _View(w2, blob.format2, blob.intermediate).clear_first_rows()
            yield join_expert(QuantTensor(blob.format13, shape13, w13), QuantTensor(blob.format2, shape2, w2))

    def _random(self, format: str, rows: int, cols: int, gain: float, *, reads: bool = False) -> Tensor:
        """Packed random weights whose outputs have ``gain`` times the magnitude of their inputs.

        ``reads``: the input is the output of a norm, which (with skew) includes the constant.
        """
        size = gain / math.sqrt(cols) * (math.sqrt(1 + _CONSTANT) if reads and self.skew else 1.0)
        if format == "bf16" or rows % TILE_ROWS or cols % (2 * GROUP):
            weights = self.random.standard_normal((rows, cols), dtype=np.float32)
            return quantize(torch.from_numpy(weights) * size, format).data
        words = self.random.integers(
            0, 2**64 - 1, weight_bytes(format, rows, cols) // 8, np.uint64, endpoint=True
        )
        data = torch.from_numpy(words.view(np.uint8))
        view = _View(data, format, cols)
        if format == "q8":
            view.codes[view.codes == 0] = 128
        else:  # zero points on both sides of the middle, so that the mean is zero
            shape = tuple(view.steps.shape)
            steps = self.random.integers(10, 16, shape) + 16 * self.random.integers(7, 9, shape)
            view.steps.copy_(torch.from_numpy(steps))
            view.padding.zero_()
        shape = tuple(view.scales.shape)
        scales = self.random.uniform(0.8, 1.2, shape) * self.random.choice((-1.0, 1.0), shape)
        view.scales.copy_(torch.from_numpy(scales * size / _RMS[format]))
        return data

    def _biased(self, blob: Matrix, gain: float) -> Tensor:
        rows, cols = blob.shape
        weights = self.random.standard_normal((rows, cols), dtype=np.float32)
        weights *= gain / math.sqrt(cols) * math.sqrt(1 + _CONSTANT)
        # The approximate value of the constant after a norm.
        constant = math.sqrt(_CONSTANT / (1 + _CONSTANT) * cols / GROUP)
        popularity = self.random.standard_normal((rows, 1)) * POPULARITY * gain
        weights[:, :GROUP] = popularity / (GROUP * constant)
        return quantize(torch.from_numpy(weights), blob.format).data


class _View:
    """Writable views of packed bytes.

    Codes are ``[tiles, groups, bytes]``, steps (q4) ``[tiles, groups, 16]``, and scales ``[tiles, n, 16]``
    with n groups (q8) or spans (q4).
    """

    def __init__(self, data: Tensor, format: str, cols: int) -> None:
        size, code_bytes = groups(cols), CODE_BYTES[format]
        tiles = data.view(-1, weight_bytes(format, TILE_ROWS, cols))
        num_steps, num_scales = {"q4": (size, spans(cols)), "q8": (0, size), "bf16": (0, 0)}[format]
        sizes = [size * code_bytes, num_steps * TILE_ROWS, num_scales * TILE_ROWS * 2]
        ends = [0, sizes[0], sizes[0] + sizes[1], sum(sizes), tiles.shape[1]]
        codes, steps, scales, self.padding = (tiles[:, a:b] for a, b in pairwise(ends))
        self.format = format
        self.codes = codes.view(-1, size, code_bytes)
        self.steps = steps.view(len(tiles), num_steps, TILE_ROWS)
        self.scales = scales.view(torch.float16).view(len(tiles), num_scales, TILE_ROWS)

    def clear_first_group(self) -> None:
        """Set columns 0 to 31 to zero."""
        if self.format == "bf16":
            self.codes[:, 0] = 0
        elif self.format == "q8":
            self.scales[:, 0] = 0
        else:
            self.steps[:, 0] = 0x80

    def clear_first_rows(self) -> None:
        """Set rows 0 to 31 to zero."""
        if self.format == "bf16":
            self.codes[:2] = 0
        else:
            self.scales[:2] = 0

    def fill_first_group(self, value: float) -> None:
        """Set columns 0 to 31 to ``value``."""
        if self.format == "bf16":
            self.codes[:, 0].view(torch.bfloat16)[:] = value
        elif self.format == "q8":  # the code of 4
            self.codes[:, 0] = 132
            self.scales[:, 0] = value / 4
        else:  # (15 - 8) x 15; the other groups of the span keep about their magnitude
            steps, scales = self.steps[:, 1:SPAN], self.scales[:, :1]
            scale = torch.full_like(scales, value / 105)
            sizes = ((steps & 15) * scales.float().abs() / scale.float()).round().clamp(1, 15)
            steps.copy_((steps & 0xF0) + sizes.to(torch.uint8))
            scales.copy_(scale)
            self.codes[:, 0] = 0xFF
            self.steps[:, 0] = 0x8F
