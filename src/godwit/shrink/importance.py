"""The importance of each column of a matrix: the mean square of its input over a text.

The error of a weight is multiplied by the input of its column, so the mean squared error of an output weights
squared errors by these numbers. They are an argument of :func:`godwit.qtensor.quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from godwit.checkpoint.safetensors import SafetensorsFile, shown
from godwit.checkpoint.writer import save_tensors
from godwit.errors import CheckpointError, UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.layers import Experts, Linear, SwiGLU

WINDOW = 1024  # tokens read together, as an independent sequence
#: Largest file of importances; that of a model with 512 experts in 48 layers has 250 MB.
MAX_BYTES = 4 << 30
MAX_VALUE = 1e30  # so that sums stay finite
#: Weight of an expert's prior, in tokens: with more tokens than this, its own inputs outweigh it.
PRIOR = 32
#: Shared experts' gates are not packed, and the head is not called through its module.
_UNWATCHED = ("shared_gate", "head")


@dataclass(frozen=True)
class Importance:
    """The importances of a model's columns over a text.

    Attributes:
        values: matrix name -> ``[cols]``, for experts ``[num_experts, cols]``, float32, as
            :func:`godwit.shrink.quantize.quantize_checkpoint` takes them.
        tokens: number of tokens read.
        experts: number of experts in all layers.
        rare: experts that got fewer tokens than :data:`PRIOR`, so that the prior dominates.
    """

    values: Mapping[str, Tensor]
    tokens: int
    experts: int
    rare: int


@torch.no_grad()
def collect_importance(
    model: CausalLM,
    ids: Sequence[int],
    *,
    window: int = WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run ``model`` on a text and record the inputs of its matrices.

    Args:
        model: an unpacked model.
        ids: the text's tokens.
        window: tokens read together.
        progress: called with (tokens done, total tokens).

    Raises:
        UsageError: packed weights, or fewer than two tokens.
        CheckpointError: the model's hidden states are not finite.
    """
    if model.stack is not None:
        raise UsageError("a packed model cannot be calibrated; use the original checkpoint")
    if len(ids) < 2:
        raise UsageError("the text to calibrate with needs at least two tokens")
    with _Watch(model) as watch:
        for begin in range(0, len(ids), window):
            text = torch.tensor(ids[begin : begin + window], dtype=torch.long, device=model.device)
            _read(model, text, watch)
            if progress is not None:
                progress(begin + len(text), len(ids))
    counts = [sums.count for sums in watch.experts.values()]
    return Importance(
        values=watch.values(),
        tokens=len(ids),
        experts=sum(len(count) for count in counts),
        rare=sum(int((count < PRIOR).sum()) for count in counts),
    )


def write_importance(path: Path, found: Importance, metadata: Mapping[str, str]) -> None:
    """Write importances to a safetensors file; ``metadata`` is informative only.

    Raises:
        CheckpointError: the file exists or cannot be written.
    """
    save_tensors(path, found.values, {"tokens": str(found.tokens), **metadata})


def read_importance(path: Path) -> dict[str, Tensor]:
    """Read importances from a safetensors file; whether they match a model is checked when it is packed.

    Raises:
        CheckpointError: the file is missing, damaged, too large or in another format, or a tensor is not one
            finite non-negative number per column.
    """
    file = SafetensorsFile(path)
    size = sum(entry.nbytes for entry in file.entries.values())
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{path}: has {size / 2**30:,.1f} GiB, too much for a file of importances; give another file"
        )
    return {name: _checked(file.tensor(name), name, path) for name in file.entries}


def _checked(values: Tensor, name: str, path: Path) -> Tensor:
    if not values.is_floating_point() or values.dim() not in (1, 2) or not values.numel():
        raise CheckpointError(
            f"{path}: {shown(name)} is {values.dtype} {list(values.shape)} but should be [cols] or "
            "[num_experts, cols] of a floating-point type; run 'godwit calibrate' again"
        )
    found = values.float()
    if not bool(((found >= 0) & (found <= MAX_VALUE)).all()):
        raise CheckpointError(
            f"{path}: {shown(name)} has values that are negative, NaN or larger than {MAX_VALUE:g}; "
            "run 'godwit calibrate' again"
        )
    return values


def _read(model: CausalLM, text: Tensor, watch: _Watch) -> None:
    hidden = model(ForwardBatch.packed(text, [len(text)]))
    if model.head is not None:  # a tied head is the embedding, whose rows are also looked up
        watch.dense("head.weight", hidden)
    if model.mtp is not None and len(text) > 1:
        model.forward_mtp(hidden[:-1], text[1:], ForwardBatch.packed(text[1:], [len(text) - 1]))


class _Watch:
    """Hooks that sum squares while a model runs, until the end of the ``with`` statement."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.sums: dict[str, _Sums] = {}
        self.experts: dict[str, _ExpertSums] = {}

    def __enter__(self) -> _Watch:
        self.handles = list(self._hooks())
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def values(self) -> dict[str, Tensor]:
        found = {name: sums.mean() for name, sums in self.sums.items()}
        for name, stack in self.experts.items():
            found[f"{name}.w13"], found[f"{name}.w2"] = stack.means()
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"the inputs of {name} are not finite, so weights are damaged; fetch the checkpoint again"
                )
        return found

    def dense(self, name: str, x: Tensor) -> None:
        self.sums.setdefault(name, _Sums()).add(x)

    def _hooks(self) -> Iterable[torch.utils.hooks.RemovableHandle]:
        within = {
            child
            for module in self.model.modules()
            if isinstance(module, SwiGLU)
            for child in module.children()
        }
        for name, module in self.model.named_modules():
            if isinstance(module, Experts):
                shape = tuple(module.w13.shape)
                self.experts[name] = _ExpertSums(shape[0], shape[2], shape[1] // 2)
                yield module.register_forward_pre_hook(partial(self._of_experts, name))
            elif isinstance(module, SwiGLU):
                yield module.register_forward_pre_hook(partial(self._of_swiglu, name))
            elif isinstance(module, Linear) and module not in within and not name.endswith(_UNWATCHED):
                yield module.register_forward_pre_hook(partial(self._of_linear, name))

    def _of_linear(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.dense(f"{name}.weight", args[0])

    def _of_swiglu(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, SwiGLU):
            self.dense(f"{name}.w13.weight", args[0])
            self.dense(f"{name}.w2.weight", _between(args[0], module.w13.weight, module.w13.bias))

    def _of_experts(self, name: str, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        if isinstance(module, Experts):
            x, _, ids = args
            for index in sorted(set(ids.flatten().tolist())):
                rows = x[(ids == index).any(-1)]
                self.experts[name].add(index, rows, _between(rows, module.w13[index], None))


def _between(x: Tensor, w13: Tensor, bias: Tensor | None) -> Tensor:
    """The input of ``w2``."""
    gate, up = linear(x, w13, bias).chunk(2, -1)
    return silu(gate) * up


def _squares(x: Tensor) -> Tensor:
    return x.detach().float().square().sum(0).double().cpu()


class _Sums:
    """Sums for a matrix that every token uses."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        squares = _squares(x)
        self.total = squares if self.total is None else self.total + squares
        self.count += x.shape[0]

    def mean(self) -> Tensor:
        if self.total is None:
            raise RuntimeError("mean of no inputs")
        return (self.total / self.count).float()


class _ExpertSums:
    """Sums for a stack of experts, each of which gets some of the tokens."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int) -> None:
        self.total13 = torch.zeros(num_experts, hidden, dtype=torch.float64)
        self.total2 = torch.zeros(num_experts, intermediate, dtype=torch.float64)
        self.count = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, index: int, x: Tensor, between: Tensor) -> None:
        self.total13[index] += _squares(x)
        self.total2[index] += _squares(between)
        self.count[index] += x.shape[0]

    def means(self) -> tuple[Tensor, Tensor]:
        """Means with a prior: for ``w13`` the mean of the layer's inputs, for ``w2`` equal columns.

        All ``w13`` have the same inputs, but the columns of different experts' ``w2`` are unrelated. Only the
        proportions within an expert matter.
        """
        seen = self.count[:, None]
        prior13 = (self.total13.sum(0) / self.count.sum().clamp(min=1)).expand_as(self.total13)
        level = torch.where(seen > 0, self.total2.mean(1, keepdim=True) / seen.clamp(min=1), 1.0)
        pairs = ((self.total13, prior13), (self.total2, level))
        first, second = (((total + PRIOR * prior) / (seen + PRIOR)).float() for total, prior in pairs)
        return first, second
