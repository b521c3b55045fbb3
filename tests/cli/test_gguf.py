"""The verbs with GGUF files, which are used as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from godwit.checkpoint.packed import PackedFile
from godwit.cli.main import app
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import save_model
from tests.checkpoint.gguf.convert import Converter, make_model
from tests.checkpoint.gguf.test_reader import Blocks
from tests.checkpoint.gguf.test_tokenizer import keys_of
from tests.engine.tiny import PADDED, TEMPLATE, tokenizer_json

ANSWER = ("-p", "Hi", "--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_model("qwen3next", vocab_size=PADDED)


@pytest.fixture(scope="module")
def file(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tokenizer and template of the tiny ones."""
    keys = keys_of(tokenizer_json(), "gpt-2") | {
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": TEMPLATE,
        "general.name": "Tiny",
    }
    del keys["general.architecture"], keys["tokenizer.ggml.merges"]
    keys["tokenizer.ggml.merges"] = ["a b"]
    keys["tokenizer.ggml.tokens"][255] = "ab"
    path = tmp_path_factory.mktemp("gguf") / "tiny-BF16.gguf"
    return Converter("qwen3next", model, keys=keys).write(path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model without a tokenizer, in four parts."""
    path = tmp_path_factory.mktemp("bare") / "bare.gguf"
    model = make_model("qwen3", hidden_size=256, num_hidden_layers=1)
    q4_k, q8_0 = Blocks("Q4_K"), Blocks("Q8_0")
    return Converter(
        "qwen3", model, encode=lambda v, n: (q4_k if "attn" in n else q8_0)(v, n), split=4
    ).write(path)


def invoke(*words: str | Path, stdin: str = "") -> Any:
    return CliRunner().invoke(app, list(map(str, words)), input=stdin)


def test_an_answer_is_that_of_the_checkpoint(file: Path, model: CausalLM, tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["model"]["vocab"] = {word: id for word, id in raw["model"]["vocab"].items() if id != 255} | {
        "ab": 255
    }
    raw["model"]["merges"] = ["a b"]
    extra = {
        "tokenizer.json": json.dumps(raw).encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    save_model(model, tmp_path / "m", extra_files=extra)
    theirs, ours = (invoke("generate", path, *ANSWER) for path in (tmp_path / "m", file))
    assert (ours.exit_code, ours.stdout) == (0, theirs.stdout) and ours.stdout.strip()
    assert f"{file}: " in ours.stderr and "bf16 on" in ours.stderr


def test_a_conversation(file: Path) -> None:
    result = invoke("chat", file.parent, "--max-tokens", "4", stdin="Hi\n")
    assert result.exit_code == 0 and "context 512" in result.stderr


def test_what_a_file_is(file: Path, bare: Path) -> None:
    found = json.loads(invoke("inspect", file, "--json").stdout)
    assert found["stored"]["metadata"]["general.name"] == "Tiny"
    assert found["tokenizer"] == {"present": True, "chat_template": True, "problem": None}
    assert set(found["weights"]["dtypes"]) == {"BF16", "F32"} and found["weights"]["problem"] is None
    assert found["stored"]["parts"]["experts"]["bits"] == 16
    total = sum(part["weights"] for part in found["stored"]["parts"].values())
    assert total == found["parameters"]["total"]
    shown = " ".join(invoke("inspect", bare).stdout.split())
    assert "Q4_K" in shown and "none, so it cannot chat" in shown and "as they are loaded" in shown
    parts = json.loads(invoke("inspect", bare, "--json").stdout)["stored"]["parts"]
    assert set(parts["attention"]["types"]) == {"Q4_K", "F32"} and parts["head"]["bits"] == 8.5


def test_measuring_needs_no_tokenizer(bare: Path) -> None:
    small = ("-p", "4", "-n", "2", "-d", "0", "--repeats", "1", "--json")
    result = invoke("bench", bare, *small)
    assert result.exit_code == 0 and "q8" in json.loads(result.stdout)["formats"]
    assert "Q8_0 weights" in result.stderr and "exactly" in result.stderr and "Q4_K weights" in result.stderr
    for verb in (("chat",), ("generate", "-p", "x")):
        refused = invoke(verb[0], bare, *verb[1:])
        assert refused.exit_code == 3 and "can only be used with godwit bench" in refused.stderr


def test_packing_keeps_what_a_file_holds(file: Path, bare: Path, tmp_path: Path) -> None:
    made = invoke("quantize", bare, tmp_path / "bare.godwit", "--json")
    assert made.exit_code == 0 and "has no tokenizer" in made.stderr
    assert "packed as q8, which holds every one of them exactly" in made.stderr
    blobs = PackedFile.open(tmp_path / "bare.godwit").blobs
    assert blobs["head.weight"] == blobs["embedding.weight"] and "q8" in str(blobs["head.weight"])
    assert invoke("quantize", file, tmp_path / "q4.godwit", "--recipe", "q4", "--json").stderr == ""
    kept = invoke("quantize", file, tmp_path / "kept.godwit", "--json")
    assert kept.exit_code == 0 and json.loads(kept.stdout)["parts"]["head"]["bits"] == 16
    answers = {invoke("generate", path, *ANSWER).stdout for path in (file, tmp_path / "kept.godwit")}
    assert len(answers) == 1
    assert invoke("verify", tmp_path / "kept.godwit").exit_code == 0


def test_importances_come_from_a_file_too(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("abc " * 20)
    result = invoke("calibrate", file, text, tmp_path / "out.safetensors", "--tokens", "40")
    assert result.exit_code == 0 and "40 tokens read" in result.stdout


def test_what_cannot_be_done(file: Path, tmp_path: Path) -> None:
    refused = invoke("verify", file)
    assert refused.exit_code == 2 and "holds no checksums" in refused.stderr
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    for verb in (("inspect", cut), ("chat", cut), ("bench", cut), ("quantize", cut, tmp_path / "x.godwit")):
        refused = invoke(*verb)
        assert refused.exit_code == 3 and "cut short" in refused.stderr
        assert refused.stderr.count("\n") == 1
