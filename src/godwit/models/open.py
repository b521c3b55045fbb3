"""Open a checkpoint from a path, and load a model from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from godwit import _native
from godwit.checkpoint import Checkpoint, open_checkpoint
from godwit.checkpoint.packed import PackedFile, is_packed
from godwit.checkpoint.protocol import main_dtype, num_parameters
from godwit.errors import UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.models.native import Rounding, count_parameters, formats, load_packed
from godwit.models.packing import Packer, Progress, pack_checkpoint, stored_recipe
from godwit.models.recipe import QuantRecipe

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizeName = Literal["q8", "q4", "bf16"]


def open_source(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a model of any supported format: a packed file, a GGUF file, a directory, or a Hub repository.

    Args:
        source: a path, or what :func:`godwit.checkpoint.open_checkpoint` accepts.
        revision: a branch, tag or commit of a repository.

    Raises:
        CheckpointError: missing, damaged or incomplete.
        UnsupportedModelError: quantised in an unsupported format.
        OfflineError: the Hub cannot be reached and the cache lacks the repository.
    """
    if is_packed(source):
        return PackedFile.open(source)
    return open_checkpoint(source, revision=revision)


def load_weights(
    source: Checkpoint,
    dtype: DtypeName = "auto",
    quantize: QuantizeName | None = None,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    available: int | None = None,
) -> CausalLM:
    """Load the model on the native kernels, or on PyTorch if a dtype or this CPU requires it.

    Args:
        source: packed weights are mapped; others are packed while they are loaded, tensor by tensor.
        dtype: anything but "auto" selects PyTorch and this dtype.
        quantize: the recipe to pack with; None: as stored, see :func:`stored_recipe`.
        progress: called with (done, total), in weights or tensors.
        notice: called with a line for each kind of stored weights that packing may have changed.
        available: free memory in bytes, which decides the dtype on PyTorch; None: unknown.

    Raises:
        UsageError: options that exclude each other.
        CheckpointError: the weights are damaged or do not match the config.
    """
    if (quantize or isinstance(source, PackedFile)) and dtype != "auto":
        raise UsageError("--dtype does not apply to packed weights; omit it")
    if isinstance(source, PackedFile):
        if quantize:
            raise UsageError(f"{source.path} is already packed; omit --quantize")
        return load_packed(source)
    if quantize or (dtype == "auto" and suits_native(source)):
        recipe = QuantRecipe.find(quantize) if quantize else stored_recipe(source)
        model, packer = pack_checkpoint(source, recipe, progress=progress)
        if not quantize and notice is not None:
            for line in changes(packer):
                notice(line)
        return model
    return load_model(source, dtype=resolve_dtype(dtype, source, available), progress=progress)


def suits_native(checkpoint: Checkpoint) -> bool:
    """Whether the weights can be packed as bf16 and this CPU has vector kernels."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return main_dtype(checkpoint) in known and _native.instruction_set() != "scalar"


def resolve_dtype(name: DtypeName, checkpoint: Checkpoint, available: int | None) -> torch.dtype:
    """The dtype on PyTorch; auto is float32, or the stored dtype if float32 would not fit.

    PyTorch multiplies one token's states by a bfloat16 matrix more slowly than by a float32 one, even on
    processors with bfloat16 units.

    Args:
        name: the requested dtype.
        checkpoint: the weights.
        available: free memory in bytes, of which float32 weights may take half; None: unknown.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    fits = available is None or 4 * num_parameters(checkpoint) < available // 2
    return torch.float32 if fits else main_dtype(checkpoint)


def changes(packer: Packer) -> list[str]:
    """The loss from packing a checkpoint as stored, one line for each kind of change."""
    lines = [rounding_line(packer.rounding)] if packer.rounding.matrices else []
    if packer.exact:
        lines.append(f"{_amount(packer.exact)} are packed as q8, which holds every one of them exactly")
    if packer.decoded:
        size = sum(packer.decoded.values()) * 8.5 / 8e9
        lines.append(
            f"{_amount(packer.decoded)} are packed as q8, {size:,.2f} GB: close to the file's values but not "
            "bit for bit; --quantize bf16 is closer in twice the memory, --dtype float32 keeps every bit"
        )
    return lines


def _amount(weights: Mapping[str, int]) -> str:
    return f"{', '.join(sorted(weights))} weights ({sum(weights.values()) / 1e6:,.1f}M)"


def rounding_line(rounding: Rounding) -> str:
    """The loss from packing as bf16, in one line."""
    dtypes = "/".join(sorted(rounding.dtypes))
    if rounding.exact == rounding.matrices:
        return f"{dtypes} weights are packed as bf16, which holds every one of them exactly"
    return (
        f"{dtypes} weights are packed as bf16: {rounding.exact:,} of {rounding.matrices:,} matrices exactly, "
        f"the others rounded (by {rounding.error:.2%} rms); --dtype float32 keeps every bit, far slower"
    )


def described(model: CausalLM) -> str:
    """A short description of a loaded model: size, weight formats and kernels."""
    size = f"{count_parameters(model) / 1e6:.1f}M parameters"
    if model.stack is None:
        return f"{size}, {str(model.dtype).removeprefix('torch.')} on PyTorch"
    return f"{size}, {'/'.join(formats(model))} on {_native.instruction_set()} kernels"
