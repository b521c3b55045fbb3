"""Recipes: the schedule, the stages, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from godwit.errors import UsageError
from godwit.train.losses import role_weights
from godwit.train.recipe import Recipe, Stage
from tests.train.conftest import MakeRecipe

HERE = Path(__file__).resolve()


def test_a_file_is_read_and_its_paths_are_its_own(recipe_file: Path) -> None:
    recipe = Recipe.from_file(recipe_file)
    assert recipe.data == recipe.tokenizer == str(recipe_file.parent / "data")
    assert (recipe.steps, recipe.rows, recipe.accumulate) == (8, 2, 1)
    assert recipe.tokens_per_step == 256
    assert recipe.stage[0].mix == {"a": 1.0, "b": 1.0}
    assert recipe.stage[0].role_weights == [1.0, 0.25, 0.0, 1.0]
    assert recipe.model["hidden_size"] == 32


def test_bfloat16_is_forced_or_left_open(recipe_file: Path) -> None:
    text = recipe_file.read_text()
    for line, expected in (("autocast = true", True), ("autocast = false", False), ("", None)):
        recipe_file.write_text(text.replace("autocast = false", line))
        assert Recipe.from_file(recipe_file).autocast is expected


def test_the_default_recipe_is_sound() -> None:
    recipe = Recipe.from_file(HERE.parents[2] / "recipes" / "default" / "recipe.toml")
    assert recipe.num_mtp == 1 and recipe.stage[-1].until == 1.0


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps = 8", "steps = 8\nstepz = 9", "unknown field 'stepz'"),
        ("steps = 8", "", "field 'steps' is missing"),
        ("steps = 8", 'steps = "8"', "steps must be a whole number, found '8'"),
        ("steps = 8", "steps = 8.5", "steps must be a whole number"),
        ("steps = 8", "steps = true", "steps must be a whole number"),
        ("steps = 8", "steps = 0", "steps must be at least 1"),
        ("autocast = false", "autocast = 0", "autocast must be true or false"),
        ("row_length = 128", "row_length = 100", "multiple of 64"),
        ("rows = 2", "rows = 0", "rows and accumulate must be at least 1"),
        ("steps = 8", 'steps = 8\noptimizer = "sgd"', "optimizer must be"),
        ("learning_rate = 1e-2", "learning_rate = 2", "learning_rate must lie between"),
        ("learning_rate = 1e-2", "learning_rate = nan", "every number must be finite"),
        ("learning_rate = 1e-2", 'learning_rate = "fast"', "learning_rate must be a number"),
        ("steps = 8", "steps = 8\ndecay = 1.5", "decay must lie between"),
        ("steps = 8", "steps = 8\nclip = 0", "clip must be more than 0"),
        ("steps = 8", "steps = 8\nbeta2 = 1.0", "beta1 and beta2"),
        ("steps = 8", "steps = 8\naux_weight = -1", "weights must be zero or more"),
        ("steps = 8", "steps = 8\nnum_mtp = 2", "num_mtp must be 0 or 1"),
        ("steps = 8", "steps = 8\nnum_mtp = 0", "mtp_weight needs num_mtp = 1"),
        ("until = 1.0", "until = 0.9", "the last stage must end at"),
        ("until = 0.5", "until = 1.0", "each stage must end after"),
        ("until = 0.5", "until = 0", "each stage must end after"),
        ("until = 0.5", "", r"\[\[stage\]\]: field 'until' is missing"),
        ("until = 0.5", "until = 0.5\nmixx = 1", r"\[\[stage\]\]: unknown field 'mixx'"),
        ("until = 0.5", "until = 0.5\nrole_weights = [1, 1]", "role_weights needs four"),
        ("until = 0.5", 'until = 0.5\nrole_weights = [1, "x", 1]', "role_weights: an item must be a number"),
        ("mix = { a = 1, b = 1.0 }", 'mix = { a = "x" }', "mix: a must be a number"),
        ("mix = { a = 1, b = 1.0 }", "mix = { a = -1 }", "weights must be zero or more"),
        ("mix = { a = 1, b = 1.0 }", "mix = { a = 0 }", "mix needs a source"),
        ("mix = { a = 1, b = 1.0 }", "mix = {}", "mix needs a source"),
        ("mix = { a = 1, b = 1.0 }", "mix = [1]", "mix must be a table"),
        ('evaluate_on = ["held"]', "evaluate_on = [1]", "evaluate_on: an item must be text"),
        ("[[stage]]", "[stage]", "not valid TOML|at least one"),
        ("steps = 8", "steps = = 8", "not valid TOML"),
    ],
)
def test_mistakes(recipe_file: Path, old: str, new: str, sentence: str) -> None:
    text = recipe_file.read_text()
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=sentence) as caught:
        Recipe.from_file(recipe_file)
    assert str(recipe_file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["", "stage = 3\n", "stage = []\n", "stage = [1]\n"])
def test_without_stages(tmp_path: Path, stage: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(stage + "steps = 8")
    with pytest.raises(UsageError, match="at least one"):
        Recipe.from_file(file)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(UsageError, match="no such recipe"):
            Recipe.from_file(path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        Recipe.from_file(tmp_path / "bytes.toml")


def test_the_schedule(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(steps=100, warmup_steps=10, decay=0.4, learning_rate=0.5)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert set(rates[9:61]) == {0.5}
    assert rates[60:] == pytest.approx([0.5 * (100 - i) / 40 for i in range(60, 100)])
    assert min(rates) > 0


@pytest.mark.parametrize("fields", [{"warmup_steps": 0, "decay": 0.0}, {"warmup_steps": 99, "decay": 1.0}])
def test_schedules_without_a_plateau(make_recipe: MakeRecipe, fields: dict[str, Any]) -> None:
    recipe = make_recipe(steps=20, learning_rate=0.1, **fields)
    rates = [recipe.learning_rate_at(step) for step in range(20)]
    assert all(0 < rate <= 0.1 for rate in rates)
    assert (set(rates) == {0.1}) == (fields["decay"] == 0.0)


def test_stages_by_step(make_recipe: MakeRecipe) -> None:
    stages = [Stage(until, {"a": 1.0}) for until in (0.25, 0.5, 1.0)]
    recipe = make_recipe(steps=8, stage=stages)
    assert [stages.index(recipe.stage_at(step)) for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert recipe.stage_at(8) is stages[2]


def test_role_weights() -> None:
    roles = torch.tensor([0, 1, 2, 3, 4, 0])
    assert role_weights(roles, [1.0, 0.25, 0.5, 3.0]).tolist() == [1.0, 0.25, 0.5, 3.0, 0.0, 1.0]
