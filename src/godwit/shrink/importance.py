"""How much each column of a matrix matters: the mean square of its input over some text.

An error in a weight is multiplied with the input of its column, so the squared error of an output is, on
average, that of the weights weighted with these numbers. :func:`godwit.qtensor.quantize` takes them.
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

WINDOW = 1024  # tokens of the text read together, as if nothing were before them
#: Of a file of importances; that of a model with 512 experts in 48 layers has 250 MB.
MAX_BYTES = 4 << 30
MAX_VALUE = 1e30  # sums of many must be finite too
#: Tokens that an expert's prior counts for: what an expert saw outweighs it once there are as many.
PRIOR = 32
#: The gate of a shared expert is no matrix, and the head is multiplied without its module.
_UNWATCHED = ("shared_gate", "head")


@dataclass(frozen=True)
class Importance:
    """What a text says of a model.

    Attributes:
        values: matrix name -> ``[cols]``, for experts ``[num_experts, cols]``, float32, as
            :func:`godwit.shrink.quantize.quantize_checkpoint` takes them.
        tokens: that were read.
        experts: of all layers.
        rare: experts that saw fewer tokens than :data:`PRIOR`, and so go mostly by the prior.
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
    """Run ``model`` over a text and look at what goes into its matrices.

    Args:
        model: with ordinary parameters.
        ids: the text's tokens.
        window: tokens read together.
        progress: called with (tokens done, tokens in all).

    Raises:
        UsageError: packed weights, or fewer than two tokens.
        CheckpointError: the model's states are not finite numbers.
    """
    if model.stack is not None:
        raise UsageError("inputs can only be watched in a model whose weights are not packed")
    if len(ids) < 2:
        raise UsageError("a text to calibrate with must have two tokens at least")
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
    """Write importances to a safetensors file, with ``metadata`` for people.

    Raises:
        CheckpointError: the file exists or cannot be written.
    """
    save_tensors(path, found.values, {"tokens": str(found.tokens), **metadata})


def read_importance(path: Path) -> dict[str, Tensor]:
    """Importances from a safetensors file; whether they fit a model is checked where it is packed.

    Raises:
        CheckpointError: the file is missing, damaged, very large or in another format, or a tensor of it does
            not hold one finite number from 0 up for each column.
    """
    file = SafetensorsFile(path)
    size = sum(entry.nbytes for entry in file.entries.values())
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{path}: holds {size / 2**30:,.1f} GiB, more than the importances of any model"
        )
    return {name: _checked(file.tensor(name), name, path) for name in file.entries}


def _checked(values: Tensor, name: str, path: Path) -> Tensor:
    if not values.is_floating_point() or values.dim() not in (1, 2) or not values.numel():
        raise CheckpointError(
            f"{path}: {shown(name)} is {values.dtype} {list(values.shape)} and should be [cols] or "
            "[num_experts, cols] of a floating-point type; run 'godwit calibrate' again"
        )
    found = values.float()
    if not bool(((found >= 0) & (found <= MAX_VALUE)).all()):
        raise CheckpointError(
            f"{path}: {shown(name)} has values that are negative, not numbers or larger than {MAX_VALUE:g}; "
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
    """Hooks that add up squares while a model runs; they are gone after the ``with`` statement."""

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
                raise CheckpointError(f"the inputs of {name} are not finite numbers; the weights are damaged")
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
    """What goes into ``w2``."""
    gate, up = linear(x, w13, bias).chunk(2, -1)
    return silu(gate) * up


def _squares(x: Tensor) -> Tensor:
    return x.detach().float().square().sum(0).double().cpu()


class _Sums:
    """Of a matrix that all tokens meet."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        squares = _squares(x)
        self.total = squares if self.total is None else self.total + squares
        self.count += x.shape[0]

    def mean(self) -> Tensor:
        if self.total is None:
            raise RuntimeError("nothing was added up")
        return (self.total / self.count).float()


class _ExpertSums:
    """Of a stack of experts, each of which meets some of the tokens."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int) -> None:
        self.total13 = torch.zeros(num_experts, hidden, dtype=torch.float64)
        self.total2 = torch.zeros(num_experts, intermediate, dtype=torch.float64)
        self.count = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, index: int, x: Tensor, between: Tensor) -> None:
        self.total13[index] += _squares(x)
        self.total2[index] += _squares(between)
        self.count[index] += x.shape[0]

    def means(self) -> tuple[Tensor, Tensor]:
        """Means with priors: of ``w13`` the layer's inputs, of ``w2`` equal columns.

        The inputs of all ``w13`` are the same states, but column 5 of one expert's ``w2`` has nothing to do
        with column 5 of another's. Only the proportions within an expert matter.
        """
        seen = self.count[:, None]
        prior13 = (self.total13.sum(0) / self.count.sum().clamp(min=1)).expand_as(self.total13)
        level = torch.where(seen > 0, self.total2.mean(1, keepdim=True) / seen.clamp(min=1), 1.0)
        pairs = ((self.total13, prior13), (self.total2, level))
        first, second = (((total + PRIOR * prior) / (seen + PRIOR)).float() for total, prior in pairs)
        return first, second
