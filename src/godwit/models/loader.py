"""Loading a checkpoint into a model and saving it, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from godwit.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from godwit.checkpoint.companions import read_companions
from godwit.checkpoint.spelling import EMBEDDING, HEAD, canonical_name
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.causal_lm import CausalLM
from godwit.models.inventory import count_mtp, parameters
from godwit.models.names import Alternatives, Entry, Placement, name_map

_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_LISTED = 20  # names shown for each kind of problem


@dataclass
class _Complaints:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, path: Path) -> None:
        """Raises CheckpointError with a sentence for each kind and up to a limit of names."""
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
        as_stored: keep each parameter in the dtype of its own tensors, so that saving it again loses
            nothing. PyTorch's operations may refuse to run such a model, as they want one dtype.
        device: where the parameters go.
        progress: called with (tensors done, total tensors).

    Peak memory is the model and one tensor.

    Raises:
        CheckpointError: tensors missing, unexpected or of the wrong shape, all listed at once.
        UnsupportedModelError: a model type or quantisation that is not supported.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    pieces, actual, num_mtp = plan(checkpoint)
    if dtype is None:
        dtype = checkpoint.info(actual[pieces[0].source]).dtype  # of the embedding, which comes first
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
    """Module.to_empty without torch.empty_like, which imports sympy for tensors on "meta"."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            real = torch.empty(param.shape, dtype=param.dtype, device=device)
            setattr(module, name, nn.Parameter(real, requires_grad=False))


def _widen(model: CausalLM, pieces: Sequence[Placement], stored: Mapping[str, torch.dtype]) -> None:
    """Give each parameter (on "meta") the dtype that holds all its tensors exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        own = stored[piece.source]
        dtypes[piece.target] = torch.promote_types(dtypes.get(piece.target, own), own)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def plan(checkpoint: Checkpoint) -> tuple[list[Placement], dict[str, str], int]:
    """The placements to read, canonical to actual names, and the number of MTP layers found.

    Raises:
        CheckpointError: the names or shapes do not fit the config.
    """
    complaints = _Complaints()
    if checkpoint.native_names:
        placements, actual, num_mtp = _plan_native(checkpoint, complaints)
    else:
        placements, actual, num_mtp = _plan_published(checkpoint, complaints)
    for placement in placements:
        if placement.source not in actual:
            complaints.missing.append(placement.source)
            continue
        shape = checkpoint.info(actual[placement.source]).shape
        if tuple(shape) != placement.shape:
            complaints.misshapen.append(
                f"{actual[placement.source]} is {list(shape)}, expected {list(placement.shape)}"
            )
    complaints.raise_if_any(checkpoint.path)
    return placements, actual, num_mtp


def _plan_native(
    checkpoint: Checkpoint, complaints: _Complaints
) -> tuple[list[Placement], dict[str, str], int]:
    """The plan if tensors and parameters have the same names and correspond one to one."""
    actual = {name: name for name in checkpoint.names()}
    num_mtp = count_mtp(actual)
    listed = parameters(checkpoint.config, num_mtp)
    complaints.unexpected += sorted(actual.keys() - {parameter.name for parameter in listed})
    return [Placement(one.name, one.shape, one.name) for one in listed], actual, num_mtp


def _plan_published(
    checkpoint: Checkpoint, complaints: _Complaints
) -> tuple[list[Placement], dict[str, str], int]:
    """The plan if tensors have published names."""
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
    """Every tensor under its published name and in its published layout."""
    parameters = dict(model.named_parameters())
    num_mtp = len(model.mtp.layers) if model.mtp is not None else 0
    for entry in name_map(model.config, num_mtp):
        for piece in entry.options[0] if isinstance(entry, Alternatives) else (entry,):
            yield piece.source, _part(parameters[piece.target], piece).read()


def _text_config(config: ModelConfig) -> dict[str, Any]:
    """The raw config to save; for a multimodal wrapper its text part, the only part that is loaded."""
    raw = dict(config.raw)
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        raw = {**text, "model_type": config.model_type, "tie_word_embeddings": config.tie_embeddings}
        if not config.model_type.endswith("_text"):
            raw["model_type"] += "_text"
    return {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype")}


def save_model(
    model: CausalLM,
    path: str | Path,
    *,
    companions: str | Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Atomically write a directory that ``transformers`` can load.

    Args:
        model: any supported family.
        path: the new directory.
        companions: directory from which tokenizer, template and generation files are copied.
        extra_files: more files by name.
        overwrite: replace an existing directory.
    """
    files = {} if companions is None else read_companions(Path(companions))
    files.update(extra_files or {})
    raw = _text_config(model.config)
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    save_checkpoint(path, export_tensors(model), raw, extra_files=files, overwrite=overwrite)
