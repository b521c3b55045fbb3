from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from godwit.checkpoint import save_checkpoint
from godwit.cli import doctor, inspect
from godwit.cli.main import app
from godwit.cli.tables import size_text
from godwit.config import ModelConfig
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import export_tensors

TINY: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


def tensors(num_mtp: int = 1) -> dict[str, torch.Tensor]:
    model = CausalLM(ModelConfig.from_dict(TINY), num_mtp)
    model.init_weights()
    return dict(export_tensors(model.to(torch.bfloat16)))


def invoke(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def said(*args: str | Path) -> str:
    """What is printed, as one line."""
    return " ".join(invoke(*args).stdout.split())


def report(*args: str | Path) -> dict[str, Any]:
    result = invoke(*args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """A machine with as much memory as a test says."""
    size: dict[str, int | None] = {"total": 16 * 10**9, "available": 8 * 10**9}
    monkeypatch.setattr(inspect, "memory", lambda: size)
    return size


def test_a_checkpoint(tmp_path: Path) -> None:
    held = tensors()
    save_checkpoint(tmp_path / "m", held.items(), TINY)
    found = report(tmp_path / "m")
    count = sum(tensor.numel() for tensor in held.values())
    assert found["parameters"]["total"] == count
    assert found["layers"] == {"total": 4, "delta": 3, "attention": 1, "sparse": 4, "dense": 0, "mtp": 1}
    assert found["weights"] == {
        "tensors": len(held),
        "beside_the_text_model": 0,
        "bytes": 2 * count,
        "dtypes": {"BF16": {"tensors": len(held), "parameters": count, "bytes": 2 * count}},
        "problem": None,
    }
    assert found["resident_bfloat16"] == 2 * count
    assert found["cache"]["kv_per_token"] == found["cache"]["mtp_kv_per_token"] == 2 * 2 * 32 * 2
    shown = invoke(tmp_path / "m")
    assert shown.exit_code == 0 and "BF16" in shown.stdout and f"{count:,}" in shown.stdout


def test_prediction_layers_are_counted_in_the_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", tensors(num_mtp=0).items(), TINY)
    found = report(tmp_path / "m")
    assert found["layers"]["mtp"] == 0 and found["parameters"]["mtp_if_present"] is None


def test_a_bare_config_says_what_the_files_may_hold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    found = report(tmp_path / "config.json")
    assert found["weights"] is None and found["layers"]["mtp"] is None
    assert found["parameters"]["parts"]["mtp"]["total"] == 0 < found["parameters"]["mtp_if_present"]
    assert found["cache"]["mtp_kv_per_token_if_present"] == 256
    assert {**found, "model": ""} == {**report(tmp_path), "model": ""}
    shown = invoke(tmp_path)
    assert (
        "only the config" in shown.stdout and f"({found['parameters']['mtp_if_present']:,})" in shown.stdout
    )


@pytest.mark.parametrize("broken", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_named_and_end_with_3(tmp_path: Path, broken: str) -> None:
    held = tensors()
    norm = held.pop("model.norm.weight") if broken != "unexpected" else torch.zeros(3)
    if broken != "missing":
        held["model.norm.weight" if broken == "misshapen" else "odd.weight"] = norm[:3]
    save_checkpoint(tmp_path / "m", held.items(), TINY)
    result = invoke(tmp_path / "m", "--json")
    name = "odd.weight" if broken == "unexpected" else "model.norm.weight"
    assert result.exit_code == 3 and name in result.stderr and result.stderr.count("\n") == 1
    assert name in json.loads(result.stdout)["weights"]["problem"]
    assert "do not match the config" in invoke(tmp_path / "m").stdout


def test_a_damaged_checkpoint_ends_with_3(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", tensors().items(), TINY)
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert invoke(tmp_path / "m").exit_code == 3


def test_contexts(tmp_path: Path, machine: dict[str, int | None]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 40960}))
    found = report(tmp_path)
    assert [row["tokens"] for row in found["contexts"]] == [4096, 32768, 40960]
    assert found["longest_context"] == 40960
    (row,) = report(tmp_path, "--context", "100")["contexts"]
    fixed = found["cache"]["state"] + found["cache"]["conv"]
    assert row["cache"] == 100 * 256 + fixed
    assert row["resident"] == row["cache"] + found["resident_bfloat16"]
    assert row["read_per_token"] == 2 * found["parameters"]["active"] + 101 * 256 + 2 * fixed
    assert row["fits"] and row["spare"] == 16 * 10**9 - row["resident"]


def test_too_large_says_by_how_much(tmp_path: Path, machine: dict[str, int | None]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "vocab_size": 2**26}))
    found = report(tmp_path)
    assert not found["contexts"][0]["fits"] and found["longest_context"] == 0
    size = size_text(-found["spare_without_context"])
    assert f"{size} too large" in said(tmp_path)


def test_part_of_the_context_fits(tmp_path: Path, machine: dict[str, int | None]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    machine["total"] = report(tmp_path, "--context", "300")["contexts"][0]["resident"]
    assert report(tmp_path)["longest_context"] == 300
    assert "300 of 512 tokens of context fit" in said(tmp_path)


def test_it_judges_by_the_whole_memory_and_says_what_is_free(
    tmp_path: Path, machine: dict[str, int | None]
) -> None:
    save_checkpoint(tmp_path / "m", tensors().items(), TINY)
    machine.update(total=16 * 10**9, available=1000)
    found = report(tmp_path / "m")
    assert found["contexts"][0]["fits"] and found["fits_now"] is False
    assert "of which 1.00 kB are free now" in said(tmp_path / "m") and "To do: free some memory" in said(
        tmp_path / "m"
    )
    machine["available"] = 8 * 10**9
    assert "To do: chat with it using godwit chat" in said(tmp_path / "m")
    machine["total"] = report(tmp_path / "m", "--context", "300")["contexts"][0]["resident"]
    assert "--context 300" in said(tmp_path / "m")


def test_what_fits_only_packed_is_to_be_packed(tmp_path: Path, machine: dict[str, int | None]) -> None:
    save_checkpoint(tmp_path / "m", tensors().items(), TINY)
    machine["total"] = report(tmp_path / "m")["resident_bfloat16"]
    found = "".join(invoke(tmp_path / "m").stdout.split())  # paths break anywhere
    assert f"packitwithgodwitquantize{tmp_path / 'm'}OUT.godwit--recipeq8" in found


@pytest.mark.parametrize("large", [False, True])
def test_sixty_columns_are_enough(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    more = {"vocab_size": 2**18, "hidden_size": 4096, "num_hidden_layers": 64} if large else {}
    (tmp_path / "config.json").write_text(json.dumps(TINY | more))
    shown = invoke(tmp_path).stdout
    assert max(map(len, shown.splitlines())) <= 60 and "…" not in shown
    made = tmp_path / "packed.godwit"
    if not large:
        assert CliRunner().invoke(app, ["synth", str(tmp_path), str(made), "--recipe", "q4"]).exit_code == 0
        assert "…" not in invoke(made).stdout


def test_the_sizes_of_packed_parts_add_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    made = tmp_path / "packed.godwit"
    assert CliRunner().invoke(app, ["synth", str(tmp_path), str(made), "--recipe", "q8"]).exit_code == 0
    found = report(made)
    stored = sum(part["bytes"] for part in found["packed"]["parts"].values())
    total = next(line for line in invoke(made).stdout.splitlines() if line.strip().startswith("total"))
    assert stored == found["resident_packed"] and size_text(stored) in total


@pytest.mark.parametrize("total", [16 * 10**9, None])
def test_a_machine_that_tells_little(
    tmp_path: Path, machine: dict[str, int | None], total: int | None
) -> None:
    machine.update(total=total, available=None)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert report(tmp_path)["contexts"][0]["fits"] is (None if total is None else True)
    assert ("unknown" in invoke(tmp_path).stdout) == (total is None)


def test_a_dense_model_without_state(tmp_path: Path) -> None:
    dense = {**TINY, "model_type": "llama", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    found = report(tmp_path)
    assert found["delta"] is None and found["experts"] == 0 and found["layers"]["mtp"] == 0
    assert found["parameters"]["parts"]["head"] == {"total": 0, "active": 128 * 64}
    assert "dense feed-forward" in invoke(tmp_path).stdout


def test_a_model_without_attention_layers(tmp_path: Path) -> None:
    """Whether it has an MTP module is unknown, but there is no layer that one could copy."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "layer_types": ["linear_attention"] * 4}))
    found = report(tmp_path)
    assert found["attention"] is None and found["layers"]["delta"] == 4 and found["layers"]["mtp"] is None
    assert found["parameters"]["mtp_if_present"] is found["cache"]["mtp_kv_per_token_if_present"] is None
    assert invoke(tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (json.dumps(TINY)[:100], 3),
        ("[]", 3),
        (json.dumps({**TINY, "hidden_size": None}), 3),
        (json.dumps({**TINY, "model_type": "gpt2"}), 4),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "config.json").write_text(text)
    result = invoke(tmp_path)
    assert (result.exit_code, result.stdout) == (code, "") and result.stderr.startswith("godwit: ")


def test_without_a_model_the_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    there = {"path": str(tmp_path), "present": True, "absent_files": []}
    monkeypatch.setattr(doctor, "default_model_report", lambda: there)
    for words in ([], ["built-in"]):
        found = json.loads(CliRunner().invoke(app, ["inspect", *words, "--json"]).stdout)
        assert found["model"] == "built-in" and found["hidden_size"] == 64


def test_what_it_would_take_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "mtp_num_hidden_layers": 0}))
    monkeypatch.setattr(inspect, "memory", lambda: {"total": 10**6, "available": 10**6})
    found = report(tmp_path)["if_packed"]
    for name in ("q4", "q8"):
        made = tmp_path / name
        assert CliRunner().invoke(app, ["synth", str(tmp_path), str(made), "--recipe", name]).exit_code == 0
        packed = report(made)
        assert found[name]["resident"] == packed["resident_packed"]
        assert found[name]["spare_without_context"] == packed["spare_without_context"]
        assert found[name]["longest_context"] == packed["longest_context"]
    assert found["q4"]["resident"] < found["q8"]["resident"]
    assert "Packed as q4 it takes " in invoke(tmp_path).stdout and "if_packed" not in report(tmp_path / "q4")
    monkeypatch.setattr(inspect, "memory", lambda: {"total": 1000, "available": 1000})
    assert " too large." in said(tmp_path) and "To do: use a machine with more than" in said(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert invoke(tmp_path / "absent").exit_code == 3
    assert invoke(tmp_path).exit_code == 3
