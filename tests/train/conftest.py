"""Recipes for the micro model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.train.recipe import Recipe, Stage
from tests.train.micro import MODEL, number_modes, write_data, write_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """A recipe over sources ``a`` (short documents) and ``b`` (longer), with fields as a test says."""
    data = write_data(tmp_path / "data")

    def make(**fields: Any) -> Recipe:
        defaults: dict[str, Any] = {
            "model": MODEL,
            "data": str(data),
            "tokenizer": str(data),
            "steps": 8,
            "row_length": 128,
            "rows": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "save_every": 0,
            "evaluate_every": 0,
            "autocast": False,
            "stage": [Stage(1.0, {"a": 1.0, "b": 1.0}, mtp_weight=0.3)],
        }
        return Recipe(**{**defaults, **fields})

    return make


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The same as a file."""
    return write_recipe(tmp_path)


@pytest.fixture(autouse=True)
def _number_modes() -> Iterator[None]:
    with number_modes():
        yield
