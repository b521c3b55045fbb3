"""Pack a checkpoint into a file, tensor by tensor; interrupted runs can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import godwit
from godwit.checkpoint import Checkpoint, open_checkpoint
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, TensorBlob
from godwit.checkpoint.packed_writer import PackedWriter
from godwit.errors import UsageError
from godwit.models.open import changes
from godwit.models.packing import Packer, Progress
from godwit.models.recipe import QuantRecipe

_SAMPLES = 256  # tensors that identify a source
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class PackingReport:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its size.
        blobs: its tensors by name.
        seconds: duration of this run.
        resumed: number of tensors written by an earlier run.
        notices: what packing changed in this run, a line for each kind of change.
    """

    path: Path
    nbytes: int
    blobs: Mapping[str, TensorBlob]
    seconds: float
    resumed: int
    notices: Sequence[str] = ()


def quantize_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: QuantRecipe,
    *,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> PackingReport:
    """Pack a checkpoint into the file ``out``.

    Args:
        source: what :func:`godwit.checkpoint.open_checkpoint` accepts, or an open checkpoint.
        out: the file to create. A killed run leaves ``out.partial``, which the same call resumes.
        recipe: the formats of weights.
        importance: matrix name -> the importance of each column, ``[cols]``; for experts also
            ``[num_experts, cols]``, with the names ``...experts.w13`` and ``...experts.w2``.
        progress: called with (weights done, total weights).
        restart: start over if the partial file is of another model or recipe.

    Needs memory for one stored matrix or a few experts, in addition to the file's pages.

    Raises:
        CheckpointError: the source does not match its config or has values that are not finite; the file
            exists or cannot be written.
        UsageError: the recipe or the importances do not match the model.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    importance = importance or {}
    packer = Packer(checkpoint, recipe, importance=importance, progress=progress)
    _check_importance(importance, packer.blobs)
    with PackedWriter(
        out,
        _plain_config(checkpoint),
        checkpoint.files(),
        packer.blobs,
        metadata={"godwit": godwit.__version__, "recipe": Path(recipe.name).name},
        identity=_identity(checkpoint, importance),
        restart=restart,
    ) as writer:
        missing = writer.missing()
        packer.skip(packer.blobs.keys() - set(missing))
        with packer:
            for name in missing:
                writer.write(name, packer.parts(name))
        writer.finish()
        return PackingReport(
            writer.path,
            writer.nbytes,
            packer.blobs,
            time.monotonic() - started,
            len(packer.blobs) - len(missing),
            changes(packer),
        )


def _plain_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The config without the checkpoint's quantisation."""
    return {key: value for key, value in checkpoint.config.raw.items() if key != "quantization_config"}


def _check_importance(importance: Mapping[str, Tensor], blobs: Mapping[str, TensorBlob]) -> None:
    wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, blob in blobs.items():
        if isinstance(blob, Matrix):
            wanted[name] = ((blob.shape[1],),)
        elif isinstance(blob, ExpertStack):
            for part, cols in (("w13", blob.hidden), ("w2", blob.intermediate)):
                wanted[f"{name}.{part}"] = ((cols,), (blob.num_experts, cols))
    for name, values in importance.items():
        if name not in wanted:
            raise UsageError(
                f"the importances are for {name!r:.100}, which is not a matrix of this model; run 'godwit "
                "calibrate' on this model"
            )
        if tuple(values.shape) not in wanted[name]:
            shapes = " or ".join(str(list(shape)) for shape in wanted[name])
            raise UsageError(
                f"the importance of {name} is {list(values.shape)} but should be {shapes}; run 'godwit "
                "calibrate' on this model"
            )


def _identity(checkpoint: Checkpoint, importance: Mapping[str, Tensor]) -> str:
    """A digest of a source's config, tensor names and shapes, and the first bytes of some tensors."""
    digest = hashlib.sha256(json.dumps(dict(checkpoint.raw_config), sort_keys=True).encode())
    names = sorted(checkpoint.names())
    for name in names:
        info = checkpoint.info(name)
        digest.update(f"{name} {info.shape} {info.stored}\n".encode())
    for name in names[:: -(-len(names) // _SAMPLES) or 1]:
        shape, dtype = checkpoint.info(name).shape, checkpoint.info(name).dtype
        rows = -(-_SAMPLE_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
        values = checkpoint.tensor(name, slice(0, rows) if shape else None).reshape(-1)
        digest.update(bytes(values[: _SAMPLE_BYTES // values.itemsize].view(torch.uint8).numpy()))
        checkpoint.release(name)
    for name, values in sorted(importance.items()):
        digest.update(f"{name}\n".encode() + bytes(values.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
