"""From a checkpoint to a model and back, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from godwit.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from godwit.checkpoint.packed_layout import MAX_FILE_BYTES
from godwit.checkpoint.spelling import EMBEDDING, HEAD, canonical_name
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.causal_lm import CausalLM
from godwit.models.names import Alternatives, Entry, Placement, name_map
from godwit.safe_files import read_bounded

_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_LISTED = 20  # names shown of each kind of complaint

#: Files that travel with a checkpoint besides its tensors and config.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


@dataclass
class _Complaints:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, path: Path) -> None:
        """Raises: CheckpointError: one sentence a kind, every name up to a limit."""
        parts = [
            f"{what} tensors ({len(names)}): {', '.join(names[:_LISTED])}{', ...' if names[_LISTED:] else ''}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("misshapen", self.misshapen),
            )
            if names
        ]
        if parts:
            raise CheckpointError(f"{path} does not fit its config.json; {'; '.join(parts)}")


def load_model(
    source: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a checkpoint directory or Hub id.

    Args:
        source: what :func:`godwit.checkpoint.open_checkpoint` accepts, or an open checkpoint.
        dtype: of the parameters; None keeps the dtype of the embedding on disk.
        as_stored: every parameter in the dtype of its own tensors, which loses nothing; for packing, since
            PyTorch's operations want one dtype.
        device: where the parameters go.
        progress: called with (tensors done, tensors in all).

    Peak memory is the model and one tensor.

    Raises:
        CheckpointError: tensors missing, unexpected or of the wrong shape, all listed at once.
        UnsupportedModelError: a model type or quantisation that is not supported.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    pieces, actual, num_mtp = plan(checkpoint)
    if dtype is None:
        dtype = checkpoint.info(actual[EMBEDDING]).dtype
    with torch.device("meta"):
        model = CausalLM(checkpoint.config, num_mtp).to(dtype)
    if as_stored:
        _widen(model, pieces, {piece.source: checkpoint.info(actual[piece.source]).dtype for piece in pieces})
    _allocate(model, device)
    targets: dict[str, nn.Parameter] = dict(model.named_parameters())
    for done, piece in enumerate(pieces, 1):
        name = actual[piece.source]
        _part(targets[piece.target], piece).copy_from(checkpoint.tensor(name))
        checkpoint.release(name)
        if progress is not None:
            progress(done, len(pieces))
    return model.eval()


def _allocate(model: nn.Module, device: torch.device | str) -> None:
    """What Module.to_empty does, without torch.empty_like, which imports sympy for tensors on "meta"."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            real = torch.empty(param.shape, dtype=param.dtype, device=device)
            setattr(module, name, nn.Parameter(real, requires_grad=False))


def _widen(model: CausalLM, pieces: Sequence[Placement], stored: Mapping[str, torch.dtype]) -> None:
    """Give each parameter of a model without data the dtype that holds all its tensors exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        own = stored[piece.source]
        dtypes[piece.target] = torch.promote_types(dtypes.get(piece.target, own), own)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def plan(checkpoint: Checkpoint) -> tuple[list[Placement], dict[str, str], int]:
    """The pieces to read, canonical to actual names, and the number of MTP layers found.

    Raises:
        CheckpointError: the names or shapes do not fit the config.
    """
    complaints = _Complaints()
    actual: dict[str, str] = {}
    for name in checkpoint.names():
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in actual:
            complaints.unexpected.append(f"{name} (a second spelling of {actual[canonical]})")
        actual[canonical] = name
    if checkpoint.config.tie_embeddings and HEAD in actual:
        actual.setdefault(EMBEDDING, actual.pop(HEAD))
    num_mtp = max((int(m.group(1)) + 1 for m in map(_MTP_LAYER.match, actual) if m), default=0)
    pieces = [piece for entry in name_map(checkpoint.config, num_mtp) for piece in _choose(entry, actual)]
    wanted = {piece.source for piece in pieces}
    complaints.unexpected += [actual[name] for name in actual if name not in wanted]
    for piece in pieces:
        if piece.source not in actual:
            complaints.missing.append(piece.source)
            continue
        shape = checkpoint.info(actual[piece.source]).shape
        if tuple(shape) != piece.shape:
            complaints.misshapen.append(
                f"{actual[piece.source]} is {list(shape)}, expected {list(piece.shape)}"
            )
    complaints.raise_if_any(checkpoint.path)
    return pieces, actual, num_mtp


def _choose(entry: Entry, present: Mapping[str, str]) -> tuple[Placement, ...]:
    if isinstance(entry, Placement):
        return (entry,)
    for option in entry.options:
        if any(piece.source in present for piece in option):
            return option
    return entry.options[0]


@dataclass(frozen=True)
class _Part:
    parameter: Tensor
    piece: Placement

    def copy_from(self, tensor: Tensor) -> None:
        with torch.no_grad():
            index = self.piece.index
            if not index:
                self.parameter.copy_(tensor.view(self.parameter.shape))
                return
            if isinstance(index[0], Tensor):
                moved = tensor.to(self.parameter.device, self.parameter.dtype)
                self.parameter.index_copy_(0, index[0].to(self.parameter.device), moved)
                return
            self.parameter[index].copy_(tensor)

    def read(self) -> Tensor:
        part = self.parameter[self.piece.index] if self.piece.index else self.parameter
        return part.detach().reshape(self.piece.shape)


def _part(parameter: Tensor, piece: Placement) -> _Part:
    return _Part(parameter, piece)


def export_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, packed as published, experts apart."""
    parameters = dict(model.named_parameters())
    num_mtp = len(model.mtp.layers) if model.mtp is not None else 0
    for entry in name_map(model.config, num_mtp):
        options = entry.options[_saved_layout(model.config)] if isinstance(entry, Alternatives) else (entry,)
        for piece in options:
            yield piece.source, _part(parameters[piece.target], piece).read()


def _saved_layout(config: ModelConfig) -> int:
    """Qwen3.5 keeps its experts fused on disk, every other family apart."""
    return 1 if config.model_type.startswith("qwen3_5") else 0


def _text_config(config: ModelConfig) -> dict[str, Any]:
    """The raw config to save: a multimodal wrapper's text part, for no other part was loaded."""
    raw = dict(config.raw)
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        raw = {**text, "model_type": config.model_type, "tie_word_embeddings": config.tie_embeddings}
        if not config.model_type.endswith("_text"):
            raw["model_type"] += "_text"
    return {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype")}


def read_companions(directory: Path) -> dict[str, bytes]:
    """The :data:`COMPANIONS` that a directory has.

    Raises:
        CheckpointError: one is no regular file, is too large, leads out of the directory or cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in COMPANIONS:
        path = directory / name
        try:
            found[name] = read_bounded(path, MAX_FILE_BYTES, folder=directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return found


def save_model(
    model: CausalLM,
    path: str | Path,
    *,
    companions: str | Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that ``transformers`` loads, under a temporary name and then renamed.

    Args:
        model: any supported family.
        path: the new directory.
        companions: directory whose tokenizer, template and generation files are copied along.
        extra_files: more files by name.
        overwrite: replace an existing directory.
    """
    files = {} if companions is None else read_companions(Path(companions))
    files.update(extra_files or {})
    raw = _text_config(model.config)
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    save_checkpoint(path, export_tensors(model), raw, extra_files=files, overwrite=overwrite)
