"""The loop: it learns, goes on exactly where it was killed, and refuses what cannot work."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from godwit.errors import CheckpointError, GodwitError, UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.loader import load_model
from godwit.train import trainer as trainer_module
from godwit.train.recipe import Recipe, Stage
from godwit.train.trainer import Trainer, active_parameters
from tests.train.conftest import MakeRecipe
from tests.train.micro import MODEL, VOCAB, documents, log_of, train, write_source

REPOSITORY = Path(__file__).resolve().parents[2]

# A run in a process of its own, which is killed in the middle of what its last arguments say.
KILLED_RUN = """
import os, signal, sys
import torch
from godwit.train import trainer
from godwit.train.recipe import Recipe

torch.set_num_threads(1)
recipe, out, when, step = Recipe.from_file(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Victim(trainer.Trainer):
    def _backward(self, *args):
        super()._backward(*args)
        if when == "training" and self.step == step:
            die()

    def save(self):
        if when == "saving" and self.step == step:
            save = torch.save
            def half(state, file):
                save(state, file)
                file.truncate(file.tell() // 2)
                die()
            torch.save = half
        super().save()
        if when == "saved" and self.step == step:
            die()

Victim(recipe, out, compile_kernels=False).run(lambda record: None)
"""


def run_killed(recipe: Path, out: Path, when: str, step: int) -> None:
    command = [sys.executable, "-c", KILLED_RUN, str(recipe), str(out), when, str(step)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL


@pytest.fixture(params=["adamw", "muon"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_loss_goes_down(make_recipe: MakeRecipe, tmp_path: Path, optimizer: str) -> None:
    recipe = make_recipe(steps=30, optimizer=optimizer, stage=[Stage(1.0, {"a": 1.0}, mtp_weight=0.3)])
    train(recipe, tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert [record["step"] for record in log] == list(range(1, 31))
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(math.log(VOCAB), abs=0.5)
    assert last["loss"] < 0.85 * first["loss"] and last["mtp_loss"] < 0.9 * first["mtp_loss"]
    assert last["tokens"] == 30 * recipe.tokens_per_step
    assert 1 <= last["balance"] <= 2 <= last["aux_loss"] + 1e-2


def test_training_again_gives_the_same_losses(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(steps=4, autocast=True)
    for name in ("one", "two"):
        train(recipe, tmp_path / name)
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")
    train(make_recipe(steps=4, autocast=True, seed=5), tmp_path / "three")
    assert log_of(tmp_path / "three") != log_of(tmp_path / "one")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_the_cpu_is_fast_with_it_or_the_recipe_says(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(trainer_module, "multiplies_bf16_fast", lambda: fast)
    chosen = [
        Trainer(make_recipe(autocast=asked), tmp_path / "out", compile_kernels=False).autocast
        for asked in (None, True, False)
    ]
    assert chosen == [fast, True, False]


@pytest.mark.parametrize(("when", "step"), [("training", 5), ("saving", 6), ("saved", 3)])
def test_killed_at_any_moment_it_goes_on_to_the_same_end(
    recipe_file: Path, tmp_path: Path, when: str, step: int
) -> None:
    recipe = Recipe.from_file(recipe_file)  # 8 steps, saved at 3 and 6, a new stage at 4
    whole = train(recipe, tmp_path / "whole")
    run_killed(recipe_file, tmp_path / "killed", when, step)
    resumed = train(recipe, tmp_path / "killed")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_killed_before_anything_was_saved_it_starts_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_file(recipe_file)
    run_killed(recipe_file, tmp_path / "killed", "training", 2)
    assert not (tmp_path / "killed" / "state.pt").exists()
    train(recipe, tmp_path / "killed", stop_after=4)
    train(recipe, tmp_path / "whole", stop_after=4)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_a_log_cut_off_in_a_line_is_mended(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(make_recipe(), out, stop_after=2)
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    train(make_recipe(), out, stop_after=1)
    assert [record["step"] for record in log_of(out)] == [1, 2, 3]


def test_stopping_after_some_steps_and_going_on(
    make_recipe: MakeRecipe, tmp_path: Path, optimizer: str
) -> None:
    recipe = make_recipe(steps=6, optimizer=optimizer, accumulate=2)
    train(recipe, tmp_path / "whole")
    for steps in (1, 3, 9):
        train(recipe, tmp_path / "parts", stop_after=steps)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    train(recipe, tmp_path / "parts")  # nothing is left to do
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_asked_to_stop_it_finishes_the_step_and_saves(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    trainer = Trainer(recipe, tmp_path / "out", compile_kernels=False)
    trainer.run(lambda record: trainer.stop() if record["step"] == 2 else None)
    assert trainer.step == 3  # asked after step 2, it had agreed to another
    train(recipe, tmp_path / "out")
    train(recipe, tmp_path / "whole")
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")


def test_without_resume_it_starts_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(make_recipe(), out, stop_after=2)
    train(make_recipe(seed=3), out, resume=False, stop_after=1)
    assert [record["step"] for record in log_of(out)] == [1]
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 1


def test_settings_of_the_optimiser_may_change_on_the_way(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(weight_decay=0.1), tmp_path / "out", stop_after=1)
    trainer = train(make_recipe(weight_decay=0.7), tmp_path / "out", stop_after=1)
    assert max(group["weight_decay"] for o in trainer.optimizers for group in o.param_groups) == 0.7


def test_tokens_add_up_when_the_batch_changes_on_the_way(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(rows=1), tmp_path / "out", stop_after=2)
    train(make_recipe(rows=2, accumulate=2), tmp_path / "out", stop_after=2)
    assert [record["tokens"] for record in log_of(tmp_path / "out")] == [128, 256, 768, 1280]


def test_a_state_of_another_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(make_recipe(), out, stop_after=1)
    before = (out / "state.pt").read_bytes()
    with pytest.raises(UsageError, match="belongs to another model; use another --out or --no-resume"):
        train(make_recipe(model={**MODEL, "hidden_size": 48}), out)
    for other in ({"optimizer": "muon"}, {"num_mtp": 0, "stage": [Stage(1.0, {"a": 1.0})]}):
        with pytest.raises(CheckpointError, match="does not match the recipe"):
            train(make_recipe(**other), out)
    assert (out / "state.pt").read_bytes() == before and len(log_of(out)) == 1
    train(
        make_recipe(model=dict(reversed(MODEL.items()))), out, stop_after=1
    )  # the order of fields is nothing


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "pickle"])
def test_a_damaged_state_is_said_to_be(make_recipe: MakeRecipe, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    train(make_recipe(), out, stop_after=1)
    state = out / "state.pt"
    if damage == "other":
        torch.save({"weights": torch.zeros(2)}, state)
    elif damage == "pickle":
        torch.save({"config": Path("/")}, state)  # not a plain number, string or tensor: never unpickled
    else:
        whole = state.read_bytes()
        state.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"state"}[damage])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        train(make_recipe(), out)


def test_a_disk_that_refuses_leaves_the_last_state(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(make_recipe(), out, stop_after=1)
    before = (out / "state.pt").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match="No space left"):
            train(make_recipe(), out, stop_after=1)
    assert (out / "state.pt").read_bytes() == before and not (out / "state.tmp").exists()


def test_a_run_that_diverges_says_so_and_saves_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = train(make_recipe(), out, stop_after=2)
    before = (out / "state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.inf
    with pytest.raises(GodwitError, match=r"step 3 diverged .* lower learning_rate"):
        trainer.run(lambda record: None, resume=False)
    assert (out / "state.pt").read_bytes() == before


def test_absent_data_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for fields, name in (
        ({"data": str(tmp_path / "absent")}, r"absent/a\.tokens\.npy: no such file"),
        ({"stage": [Stage(1.0, {"c": 1.0})]}, r"c\.tokens\.npy: no such file"),
        ({"evaluate_on": ["a"]}, r"a\.bytes\.npy: no such file"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer.json"),
    ):
        with pytest.raises(UsageError, match=name):
            Trainer(make_recipe(**fields), tmp_path / "out", compile_kernels=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["a", "held"])
def test_tokens_outside_the_vocabulary(make_recipe: MakeRecipe, tmp_path: Path, source: str) -> None:
    recipe = make_recipe(evaluate_on=["held"])
    held = [*documents(5, 4, 9), ([1, VOCAB, 2], [0, 0, 0])]
    write_source(Path(recipe.data), source, held, sizes=True)
    with pytest.raises(UsageError, match=f"'{source}' has token {VOCAB}, but vocab_size is {VOCAB}"):
        Trainer(recipe, tmp_path, compile_kernels=False)


def test_what_weighs_nothing_is_not_learned(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stages = [Stage(1.0, {"a": 1.0}, role_weights=[0.0, 0.0, 0.0, 0.0], mtp_weight=0.3)]
    trainer = train(make_recipe(stage=stages, aux_weight=0.0, weight_decay=0.0, steps=2), tmp_path / "out")
    assert [record["loss"] for record in log_of(tmp_path / "out")] == [0.0, 0.0]
    fresh = Trainer(make_recipe(), tmp_path / "fresh", compile_kernels=False)
    for a, b in zip(trainer.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_roles_weigh_as_the_stage_says(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A step's loss is the mean over targets, weighted by their roles."""
    losses = {}
    for weights in ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.75, 0.25, 0.0, 0.0]):
        stage = Stage(1.0, {"a": 1.0}, role_weights=weights)
        trainer = Trainer(make_recipe(stage=[stage]), tmp_path, compile_kernels=False)
        batch = trainer.sampler.batch(stage.mix)
        trainer.sampler.batch = lambda mix, batch=batch: batch  # type: ignore[method-assign, misc]
        losses[tuple(weights[:2])] = trainer._train_step()[0].main
    counts = [int((batch.roles == role).sum()) for role in (0, 1)]
    parts = [0.75 * counts[0] * losses[1.0, 0.0], 0.25 * counts[1] * losses[0.0, 1.0]]
    expected = sum(parts) / (0.75 * counts[0] + 0.25 * counts[1])
    assert losses[0.75, 0.25] == pytest.approx(expected, rel=1e-5)


def test_stages_switch_the_prediction_loss_on(recipe_file: Path, tmp_path: Path) -> None:
    train(Recipe.from_file(recipe_file), tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert [record["mtp_loss"] > 0 for record in log] == [False] * 4 + [True] * 4
    assert ["evaluation" in record for record in log] == [i in (4, 8) for i in range(1, 9)]
    assert list(log[3]["evaluation"]) == ["held"]


def test_gradients_are_clipped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(clip=1e-3), tmp_path, compile_kernels=False)
    trainer.optimizers = []
    _, norm = trainer._train_step()
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert norm > 1e-2
    assert float(torch.stack([grad.norm() for grad in grads]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.fixture
def trained(make_recipe: MakeRecipe, tmp_path: Path) -> Trainer:
    return train(make_recipe(), tmp_path / "out", stop_after=3)


def export(trainer: Trainer, path: Path) -> Path:
    trainer.export(path, dtype=torch.float32)
    return path


def logits_of(trainer: Trainer, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = trainer.model(ForwardBatch.packed(torch.tensor(ids), [len(ids)]))
        return trainer.model.compute_logits(hidden)


IDS = [int(token) for token in np.random.default_rng(0).integers(VOCAB, size=90)]


def test_the_exported_model_is_the_trained_one(trained: Trainer, tmp_path: Path) -> None:
    loaded = load_model(export(trained, tmp_path / "model"))
    assert loaded.mtp is not None
    with torch.no_grad():
        hidden = loaded(ForwardBatch.packed(torch.tensor(IDS), [len(IDS)]))
        assert torch.equal(loaded.compute_logits(hidden), logits_of(trained, IDS))
    for (name, a), b in zip(trained.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_another_run_starts_from_an_exported_model(
    trained: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = export(trained, tmp_path / "model")
    recipe = make_recipe(init=str(path), seed=9)
    assert torch.equal(
        logits_of(Trainer(recipe, tmp_path / "next", compile_kernels=False), IDS), logits_of(trained, IDS)
    )
    other = make_recipe(init=str(path), model={**MODEL, "rope_theta": 5.0})
    with pytest.raises(UsageError, match=r"differs from the recipe's \[model\]"):
        Trainer(other, tmp_path / "next", compile_kernels=False)
    with pytest.raises(UsageError, match="a different number of MTP layers than num_mtp"):
        Trainer(
            make_recipe(init=str(path), num_mtp=0, stage=[Stage(1.0, {"a": 1.0})]),
            tmp_path / "next",
            compile_kernels=False,
        )


def test_it_is_exported_in_bfloat16_and_over_an_older_one(trained: Trainer, tmp_path: Path) -> None:
    export(trained, tmp_path / "model")
    trained.export(tmp_path / "model")
    assert load_model(tmp_path / "model").dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_computes_the_same_logits(trained: Trainer, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    path = export(trained, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits[0]
    ours = logits_of(trained, IDS)
    assert float((logits - ours).norm() / ours.norm()) < 1e-4


def test_active_parameters(trained: Trainer) -> None:
    hidden, width, experts, top_k = 32, 16, 4, 2
    moe = experts * hidden + 3 * hidden * width * (top_k + 1) + hidden
    delta = hidden * (2 * 16 + 2 * 32) + hidden * 4 + 64 * 4 + 32 * hidden
    attention = hidden * (2 * 32 + 2 * 16) + 32 * hidden
    assert active_parameters(trained.model) == 4 * moe + 3 * delta + attention + VOCAB * hidden
