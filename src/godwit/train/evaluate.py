"""Held-out loss in bits per byte, which is comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from godwit.errors import UsageError
from godwit.kernels.training import LinearCrossEntropy
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.train.data import PackedBatch, TokenSource, finish_batch, learned
from godwit.train.losses import role_weights

_ASSISTANT_ONLY = [1.0, 0.0, 0.0, 1.0]


class HeldOut:
    """A held-out source packed once into rows of the training shape.

    Args:
        directory, name: the source; ``<name>.bytes.npy`` counts the UTF-8 bytes of each document's learned
            tokens.
        row_length, rows: shape of a batch; documents are truncated to a row's length.
        max_batches: the most batches to evaluate.

    Raises:
        UsageError: a file is missing, or the files do not match.
    """

    def __init__(
        self, directory: str | Path, name: str, row_length: int, rows: int, max_batches: int
    ) -> None:
        source = TokenSource.open(directory, name)
        file = Path(directory) / f"{name}.bytes.npy"
        if not file.is_file():
            raise UsageError(f"{file}: no such file; a held-out source needs the byte count of each document")
        sizes = np.load(file, allow_pickle=False)
        if len(sizes) != source.num_docs:
            raise UsageError(
                f"{file}: {len(sizes)} byte counts for {source.num_docs} documents; prepare the data again"
            )
        self.batches: list[PackedBatch] = []
        self.num_bytes = 0.0
        documents = _cut(source, sizes, row_length)
        pending = next(documents, None)
        while pending is not None and len(self.batches) < max_batches:
            ids, roles, lengths = [], [], []
            for _ in range(rows):
                left = row_length
                while pending is not None and len(pending[0]) <= left:
                    ids.append(pending[0])
                    roles.append(pending[1])
                    lengths.append(len(pending[0]))
                    self.num_bytes += pending[2]
                    left -= len(pending[0])
                    pending = next(documents, None)
                if left:  # padding, which is not scored
                    ids.append(np.zeros(left, np.int64))
                    roles.append(np.full(left, 2, np.int64))
                    lengths.append(left)
            self.batches.append(finish_batch(np.concatenate(ids), np.concatenate(roles), lengths))
        self.row_length = row_length

    @torch.no_grad()
    def bits_per_byte(self, model: CausalLM, cross_entropy: LinearCrossEntropy) -> float:
        """Bits per UTF-8 byte of assistant turns and plain text."""
        nats = 0.0
        for batch in self.batches:
            hidden = model(ForwardBatch.packed(batch.input_ids, batch.lengths, self.row_length))
            weights = role_weights(batch.roles, _ASSISTANT_ONLY)
            nats += float(cross_entropy(hidden, model.head_weight, batch.targets, weights))
        return nats / math.log(2) / max(self.num_bytes, 1.0)


def _cut(
    source: TokenSource, sizes: np.ndarray[Any, Any], limit: int
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]]:
    """Documents truncated to ``limit`` tokens, with bytes in proportion to the learned tokens kept."""
    for index in range(source.num_docs):
        tokens, roles = source.document(index)
        total, kept = int(learned(roles[1:]).sum()), int(learned(roles[1:limit]).sum())
        if kept:
            yield tokens[:limit], roles[:limit], float(sizes[index]) * kept / total
