from __future__ import annotations

from pathlib import Path

import pytest

from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UsageError
from godwit.shrink.recipe import BUILT_IN, QuantRecipe, tensor_blobs
from tests.engine.tiny import CONFIGS

HYBRID = ModelConfig.from_dict(CONFIGS["hybrid"])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def formats(recipe: QuantRecipe) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, blob in tensor_blobs(HYBRID, 1, recipe).items():
        if isinstance(blob, Matrix):
            found[name] = blob.format
        elif isinstance(blob, ExpertStack):
            found[f"{name}.w13"], found[f"{name}.w2"] = blob.format13, blob.format2
    return found


def test_every_parameter_has_its_place() -> None:
    blobs = tensor_blobs(HYBRID, 1, QuantRecipe.find("q4"))
    assert blobs["layers.0.mixer.conv_weight"] == Plain("F32", (64, 4))
    assert blobs["layers.0.ffn.shared_gate.weight"] == Plain("F32", (1, 32))
    assert blobs["layers.3.mixer.q_norm.weight"] == Plain("F32", (8,))
    assert blobs["layers.1.ffn.experts"] == ExpertStack("q4", "q4", 4, 32, 16)
    assert blobs["layers.3.mixer.in_proj.weight"] == Matrix("q4", (96, 32))
    assert blobs["mtp.fc.weight"] == Matrix("q4", (32, 64))
    assert not any(name.endswith((".w13", ".w2")) for name in blobs)
    tied = ModelConfig.from_dict({**CONFIGS["attention"], "tie_word_embeddings": True})
    assert "head.weight" not in tensor_blobs(tied, 0, QuantRecipe.find("q4"))


def test_built_in_recipes() -> None:
    assert set(formats(QuantRecipe.find("bf16")).values()) == {"bf16"}
    for name in ("q4", "q8"):
        found = formats(QuantRecipe.find(name))
        kept = {n for n, format in found.items() if format == "bf16"}
        assert kept == {n for n in found if "router" in n or "in_proj_ba" in n}
        assert found["embedding.weight"] == found["head.weight"] == "q8"
        assert {found[n] for n in found if n not in kept and n.split(".")[0] in ("layers", "mtp")} == {name}


def test_a_file_changes_what_it_names_the_first_match_deciding(tmp_path: Path) -> None:
    text = 'base = "q4"\n[formats]\n"layers.0.*.w2" = "q8"\n"*.experts.*" = "bf16"\n"head.weight" = "q4"\n'
    changed, plain = formats(QuantRecipe.find(str(written(tmp_path, text)))), formats(QuantRecipe.find("q4"))
    assert changed["layers.0.ffn.experts.w2"] == "q8" and changed["layers.0.ffn.experts.w13"] == "bf16"
    assert changed["layers.1.ffn.experts.w2"] == "bf16" and changed["head.weight"] == "q4"
    assert all(changed[n] == plain[n] for n in plain if ".experts." not in n and n != "head.weight")


def test_a_rule_may_reach_what_built_in_recipes_leave(tmp_path: Path) -> None:
    recipe = QuantRecipe.from_file(written(tmp_path, '[formats]\n"*.router.weight" = "q8"\n'))
    assert formats(recipe)["layers.0.ffn.router.weight"] == "q8"
    assert formats(recipe)["layers.0.mixer.in_proj_ba.weight"] == "bf16"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base = ", "TOML"),
        ('base = "q5"', "base must be one of q4, q8, bf16"),
        ("base = 4", "base must be one of"),
        ('formats = "q4"', "table"),
        ('[formats]\n"*" = "q5"', "one of bf16, q8, q4"),
        ('[formats]\n"*" = 4', "one of"),
        ('rules = "q4"', "unknown: rules"),
        ("a = " + "[" * 10000, "TOML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantRecipe.from_file(written(tmp_path, text))


@pytest.mark.parametrize("pattern", ["head.wieght", "layers.4.*", "*.norm.weight", "layers.0.ffn.experts"])
def test_rules_that_match_nothing_are_refused(tmp_path: Path, pattern: str) -> None:
    recipe = QuantRecipe.from_file(written(tmp_path, f'[formats]\n"{pattern}" = "q8"'))
    with pytest.raises(UsageError, match="no matrix of this model"):
        tensor_blobs(HYBRID, 1, recipe)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a built-in recipe"):
        QuantRecipe.find(str(tmp_path / "absent.toml"))
    assert all(QuantRecipe.find(name).rules == rules for name, rules in BUILT_IN.items())


def test_a_config_of_impossible_sizes() -> None:
    huge = ModelConfig.from_dict({**CONFIGS["attention"], "vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4,
                                  "intermediate_size": 2**31 - 1, "head_dim": 8})  # fmt: skip
    with pytest.raises(CheckpointError, match="too large"):
        tensor_blobs(huge, 0, QuantRecipe.find("q4"))
