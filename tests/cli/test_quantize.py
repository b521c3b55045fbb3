from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.packed import PackedFile
from godwit.cli import quantize
from godwit.cli.main import app
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model, save_model
from tests.engine.tiny import CONFIGS, tiny_model, write_chain_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and random weights."""
    directory = write_chain_model(tmp_path_factory.mktemp("models") / "m", {"\n": "Hello"})
    return directory


@pytest.fixture(scope="module")
def random_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(open_checkpoint(model).config, initializer_range=0.05)
    made = CausalLM(config).requires_grad_(False)
    made.init_weights(torch.Generator().manual_seed(1))
    directory = tmp_path_factory.mktemp("models") / "random"
    save_model(made, directory, companions=model)
    return directory


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def report(*words: str | Path) -> dict[str, Any]:
    result = invoke(*words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_packing_verifying_and_inspecting(random_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.godwit"
    found = report("quantize", random_model, out)
    packed = PackedFile.open(out)
    count = sum(p.numel() for p in load_model(random_model).parameters())
    assert found["path"] == str(out) and found["bytes"] == packed.nbytes == out.stat().st_size
    assert found["weights"] == count and found["bits"] == 8 * packed.nbytes / count
    assert sum(part["weights"] for part in found["parts"].values()) == count
    assert found["parts"]["head"]["bits"] > 8 > found["parts"]["attention"]["bits"] > 4
    assert (found["resumed_tensors"], found["quality"]) == (0, None)
    assert set(packed.files()) >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    checked = invoke("verify", out)
    assert (
        checked.exit_code == 0
        and "whole" in checked.stdout
        and f"{len(packed.blobs)} tensors" in checked.stdout
    )
    whole = {"path": str(out), "whole": True, "tensors": len(packed.blobs), "bytes": packed.nbytes}
    assert report("verify", out) == whole
    seen = report("inspect", out)
    assert seen["packed"]["parts"] == found["parts"] and seen["parameters"]["total"] == count
    assert (
        seen["weights"]["bytes"]
        == seen["resident_packed"]
        == sum(blob.nbytes for blob in packed.blobs.values())
    )
    assert {"q4", "q8", "bf16", "F32"} == set(seen["weights"]["dtypes"])
    shape = report("inspect", random_model)
    assert {**seen["parameters"], "mtp_if_present": None} == {**shape["parameters"], "mtp_if_present": None}
    assert seen["layers"] == shape["layers"] and seen["cache"] == shape["cache"]


def test_what_a_token_reads(random_model: Path, tmp_path: Path) -> None:
    report("quantize", random_model, tmp_path / "m", "--recipe", "q8")
    seen = report("inspect", tmp_path / "m", "--context", "100")
    parts, stored = seen["parameters"]["parts"], seen["packed"]["parts"]
    weights = sum(
        stored[name]["bytes"] * part["active"] / stored[name]["weights"]
        for name, part in parts.items()
        if part["active"]
    )
    (row,) = seen["contexts"]
    caches = 101 * seen["cache"]["kv_per_token"] + 2 * (seen["cache"]["state"] + seen["cache"]["conv"])
    assert abs(row["read_per_token"] - weights - caches) <= 1
    assert row["resident"] == row["cache"] + seen["resident_packed"]


def test_people_get_tables(random_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[formats]\n"*.experts.w2" = "q8"\n')
    shown = invoke("quantize", random_model, tmp_path / "m", "--recipe", tmp_path / "recipe.toml")
    assert shown.exit_code == 0 and "bits per weight" in shown.stdout and "written in" in shown.stdout
    inspected = invoke("inspect", tmp_path / "m")
    assert inspected.exit_code == 0
    for words in ("bits", "q4/q8", "recipe.toml", "tokenizer.json", "packed weights"):
        assert words in inspected.stdout


@pytest.mark.parametrize(
    ("recipe", "least", "most"), [("bf16", 0.0, 1e-3), ("q8", 1e-7, 0.01), ("q4", 1e-5, 0.3)]
)
def test_evaluating(random_model: Path, tmp_path: Path, recipe: str, least: float, most: float) -> None:
    (tmp_path / "text").write_text("A text of some length. " * 12)
    found = report(
        "quantize", random_model, tmp_path / "m", "--recipe", recipe, "--evaluate", tmp_path / "text"
    )
    quality = found["quality"]
    assert quality["tokens"] > 200 and least <= quality["kl"] <= most
    assert quality["perplexity_changed"] == pytest.approx(quality["perplexity"], rel=0.2)
    shown = invoke("quantize", random_model, tmp_path / "n", "--evaluate", tmp_path / "text")
    assert "KL divergence" in shown.stdout and "same likeliest token" in shown.stdout


def test_synthetic_models(model: Path, tmp_path: Path) -> None:
    found = report("synth", model / "config.json", tmp_path / "m", "--layers", "3", "--recipe", "q8")
    assert {"delta", "experts", "head"} < set(found["parts"])
    seen = report("inspect", tmp_path / "m")
    assert seen["layers"]["total"] == 3 and seen["packed"]["files"] == []
    skewed = report(
        "synth", model, tmp_path / "n", "--layers", "3", "--recipe", "q8", "--skew", "real", "--seed", "3"
    )
    assert skewed["bytes"] == pytest.approx(found["bytes"], rel=0.01)
    assert "skewed" in PackedFile.open(tmp_path / "n").metadata["source"]
    assert invoke("verify", tmp_path / "n").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--recipe", "q5"], 2, "neither a built-in recipe"),
        (["--recipe", "recipe.toml"], 2, "no matrix of this model"),
        (["--importance", "absent"], 3, "absent"),
        (["--evaluate", "absent"], 2, "cannot be read"),
        (["--evaluate", "empty"], 2, "at least two"),
        (["--evaluate", "latin"], 2, "not UTF-8 text"),
    ],
)
def test_mistakes(
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text('[formats]\n"nothing" = "q8"\n')
    Path("empty").touch()
    Path("latin").write_bytes(b"\xe9\xe8")
    result = invoke("quantize", random_model, "m", *words)
    assert (result.exit_code, result.stdout) == (code, "") and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and not Path("m").exists() and not Path("m.partial").exists()


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("", "not a file name"), ("/", "not a file name"), ("text/m", "choose another place")],
)
def test_places_where_no_file_can_be(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").touch()
    for words in (("quantize", random_model), ("synth", random_model)):
        result = invoke(*words, out)
        assert (result.exit_code, result.stdout) == (3, "") and sentence in result.stderr
        assert "the partial file" not in result.stderr and result.stderr.count("\n") == 1


def test_a_tokenizer_is_looked_at_first(random_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(random_model, tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    result = invoke("quantize", source, tmp_path / "m")
    assert result.exit_code == 3 and "tokenizer.json is not valid JSON" in result.stderr
    assert not (tmp_path / "m.partial").exists()
    (source / "tokenizer.json").unlink()
    result = invoke("quantize", source, tmp_path / "m")
    assert result.exit_code == 0 and result.stderr.startswith("warning: ")
    assert "can only be used with godwit bench" in result.stderr
    packed = PackedFile.open(tmp_path / "m")
    assert "tokenizer.json" not in packed.files()


def test_packed_files_are_not_packed_again(random_model: Path, tmp_path: Path) -> None:
    assert invoke("quantize", random_model, tmp_path / "m.godwit").exit_code == 0
    for words in (("quantize",), ("synth",)):
        result = invoke(*words, tmp_path / "m.godwit", tmp_path / "n")
        assert result.exit_code == 3 and "already packed" in result.stderr


def test_an_original_that_does_not_fit_is_refused_first(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "memory", lambda: {"total": 1000, "available": 1000})
    (tmp_path / "text").write_text("some text")
    result = invoke("quantize", random_model, tmp_path / "m", "--evaluate", tmp_path / "text")
    assert result.exit_code == 5 and "--evaluate" in result.stderr and not (tmp_path / "m").exists()


def test_what_is_there_stays(random_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("precious")
    for words in (("quantize", random_model), ("synth", random_model)):
        result = invoke(*words, tmp_path / "m")
        assert result.exit_code == 3 and "exists already" in result.stderr
    assert (tmp_path / "m").read_text() == "precious"


def test_damaged_files_end_with_3(random_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.godwit"
    assert invoke("quantize", random_model, out).exit_code == 0
    content = out.read_bytes()
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = invoke("verify", out)
    assert (result.exit_code, result.stdout) == (3, "") and "checksum" in result.stderr
    out.write_bytes(content[:-1])
    for verb in ("verify", "inspect"):
        result = invoke(verb, out)
        assert (result.exit_code, result.stdout) == (3, "") and "cut short" in result.stderr


def test_a_file_of_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("hybrid"), tmp_path / "source")
    assert invoke("quantize", tmp_path / "source", tmp_path / "m").exit_code == 0
    opened = PackedFile.open(tmp_path / "m")
    opened.raw_config = {**CONFIGS["hybrid"], "hidden_size": 64}
    monkeypatch.setattr(PackedFile, "open", lambda path: opened)
    result = invoke("inspect", tmp_path / "m")
    assert result.exit_code == 3 and "does not match its config" in result.stderr
