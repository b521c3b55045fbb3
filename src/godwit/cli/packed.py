"""Contents of a packed file by part and by format, for reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from godwit.checkpoint import Checkpoint
from godwit.checkpoint.packed import PackedFile
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.measure import planner
from godwit.measure.planner import Sizes
from godwit.models.inventory import count_mtp, parameters
from godwit.models.loader import plan
from godwit.models.recipe import QuantRecipe, tensor_blobs


@dataclass(frozen=True)
class PackedSizes(Sizes):
    """Sizes of a packed model: the bytes of the file instead of those of bfloat16."""

    stored: int
    read: float

    @staticmethod
    def of(sizes: Sizes, parts: Mapping[str, Mapping[str, Any]]) -> PackedSizes:
        read = 0.0
        for name, part in sizes.parts.items():
            own = parts.get(name) or parts.get("embedding")  # a tied head shares the embedding's bytes
            read += own["bytes"] * part.active / own["weights"] if own and part.active else 0
        stored = sum(part["bytes"] for part in parts.values())
        return PackedSizes(**vars(sizes), stored=stored, read=read)

    @property
    def weights(self) -> int:
        return self.stored

    def read_per_token(self, context: int) -> int:
        return super().read_per_token(context) - self.active * planner.DTYPE.itemsize + round(self.read)


def sizes_packed(sizes: Sizes, config: ModelConfig, num_mtp: int, recipe: str) -> PackedSizes:
    """Sizes of a model if packed with a recipe.

    Raises:
        CheckpointError: the config describes tensors too large to address.
    """
    blobs = tensor_blobs(config, num_mtp, QuantRecipe.find(recipe))
    return PackedSizes.of(sizes, bytes_of_parts(blobs, config))


def bytes_of_parts(blobs: Mapping[str, TensorBlob], config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Weights, bytes and bits per weight (including scales and padding) of each part, largest first."""
    found: dict[str, dict[str, Any]] = {}
    parts = {p.packed_name: p.part for p in parameters(config, count_mtp(blobs))}
    for name, blob in blobs.items():
        part = found.setdefault(parts[name], {"weights": 0, "bytes": 0})
        part["weights"] += blob.num_weights
        part["bytes"] += blob.nbytes
    return _largest_first(found)


def stored_parts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Weights, bytes, bits a weight and stored types of each part of a checkpoint, the largest first.

    Raises:
        CheckpointError: its tensors do not fit its config.
    """
    found: dict[str, dict[str, Any]] = {}
    placements, actual, num_mtp = plan(checkpoint)
    parts = {p.name: p.part for p in parameters(checkpoint.config, num_mtp)}
    for source, part in {one.source: parts[one.target] for one in placements}.items():
        info = checkpoint.info(actual[source])
        own = found.setdefault(part, {"weights": 0, "bytes": 0, "types": Counter[str]()})
        own["weights"] += math.prod(info.shape)
        own["bytes"] += info.nbytes
        own["types"][info.stored] += info.nbytes
    return _largest_first(found)


def _largest_first(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for part in parts.values():
        part["bits"] = 8 * part["bytes"] / part["weights"]
    return dict(sorted(parts.items(), key=lambda item: -int(item[1]["bytes"])))


def weights_of(blobs: Mapping[str, TensorBlob]) -> dict[str, Any]:
    """The file's contents by format."""
    kinds: dict[str, dict[str, int]] = {}
    for blob in blobs.values():
        kind = kinds.setdefault(_format_of(blob), {"tensors": 0, "parameters": 0, "bytes": 0})
        for field, more in (("tensors", 1), ("parameters", blob.num_weights), ("bytes", blob.nbytes)):
            kind[field] += more
    return {
        "tensors": len(blobs),
        "beside_the_text_model": 0,
        "bytes": sum(blob.nbytes for blob in blobs.values()),
        "dtypes": dict(sorted(kinds.items())),
        "problem": None,
    }


def checked_blobs(packed: PackedFile, num_mtp: int) -> dict[str, TensorBlob]:
    """The tensors of a packed file, checked against its config.

    Raises:
        CheckpointError: they do not match.
    """
    found = packed.blobs
    wanted = tensor_blobs(packed.config, num_mtp, QuantRecipe.find("q4"))
    odd = {(name, _sizes_in(blob)) for name, blob in found.items()}
    odd ^= {(name, _sizes_in(blob)) for name, blob in wanted.items()}
    if odd:
        names = ", ".join(sorted({name for name, _ in odd})[:10])
        raise CheckpointError(
            f"{packed.path} does not match its config (missing, unexpected or misshapen: {names}); pack the "
            "model again"
        )
    return found


def _format_of(blob: TensorBlob) -> str:
    if isinstance(blob, Plain):
        return blob.dtype
    if isinstance(blob, Matrix):
        return blob.format
    return blob.format13 if blob.format13 == blob.format2 else f"{blob.format13}/{blob.format2}"


def _sizes_in(blob: TensorBlob) -> tuple[str | int, ...]:
    if isinstance(blob, ExpertStack):
        return "experts", blob.num_experts, blob.hidden, blob.intermediate
    return "plain" if isinstance(blob, Plain) else "matrix", *blob.shape
