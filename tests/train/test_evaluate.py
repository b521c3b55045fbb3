"""Bits per byte of held-out text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.kernels.training import LinearCrossEntropy
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.train.evaluate import HeldOut
from tests.train.micro import MODEL, Document, documents, write_source

ROW = 128
CROSS_ENTROPY = LinearCrossEntropy(compile_parts=False)


@pytest.fixture
def model() -> CausalLM:
    made = CausalLM(ModelConfig.from_dict(MODEL), 1)
    made.init_weights(torch.Generator().manual_seed(1))
    return made


@torch.no_grad()
def naive(model: CausalLM, held: list[Document], limit: int) -> float:
    """One plain forward pass a document; every byte counted where the document is whole."""
    nats = num_bytes = 0.0
    for ids, roles in held:
        learned = sum(role == 0 for role in roles[1:])
        kept = torch.tensor(roles[1:limit]) == 0
        if not kept.any():
            continue
        tokens = torch.tensor(ids[:limit])
        logits = model.compute_logits(model(ForwardBatch.packed(tokens, [len(tokens)])))
        losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        nats += float(losses[kept].sum())
        num_bytes += 2 * learned * int(kept.sum()) / learned
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_it_equals_the_naive_sum(model: CausalLM, tmp_path: Path, rows: int) -> None:
    held = [*documents(25, 2, 100), *documents(4, ROW - 1, 200, seed=1), ([3], [0]), ([3, 4], [0, 1])]
    write_source(tmp_path, "held", held, sizes=True)
    made = HeldOut(tmp_path, "held", ROW, rows, max_batches=99)
    assert made.bits_per_byte(model, CROSS_ENTROPY) == pytest.approx(naive(model, held, ROW), rel=1e-5)


def test_part_of_a_source_is_the_naive_sum_of_that_part(model: CausalLM, tmp_path: Path) -> None:
    held = [([index] * 64, [0] * 64) for index in range(12)]
    write_source(tmp_path, "held", held, sizes=True)
    made = HeldOut(tmp_path, "held", ROW, 2, max_batches=2)  # four documents a batch
    assert len(made.batches) == 2 and made.num_bytes == 8 * 2 * 63
    assert made.bits_per_byte(model, CROSS_ENTROPY) == pytest.approx(naive(model, held[:8], ROW), rel=1e-5)


def test_batches_have_the_shape_of_training(tmp_path: Path) -> None:
    write_source(tmp_path, "held", documents(30, 2, 90), sizes=True)
    made = HeldOut(tmp_path, "held", ROW, 3, max_batches=99)
    assert all(len(batch.input_ids) == 3 * ROW == sum(batch.lengths) for batch in made.batches)


def test_a_model_that_knows_nothing_needs_the_bits_of_the_vocabulary(model: CausalLM, tmp_path: Path) -> None:
    write_source(tmp_path, "held", documents(9, 5, 50), sizes=True)
    with torch.no_grad():
        model.embedding.weight.zero_()
    bits = HeldOut(tmp_path, "held", ROW, 2, max_batches=9).bits_per_byte(model, CROSS_ENTROPY)
    assert bits == pytest.approx(math.log2(64) / 2, rel=1e-5)  # two bytes a token


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_source(tmp_path, "held", documents(9, 5, 50))
    with pytest.raises(UsageError, match=r"held\.bytes\.npy: no such file"):
        HeldOut(tmp_path, "held", ROW, 2, max_batches=9)
    np.save(tmp_path / "held.bytes.npy", np.ones(8))
    with pytest.raises(UsageError, match="8 byte counts for 9 documents"):
        HeldOut(tmp_path, "held", ROW, 2, max_batches=9)
