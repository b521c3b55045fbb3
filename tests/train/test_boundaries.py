"""Documents packed into one row neither see nor change one another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.config import ModelConfig
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.train.data import PackedBatch
from godwit.train.losses import role_weights
from godwit.train.trainer import StepLosses, Trainer
from tests.rounding import rounding
from tests.train.conftest import MakeRecipe
from tests.train.micro import MODEL, VOCAB

ROW = 128
# Awkward on purpose: single tokens, the chunk of 64 missed by one either way, a document of a whole row.
LENGTHS = [1, 63, 64, 65, 2, 1, 60, ROW]


@pytest.fixture
def model() -> CausalLM:
    made = CausalLM(ModelConfig.from_dict(MODEL), 1)
    made.init_weights(torch.Generator().manual_seed(1))
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def states(model: CausalLM, ids: Tensor, lengths: Sequence[int], row: int) -> tuple[Tensor, Tensor]:
    """Trunk and prediction-module states ``[T, H]``."""
    batch = ForwardBatch.packed(ids, lengths, row)
    hidden = model(batch)
    return hidden, model.forward_mtp(hidden, ids.roll(-1), batch)


def test_packed_documents_have_the_states_of_separate_ones(model: CausalLM) -> None:
    ids = tokens()
    packed = states(model, ids, LENGTHS, ROW)
    limits = [
        rounding(model, lambda other: states(other, ids, LENGTHS, ROW)[0]),
        rounding(model, lambda other: states(other, ids, LENGTHS, ROW)[1]),
    ]
    assert max(limit.median() for limit in limits) < 0.01  # while the states are of size 1
    for start, length in zip(torch.tensor([0, *LENGTHS]).cumsum(0).tolist(), LENGTHS, strict=False):
        span = slice(start, start + length)
        hidden, deeper = states(model, ids[span], [length], 0)
        assert ((packed[0][span] - hidden).abs().amax(-1) <= limits[0][span]).all()
        # the last slot's next token lies outside the document; nothing is learned there
        assert ((packed[1][span] - deeper).abs().amax(-1) <= limits[1][span])[:-1].all()


def outside(values: Tensor, document: int) -> tuple[float, float]:
    """Largest magnitude inside a document and outside it.

    Outside it may be rounding: log decays are summed over a chunk, whatever documents it holds, before they
    are subtracted.
    """
    start = sum(LENGTHS[:document])
    size = values.abs().amax(-1)
    inside = float(size[start : start + LENGTHS[document]].max())
    size[start : start + LENGTHS[document]] = 0
    return inside, float(size.max())


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_change_stays_in_its_document(model: CausalLM, changed: int) -> None:
    ids = tokens()
    start = sum(LENGTHS[:changed])
    other = ids.clone()
    other[start] = (ids[start] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(ForwardBatch.packed(x, LENGTHS, ROW)) for x in (ids, other))
    inside, beyond = outside(after - before, changed)
    assert inside > 1 and beyond < 1e-4


@pytest.mark.parametrize("learned", range(len(LENGTHS)))
def test_gradients_stay_in_their_document(model: CausalLM, learned: int) -> None:
    start = sum(LENGTHS[:learned])
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    hidden = model(ForwardBatch.packed(tokens(), LENGTHS, ROW))
    loss = hidden[start : start + LENGTHS[learned]].square().sum()
    (grad,) = torch.autograd.grad(loss, embedded)
    inside, beyond = outside(grad, learned)
    assert inside > 1e-3 and beyond < 1e-5 * inside


def separate_losses(model: CausalLM, batch: PackedBatch, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Summed weighted losses by plain cross entropy of plain forward passes, one for each document."""
    main, second = torch.zeros(()), torch.zeros(())
    offsets = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()
    for start, end in pairwise(offsets):
        ids, roles = (
            batch.input_ids[start:end],
            batch.roles[start:end],
        )  # the role of the target of each token
        hidden = model(ForwardBatch.packed(ids, [end - start]))
        main = main + _weighted_loss(model, hidden[:-1], ids[1:], role_weights(roles[:-1], weights))
        shifted = ForwardBatch.packed(ids[1:], [end - start - 1])
        deeper = model.forward_mtp(hidden[:-1], ids[1:], shifted)
        second = second + _weighted_loss(model, deeper[:-1], ids[2:], role_weights(roles[1:-1], weights))
    return main, second


def _weighted_loss(model: CausalLM, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(model.compute_logits(hidden), targets, reduction="none")
    return (losses * weights).sum()


def gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal up to float32: a thousandth of each, or of what is small a hundred-thousandth of all together.

    The gradient of a fast decay is small, and the difference of large sums over a chunk.
    """
    assert a.keys() == b.keys()
    whole = float(torch.stack([grad.norm() for grad in b.values()]).norm())
    for name in a:
        error = float((a[name] - b[name]).norm())
        assert error < 1e-3 * float(b[name].norm()) + 1e-5 * whole, name


def test_the_loss_of_a_step_is_the_mean_over_separate_documents(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(aux_weight=0.0)
    trainer = Trainer(recipe, tmp_path, compile_kernels=False)
    stage = recipe.stage[0]
    batch = trainer.sampler.batch(stage.mix)
    main = float(role_weights(batch.roles, stage.role_weights).sum())
    second = float(role_weights(batch.roles2, stage.role_weights).sum())
    losses = StepLosses()
    trainer._backward(batch, stage, main, second, losses)
    packed = gradients(trainer.model)
    plain, plain_mtp = separate_losses(trainer.model, batch, stage.role_weights)
    assert losses.main == pytest.approx(plain.item() / main, rel=1e-5)
    assert losses.mtp == pytest.approx(plain_mtp.item() / second, rel=1e-5)
    (plain / main + stage.mtp_weight * plain_mtp / second).backward()  # type: ignore[no-untyped-call]
    assert_same_gradients(packed, gradients(trainer.model))


def test_two_micro_batches_make_the_step_of_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = []
    for rows, accumulate in ((1, 2), (2, 1)):
        recipe = make_recipe(rows=rows, accumulate=accumulate, aux_weight=0.0, clip=1e9)
        trainer = Trainer(recipe, tmp_path, compile_kernels=False)
        trainer.optimizers = []  # the gradients stay as they are
        losses, norm = trainer._train_step()
        found.append((losses, norm, gradients(trainer.model)))
    (one, one_norm, one_grads), (two, two_norm, two_grads) = found
    assert one.main == pytest.approx(two.main, rel=1e-5) and one.mtp == pytest.approx(two.mtp, rel=1e-5)
    assert one_norm == pytest.approx(two_norm, rel=1e-4)
    assert_same_gradients(one_grads, two_grads)
