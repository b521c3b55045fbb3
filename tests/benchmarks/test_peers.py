from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.gguf_model import token_bytes
from benchmarks.peer_worker import Case
from benchmarks.peers import BEGIN, END, Entrant, compare, insert_table, table
from godwit.shrink.synth import synthesize
from tests.engine.tiny import CONFIGS

FAKE = """
import json, sys
speed = float(sys.argv[1])
about = {"version": f"fake {speed:g}", "weights": "none", "weight_bytes_per_token": 1e6}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["kind"] == "memory":
        reply = {"peak": 5_000_000_000, "proportional": 4_000_000_000}
    elif asked["tokens"] == 666:
        sys.exit(3)
    else:
        open(sys.argv[2], "a").write(f"{speed:g} {asked['kind']} {asked['tokens']}\\n")
        reply = {"seconds": asked["tokens"] * asked["batch"] / speed}
    print(json.dumps(reply), flush=True)
"""
CASES = [Case("prefill", 100), Case("decode", 10, 64, 1), Case("decode", 10, 0, 4)]


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REST", 0.0)
    monkeypatch.setattr(peers, "measure_ceilings", lambda num_bytes: ceilings(1 << 20))


def ceilings(num_bytes: int) -> Any:
    from godwit.measure.ceilings import measure_ceilings

    return measure_ceilings(num_bytes, 0.0)


def fake(tmp_path: Path, speed: float, token_bytes: float | None = None) -> Entrant:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    command = (sys.executable, str(script), str(speed), str(tmp_path / "log"))
    return Entrant("fake", "Q5", command, token_bytes)


def result(tmp_path: Path) -> dict[str, Any]:
    row = compare([fake(tmp_path, 100.0), fake(tmp_path, 50.0, 7e6)], CASES, repeats=3)
    return {
        **row,
        "command": "python benchmarks/peers.py run",
        "date": "2026-01-02",
        "commit": "0123456789abcdef",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory": 1},
        "model": {"shape": "Qwen3-Next-80B-A3B", "layers": 8},
        "repeats": 3,
        "threads": 2,
    }


def test_engines_take_turns_and_their_speeds_come_out(tmp_path: Path) -> None:
    row = result(tmp_path)
    assert [engine["name"] for engine in row["engines"]] == ["fake 100, Q5", "fake 50, Q5"]
    assert [engine["weight_bytes_per_token"] for engine in row["engines"]] == [1e6, 7e6]
    for engine, speed in zip(row["engines"], (100.0, 50.0), strict=True):
        for case in engine["cases"]:
            assert case["tokens_per_second"]["median"] == pytest.approx(speed)
    lines = (tmp_path / "log").read_text().splitlines()
    warm, timed = lines[:6], lines[6:]
    assert [line.split()[0] for line in warm] == ["100", "50"] * 3
    assert [line.split()[0] for line in timed] == [*["100", "50"] * 3, *["50", "100"] * 3, *["100", "50"] * 3]
    assert [line.split(" ", 1)[1] for line in timed[:6:2]] == ["prefill 100", "decode 10", "decode 10"]
    assert row["ceilings"]["read_bandwidth"]["median"] > 0


def test_the_table_has_a_line_for_each_engine(tmp_path: Path) -> None:
    row = {**result(tmp_path), "warnings": ["it was loud"]}
    text = table(row)
    head, rule, first, second, *_ = text.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "engine, weights", "bytes a token", "prefill 100", "decode at 64", "decode at 0, 4 at once", "memory",
    ]  # fmt: skip
    assert rule.count("|") == head.count("|") == first.count("|") == second.count("|")
    assert "| fake 100, Q5 | 1 MB | 100 (100 to 100) |" in first and "| 4.0 GB |" in first
    assert "| fake 50, Q5 | 7 MB | 50.0 (50.0 to 50.0) |" in second
    for words in ("medians of 3 rounds", "8 of 48 layers", "2 threads on 2 cores of Some CPU", "2026-01-02"):
        assert words in text
    assert "Note that it was loud." in text and "commit 0123456789ab." in text


def test_the_table_goes_between_the_markers() -> None:
    before = f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    once = insert_table(before, "| new |")
    assert once == f"# Title\n\n{BEGIN}\n| new |\n{END}\n\nmore\n"
    assert insert_table(once, "| new |") == once
    assert insert_table(f"{BEGIN}{END}", "x") == f"{BEGIN}\nx\n{END}"


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_markers_that_are_not_there(text: str) -> None:
    with pytest.raises(ValueError, match="the file must have"):
        insert_table(text, "x")


def test_rows_become_a_readme(tmp_path: Path) -> None:
    rows = tmp_path / "row.json"
    rows.write_text(json.dumps(result(tmp_path)))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    line = [sys.executable, peers.__file__, "table", str(rows), "--readme", str(readme)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("| engine, weights |")
    assert readme.read_text() == f"before\n{BEGIN}\n{done.stdout}{END}\nafter\n"


def test_an_engine_that_ends_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        compare([fake(tmp_path, 1.0)], [Case("prefill", 666)], repeats=1)


def arguments(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    fields = {
        "dir": tmp_path, "layers": 4, "engines": "godwit", "format": "q4", "gguf": "q4_0",
        "llama_python": None, "threads": 1, "chunk": 64,
        "prompts": "16,0", "depths": "0,32", "batches": "1,4", "new_tokens": 2,
    }  # fmt: skip
    return argparse.Namespace(**{**fields, **changes})


def test_the_cases_of_a_command_line(tmp_path: Path) -> None:
    assert peers.make_cases(arguments(tmp_path)) == [
        Case("prefill", 16), Case("decode", 2, 0), Case("decode", 2, 32), Case("decode", 2, 0, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engines": "llama.cpp"}, "needs --llama-python"),
        ({"engines": "vllm"}, "unknown engine vllm"),
        ({"layers": 6}, "must be a multiple of 4"),
        ({"engines": "llama.cpp", "llama_python": "x", "gguf": "q9"}, "q9: must be one of q4_0"),
    ],
)
def test_engines_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        peers.make_entrants(arguments(tmp_path, **changes))


def test_entrants_have_models_of_the_same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("godwit.shrink.synth.synthesize", lambda raw, file, **kw: made.append(str(file)))
    monkeypatch.setattr("subprocess.run", lambda line, check: made.append(line[3]))
    everything = arguments(
        tmp_path, engines="godwit,llama.cpp,transformers", gguf="q4_0,q4_k_m", llama_python="py"
    )
    found = peers.make_entrants(everything)
    assert [entrant.engine for entrant in found] == ["godwit", "llama.cpp", "llama.cpp", "transformers"]
    assert [Path(file).name for file in made] == ["godwit-q4-4.godwit", "q4_0-4.gguf", "q4_k_m-4.gguf"]
    config = json.loads((tmp_path / "shape-4" / "config.json").read_text())
    assert config == {**peers.QWEN3_NEXT, "num_hidden_layers": 4}
    assert found[1].token_bytes == token_bytes(config, "q4_0")
    assert found[1].command[0] == "py" and found[0].command[0] == sys.executable


def test_bytes_of_a_token_in_bfloat16() -> None:
    whole = peers.token_bytes_bf16(peers.QWEN3_NEXT)
    assert whole == 2 * 3_563_764_480


@pytest.mark.parametrize("engine", ["godwit", "transformers"])
def test_engines_of_this_environment_answer(engine: str, tmp_path: Path) -> None:
    config = {**CONFIGS["hybrid"], "architectures": ["Qwen3NextForCausalLM"], "rope_theta": 1e4}
    del config["mtp_num_hidden_layers"]
    model = tmp_path / "shape"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    if engine == "godwit":
        model = tmp_path / "model.godwit"
        synthesize(config, model, format="q4")
    script = str(peers.HERE / "peer_worker.py")
    entrant = Entrant(
        engine, "", (sys.executable, script, engine, str(model), "--threads", "1", "--chunk", "16")
    )
    cases = [Case("prefill", 20), Case("decode", 2, 24, 2), Case("decode", 2)]
    with peers.worker(entrant, cases) as worker:
        assert worker.name.startswith(engine) and worker.about["weights"]
        for case in cases:
            first, second = (worker.ask(asdict(case))["seconds"] for _ in range(2))
            assert 0 < first < math.inf and 0 < second < math.inf
        assert worker.ask({"kind": "memory"}).keys() == {"peak", "proportional"}
    assert worker.process.returncode == 0
