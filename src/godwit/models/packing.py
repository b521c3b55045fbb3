"""Pack a checkpoint tensor by tensor, experts one at a time, into a file or memory.

In addition to the result, this needs memory for one stored matrix or a few experts.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from godwit.checkpoint import Checkpoint
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Packed, Plain
from godwit.errors import CheckpointError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import plan
from godwit.models.names import Placement
from godwit.models.native import Rounding, assemble
from godwit.models.recipe import QuantRecipe, tensor_blobs
from godwit.qtensor import GROUP, QuantTensor, join_expert, pack_groups, quantize

Progress = Callable[[int, int], None]
Item = TypeVar("Item")

_ROWS = 512  # rows quantised at a time; a multiple of the tile's 16
_PLAIN = ("F64", "F32", "F16", "BF16")
_NONE: Mapping[str, Tensor] = MappingProxyType({})


def pack_checkpoint(
    checkpoint: Checkpoint, recipe: QuantRecipe, *, progress: Progress | None = None
) -> tuple[CausalLM, Packer]:
    """Load a model with its matrices packed, without ever keeping it unpacked.

    Args:
        checkpoint: the checkpoint to load.
        recipe: the formats of weights.
        progress: called with (weights done, total weights).

    Returns:
        The model on the native kernels, and the packer, which has recorded the loss from packing.

    Raises:
        CheckpointError: tensors do not match the config or have values that are not finite.
        UsageError: the recipe does not match the model.
    """
    with Packer(checkpoint, recipe, progress=progress) as packer:
        values = ((name, packer.packed(name)) for name in packer.blobs)
        model = assemble(checkpoint.config, packer.num_mtp, values, str(checkpoint.path))
    return model, packer


def stored_recipe(checkpoint: Checkpoint) -> QuantRecipe:
    """The recipe closest to the stored formats: q8 for matrices stored in blocks, bf16 for all others.

    Raises:
        CheckpointError: the checkpoint does not match its config.
    """
    placements, actual, _ = plan(checkpoint)
    blocks = {one.target for one in placements if _is_quantized(checkpoint, actual[one.source])}
    return QuantRecipe("as stored", (("*", "bf16"),), exact=dict.fromkeys(blocks, "q8"))


def _is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    info = checkpoint.info(name)
    return info.dtype == torch.float32 and info.stored not in _PLAIN


class Packer:
    """Reads the tensors of a parameter and packs them; use it in a ``with`` statement.

    Attributes:
        blobs: the packed tensors by name.
        num_mtp: MTP layers found in the checkpoint.
        rounding: the loss from storing matrices as bf16 so far.
        exact: weights in blocks that were packed without rounding, by their stored type.
        decoded: those of which the chosen format does not hold every value.

    Raises:
        CheckpointError: the checkpoint does not match its config.
        UsageError: the recipe does not match the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: QuantRecipe,
        *,
        importance: Mapping[str, Tensor] = _NONE,
        progress: Progress | None = None,
    ) -> None:
        placements, self._actual, self.num_mtp = plan(checkpoint)
        self.blobs = tensor_blobs(checkpoint.config, self.num_mtp, recipe)
        self.rounding = Rounding()
        self.exact: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self._checkpoint, self._importance = checkpoint, importance
        self._placements = defaultdict[str, list[Placement]](list)
        for placement in placements:
            self._placements[placement.target].append(placement)
        self._progress, self._done = progress, 0
        self._total = sum(blob.num_weights for blob in self.blobs.values())
        self._lock = threading.Lock()
        self._pool = _Pool()

    def __enter__(self) -> Packer:
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def skip(self, names: Iterable[str]) -> None:
        """Count blobs that need not be packed as done."""
        self._done += sum(self.blobs[name].num_weights for name in names)

    def packed(self, name: str) -> Packed:
        """A blob in memory."""
        blob = self.blobs[name]
        data, at = torch.empty(blob.nbytes, dtype=torch.uint8), 0
        for part in self.parts(name):
            data[at : at + part.numel()] = part
            at += part.numel()
        return blob.view(data)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The uint8 tensors that make up a blob, in order.

        Raises:
            CheckpointError: values are out of the format's range or not finite.
        """
        blob = self.blobs[name]
        try:
            if isinstance(blob, Plain):
                yield self._plain(name, blob)
            elif isinstance(blob, Matrix):
                yield from self._matrix(name, blob)
            else:
                yield from self._experts(name, blob)
        except UsageError as error:
            raise CheckpointError(f"{self._checkpoint.path}: {name} cannot be packed: {error}") from None

    def _plain(self, name: str, blob: Plain) -> Tensor:
        placements = self._placements[name]
        values = self._assembled(placements, blob.shape).to(torch.float32, copy=True)
        self._release(placements)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} has values that are not finite numbers; fetch it again"
            )
        self._count(blob.num_weights)
        return values.contiguous().view(-1).view(torch.uint8)

    def _matrix(self, name: str, blob: Matrix) -> Iterator[Tensor]:
        placements = self._placements[name]
        groups = self._groups(placements, blob.shape) if blob.format == "q8" else None
        whole = self._assembled(placements, blob.shape) if groups is None else groups[0]
        importance = self._importance.get(name)
        if groups is None:
            self._note(whole, blob.format, placements)

        def block(begin: int) -> Tensor:
            rows = slice(begin, begin + _ROWS)
            if groups is not None:
                return pack_groups(groups[0][rows], groups[1][rows]).data
            return quantize(whole[rows], blob.format, importance).data

        rows, cols = blob.shape
        for begin, data in self._pool.ordered(block, range(0, rows, _ROWS)):
            yield data
            self._count(min(_ROWS, rows - begin) * cols)
            self._release(placements)

    def _experts(self, name: str, blob: ExpertStack) -> Iterator[Tensor]:
        placements13, placements2 = self._placements[f"{name}.w13"], self._placements[f"{name}.w2"]
        shape13, shape2 = (2 * blob.intermediate, blob.hidden), (blob.hidden, blob.intermediate)
        own13, own2 = self._by_expert(placements13), self._by_expert(placements2)

        def packed(own: list[Placement], shape: tuple[int, int], format: str, index: int) -> QuantTensor:
            groups = self._groups(own, shape) if format == "q8" else None
            if groups is not None:
                return pack_groups(*groups)
            values = self._expert(own, shape, index)
            self._note(values, format, own)
            return quantize(values, format, self._importance_of(own[0].target, index))

        def one(index: int) -> Tensor:
            return join_expert(
                packed(own13(index), shape13, blob.format13, index),
                packed(own2(index), shape2, blob.format2, index),
            )

        for index, data in self._pool.ordered(one, range(blob.num_experts)):
            yield data
            self._count(blob.num_weights // blob.num_experts)
            both = (*placements13, *placements2)
            self._release(p for p in both if not p.index or p.index[0] == index)

    def _by_expert(self, placements: list[Placement]) -> Callable[[int], list[Placement]]:
        """A function from an expert's index to its placements, or to that of the whole stack."""
        if len(placements) == 1 and not placements[0].index:
            return lambda index: placements
        own = defaultdict[int, list[Placement]](list)
        for one in placements:
            if isinstance(one.index[0], int):
                own[one.index[0]].append(Placement(one.source, one.shape, one.target, one.index[1:]))
        return own.__getitem__

    def _expert(self, own: list[Placement], shape: tuple[int, int], index: int) -> Tensor:
        """The matrix of an expert."""
        if len(own) == 1 and len(own[0].shape) == 3:
            return self._checkpoint.tensor(self._actual[own[0].source], slice(index, index + 1))[0]
        return self._assembled(own, shape)

    def _groups(self, placements: list[Placement], shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Codes and scales of a matrix that q8 represents exactly; None for others."""
        if any(len(one.shape) != 2 for one in placements):
            return None
        found = [self._checkpoint.groups(self._actual[one.source]) for one in placements]
        codes = torch.empty(shape, dtype=torch.int8)
        scales = torch.empty(shape[0], shape[1] // GROUP, dtype=torch.float16)
        for one, groups in zip(placements, found, strict=True):
            if groups is None:
                return None
            codes[one.index], scales[one.index] = groups
        with self._lock:
            for one in placements:
                self.exact[self._checkpoint.info(self._actual[one.source]).stored] += math.prod(one.shape)
        return codes, scales

    def _assembled(self, placements: list[Placement], shape: tuple[int, ...]) -> Tensor:
        """A parameter from its tensors, in their dtype; a view of the file if it is a single plain tensor."""
        names = [self._actual[one.source] for one in placements]
        if len(placements) == 1 and not placements[0].index:
            return self._checkpoint.tensor(names[0]).reshape(shape)
        dtypes = (self._checkpoint.info(name).dtype for name in names)
        whole = torch.empty(shape, dtype=reduce(torch.promote_types, dtypes))
        for one, name in zip(placements, names, strict=True):
            whole[one.index] = self._checkpoint.tensor(name).to(whole.dtype)
            self._checkpoint.release(name)
        return whole

    def _note(self, matrix: Tensor, format: str, placements: list[Placement]) -> None:
        """Record the loss from packing a matrix in :attr:`rounding` or :attr:`decoded`."""
        kinds = {self._checkpoint.info(name).stored for one in placements
                 if _is_quantized(self._checkpoint, name := self._actual[one.source])}  # fmt: skip
        own = Rounding()
        if format == "bf16" and matrix.dtype != torch.bfloat16:
            own.add(matrix)
        with self._lock:
            self.rounding.merge(own)
            for kind in kinds:
                self.decoded[kind] += matrix.numel() // len(kinds)

    def _importance_of(self, name: str, index: int) -> Tensor | None:
        found = self._importance.get(name)
        return found[index] if found is not None and found.dim() == 2 else found

    def _count(self, weights: int) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _release(self, placements: Iterable[Placement]) -> None:
        for one in placements:
            self._checkpoint.release(self._actual[one.source])


class _Pool:
    """As many threads as PyTorch uses, each running single-threaded operations, too small to be split."""

    def __enter__(self) -> _Pool:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.executor = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)

    def ordered(
        self, function: Callable[[Item], Tensor], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Tensor]]:
        """Yield items with their results in order, computing a few ahead."""
        ahead: deque[tuple[Item, Future[Tensor]]] = deque()
        for item in items:
            ahead.append((item, self.executor.submit(function, item)))
            if len(ahead) > 2 * self.threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()
