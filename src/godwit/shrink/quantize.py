"""From a checkpoint to a packed file: tensor by tensor, experts one at a time; what was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import godwit
from godwit.checkpoint import Checkpoint, open_checkpoint
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.checkpoint.packed_writer import PackedWriter
from godwit.errors import CheckpointError, UsageError
from godwit.models.loader import plan, read_companions
from godwit.models.names import Placement
from godwit.qtensor import join_expert, quantize
from godwit.shrink.recipe import QuantRecipe, tensor_blobs

Progress = Callable[[int, int], None]
Item = TypeVar("Item")

_ROWS = 512  # of a matrix, quantised at a time; a multiple of the tile's 16
_SAMPLES = 256  # tensors that a source is recognised by
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes:
        nbytes: of the file.
        blobs: its tensors by name.
        seconds: this run took.
        resumed: tensors that an earlier run had left.
    """

    path: Path
    nbytes: int
    blobs: Mapping[str, TensorBlob]
    seconds: float
    resumed: int


def quantize_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: QuantRecipe,
    *,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> Report:
    """Pack a checkpoint into the file ``out``.

    Args:
        source: what :func:`godwit.checkpoint.open_checkpoint` accepts, or an open checkpoint.
        out: the file to create. A killed run leaves ``out.partial``, and the same call goes on with it.
        recipe: which weights get which format.
        importance: matrix name -> how much an error in each column matters, ``[cols]``; of experts also
            ``[num_experts, cols]``, under the names ``...experts.w13`` and ``...experts.w2``.
        progress: called with (weights done, weights in all).
        restart: begin anew where the partial file is of another model or recipe.

    Memory beyond the file's pages is one matrix as it is stored, or a few experts.

    Raises:
        CheckpointError: a source that does not fit its config or holds numbers that are none; a file that
            exists or cannot be written.
        UsageError: a recipe or importances that do not fit the model.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    pieces, actual, num_mtp = plan(checkpoint)
    blobs = tensor_blobs(checkpoint.config, num_mtp, recipe)
    importance = importance or {}
    _check_importance(importance, blobs)
    with PackedWriter(
        out,
        _plain_config(checkpoint),
        read_companions(checkpoint.path),
        blobs,
        metadata={"godwit": godwit.__version__, "recipe": Path(recipe.name).name},
        identity=_identity(checkpoint, importance),
        restart=restart,
    ) as writer:
        missing = writer.missing()
        left = sum(blobs[name].num_weights for name in missing)
        total = sum(blob.num_weights for blob in blobs.values())
        counter = _Counter(progress, total - left, total)
        with _Pool() as pool:
            work = _Work(checkpoint, _by_target(pieces), actual, importance, counter, pool)
            for name in missing:
                writer.write(name, work.parts(name, blobs[name]))
        writer.finish()
        return Report(
            writer.path,
            writer.nbytes,
            blobs,
            time.monotonic() - started,
            len(blobs) - len(missing),
        )


class _Pool:
    """A thread for each of PyTorch's, and one for each operation: they are too small to be shared out."""

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
        """Items with their results in order, computed a few ahead."""
        ahead: deque[tuple[Item, Future[Tensor]]] = deque()
        for item in items:
            ahead.append((item, self.executor.submit(function, item)))
            if len(ahead) > 2 * self.threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()


class _Counter:
    """Adds up weights and passes them on."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def add(self, weights: int) -> None:
        self.done += weights
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Work:
    """Reads the pieces of a parameter and turns them into the bytes of its blob."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pieces: Mapping[str, list[Placement]],
        actual: Mapping[str, str],
        importance: Mapping[str, Tensor],
        counter: _Counter,
        pool: _Pool,
    ) -> None:
        self.checkpoint, self.pieces, self.actual = checkpoint, pieces, actual
        self.importance, self.counter, self.pool = importance, counter, pool

    def parts(self, name: str, blob: TensorBlob) -> Iterator[Tensor]:
        """The uint8 tensors that make up a blob."""
        try:
            if isinstance(blob, Plain):
                yield self._plain(name, blob)
            elif isinstance(blob, Matrix):
                yield from self._matrix(name, blob)
            else:
                yield from self._experts(name, blob)
        except UsageError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {name} cannot be packed: {error}") from None

    def _plain(self, name: str, blob: Plain) -> Tensor:
        values = self._assembled(self.pieces[name], blob.shape).float()
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has values that are not finite numbers; fetch it again"
            )
        self.counter.add(blob.num_weights)
        return values.contiguous().view(-1).view(torch.uint8)

    def _matrix(self, name: str, blob: Matrix) -> Iterator[Tensor]:
        pieces = self.pieces[name]
        whole = self._assembled(pieces, blob.shape)
        importance = self.importance.get(name)

        def block(begin: int) -> Tensor:
            return quantize(whole[begin : begin + _ROWS], blob.format, importance).data

        rows, cols = blob.shape
        for begin, data in self.pool.ordered(block, range(0, rows, _ROWS)):
            yield data
            self.counter.add(min(_ROWS, rows - begin) * cols)
            self._release(pieces)

    def _experts(self, name: str, blob: ExpertStack) -> Iterator[Tensor]:
        pieces13, pieces2 = self.pieces[f"{name}.w13"], self.pieces[f"{name}.w2"]
        read13 = self._expert_reader(pieces13, (2 * blob.intermediate, blob.hidden))
        read2 = self._expert_reader(pieces2, (blob.hidden, blob.intermediate))

        def one(index: int) -> Tensor:
            return join_expert(
                quantize(read13(index), blob.format13, self._importance(f"{name}.w13", index)),
                quantize(read2(index), blob.format2, self._importance(f"{name}.w2", index)),
            )

        for index, data in self.pool.ordered(one, range(blob.num_experts)):
            yield data
            self.counter.add(blob.num_weights // blob.num_experts)
            self._release(p for p in (*pieces13, *pieces2) if not p.index or p.index[0] == index)

    def _expert_reader(self, pieces: list[Placement], shape: tuple[int, int]) -> Callable[[int], Tensor]:
        """A function from an expert's number to its matrix."""
        if len(pieces) == 1 and not pieces[0].index:
            stack = self.checkpoint.tensor(self.actual[pieces[0].source])
            return lambda index: stack[index]
        own = defaultdict[int, list[Placement]](list)
        for piece in pieces:
            if isinstance(piece.index[0], int):
                own[piece.index[0]].append(
                    Placement(piece.source, piece.shape, piece.target, piece.index[1:])
                )
        return lambda index: self._assembled(own[index], shape)

    def _assembled(self, pieces: list[Placement], shape: tuple[int, ...]) -> Tensor:
        """A parameter from its pieces, in their dtype; a view of the file where it is a single plain one."""
        tensors = [self.checkpoint.tensor(self.actual[piece.source]) for piece in pieces]
        if len(pieces) == 1 and not pieces[0].index:
            return tensors[0].reshape(shape)
        whole = torch.empty(shape, dtype=reduce(torch.promote_types, (tensor.dtype for tensor in tensors)))
        for piece, tensor in zip(pieces, tensors, strict=True):
            whole[piece.index] = tensor.to(whole.dtype)
            self.checkpoint.release(self.actual[piece.source])
        return whole

    def _importance(self, name: str, index: int) -> Tensor | None:
        found = self.importance.get(name)
        return found[index] if found is not None and found.dim() == 2 else found

    def _release(self, pieces: Iterable[Placement]) -> None:
        for piece in pieces:
            self.checkpoint.release(self.actual[piece.source])


def _by_target(pieces: Iterable[Placement]) -> dict[str, list[Placement]]:
    found = defaultdict[str, list[Placement]](list)
    for piece in pieces:
        found[piece.target].append(piece)
    return found


def _plain_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The config without what it says of the checkpoint's own quantisation."""
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
            raise UsageError(f"the importances name {name!r:.100}, which is no matrix of this model")
        if tuple(values.shape) not in wanted[name]:
            shapes = " or ".join(str(list(shape)) for shape in wanted[name])
            raise UsageError(f"the importance of {name} is {list(values.shape)} and should be {shapes}")


def _identity(checkpoint: Checkpoint, importance: Mapping[str, Tensor]) -> str:
    """A source by its names, shapes and the first bytes of some of its tensors, wherever it lies."""
    digest = hashlib.sha256(json.dumps(checkpoint.raw_config, sort_keys=True).encode())
    names = sorted(checkpoint.names())
    for name in names:
        info = checkpoint.info(name)
        digest.update(f"{name} {info.shape} {info.stored}\n".encode())
    for name in names[:: -(-len(names) // _SAMPLES) or 1]:
        values = checkpoint.tensor(name).reshape(-1)
        digest.update(bytes(values[: _SAMPLE_BYTES // values.itemsize].view(torch.uint8).numpy()))
        checkpoint.release(name)
    for name, values in sorted(importance.items()):
        digest.update(f"{name}\n".encode() + bytes(values.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
