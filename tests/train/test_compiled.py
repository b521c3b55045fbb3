"""The compiled kernels, and several processes, train as the plain one does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from godwit.kernels import ops
from godwit.train.recipe import Recipe, Stage
from godwit.train.trainer import Trainer
from tests.train.conftest import MakeRecipe
from tests.train.micro import MODEL, log_of, train

REPOSITORY = Path(__file__).resolve().parents[2]

ONE_OF_SEVERAL = """
import sys, torch
from godwit.train import parallel
from godwit.train.recipe import Recipe
from godwit.train.trainer import Trainer

torch.set_num_threads(1)
Trainer(Recipe.from_file(sys.argv[1]), sys.argv[2], compile_kernels=False).run(lambda record: None)
parallel.stop()
"""


def assert_same_course(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        for name in ("loss", "mtp_loss", "aux_loss", "gradient_norm"):
            assert one[name] == pytest.approx(two[name], rel=tolerance), (one["step"], name)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a compiler"
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own deprecations
@pytest.mark.timeout(900)
def test_compiled_kernels(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_TABLE", dict(ops._TABLE))
    small = {**MODEL, "num_hidden_layers": 2, "full_attention_interval": 2}
    stages = [Stage(1.0, {"a": 1.0}, mtp_weight=0.3)]
    recipe = make_recipe(model=small, steps=2, rows=1, row_length=64, stage=stages)
    train(recipe, tmp_path / "plain")
    Trainer(recipe, tmp_path / "compiled").run(lambda record: None)
    assert_same_course(log_of(tmp_path / "compiled"), log_of(tmp_path / "plain"), 1e-3)
    torch.compiler.reset()


def test_two_processes_share_a_step(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(
        recipe_file.read_text().replace("rows = 2", "rows = 1\naccumulate = 2\naux_weight = 0.0")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", ONE_OF_SEVERAL, str(recipe_file), str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **group, "RANK": rank}) for rank in "01"
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    train(Recipe.from_file(recipe_file), tmp_path / "one")
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for record in (*one, *two):
        record["aux_loss"] = 0.0  # each process balances its own micro-batches
    assert_same_course(two, one, 1e-3)
    assert two[-1]["evaluation"]["held"] == pytest.approx(one[-1]["evaluation"]["held"], rel=1e-3)
