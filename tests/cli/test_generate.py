from __future__ import annotations

import datetime
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from godwit.cli import common, doctor
from godwit.cli.generate import write
from godwit.cli.main import app
from godwit.cli.options import SamplingOptions
from godwit.engine import Piece, SamplingParams
from godwit.errors import CheckpointError, UsageError
from godwit.models.recipe import QuantRecipe
from godwit.shrink.quantize import quantize_checkpoint
from godwit.text import trial
from godwit.worker import Worker
from tests.cli.conftest import Models
from tests.engine.tiny import CALL


def invoke(*args: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, ["generate", *args], input=stdin)


def answer(*args: str, stdin: str = "") -> str:
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(models: Models) -> None:
    result = invoke(models("hello"), "-p", "Hi")
    assert (result.exit_code, result.stdout) == (0, "Hello there.\n")
    assert "float32 weights are packed as bf16, which holds every one of them exactly\n" in result.stderr
    assert "M parameters, bf16 on " in result.stderr and " kernels, context 4096, " in result.stderr


def test_the_prompt_may_come_on_stdin_and_the_answer_at_once(models: Models) -> None:
    assert answer(models("hello"), stdin="Hi\n") == "Hello there.\n"
    assert answer(models("hello"), "--no-stream", stdin="Hi") == "Hello there.\n"


def test_raw_continues_a_text(models: Models) -> None:
    assert answer(models("hello"), "--raw", stdin="Say\n\n") == "Hello there.\n"
    assert "no chat template" in invoke(models("hello", template=None), "-p", "x").stderr
    assert answer(models("hello", template=None), "--raw", "-p", "Say\n") == "Hello there.\n"


def test_json_is_one_object(models: Models) -> None:
    result = json.loads(answer(models("tool"), "--json", "-p", "Time?", "--seed", "5"))
    assert result["tool_calls"] == [CALL] and result["text"] == "" and result["thinking"] == ""
    assert result["finish_reason"] == "stop" and result["seed"] == 5 and result["model"] == models("tool")
    assert result["completion_tokens"] == 4 and result["cached_tokens"] == 0 and result["prompt_tokens"] > 10
    timings = result["timings"]
    assert set(timings) == {
        f"{stage}_{what}" for stage in ("prefill", "decode") for what in ("seconds", "tokens_per_second")
    }
    assert all(value > 0 for value in timings.values())


def test_json_takes_thinking_apart_and_raw_does_not(models: Models) -> None:
    result = json.loads(answer(models("thinking"), "--json", "-p", "Well?"))
    assert (result["text"], result["thinking"]) == ("Yes.", "hm")
    result = json.loads(answer(models("thinking"), "--json", "--raw", "-p", "Well?\n"))
    assert (result["text"], result["thinking"]) == ("<think>hm</think>Yes.", "")
    assert answer(models("thinking"), "-p", "Well?") == "<think>hm</think>Yes.\n"


def test_thinking_has_a_budget(models: Models) -> None:
    opened = "<think>\n{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    model = models("endless", template=opened)
    close = ("--thinking-budget", "4", "--thinking-budget-message", "Enough.", "--max-tokens", "60")
    result = json.loads(answer(model, "--json", "-p", "Well?", *close))
    assert result["thinking"] == "la " * 36 + "\nEnough." and result["text"].startswith("la la")
    assert result["thinking_ended"] == "budget" and result["thinking_tokens"] == 36 + len("\nEnough.\n")
    result = json.loads(answer(model, "--json", "-p", "Well?", "--max-tokens", "60"))
    assert (result["thinking_ended"], result["thinking_tokens"], result["text"]) == (None, 60, "")
    longer = json.loads(
        answer(model, "--json", "-p", "Well?", "--reasoning-effort", "high", "--max-tokens", "1")
    )
    assert longer["prompt_tokens"] == result["prompt_tokens"] + len("xhigh")
    refused = invoke(model, "--raw", "-p", "x", "--thinking-budget", "4")
    assert refused.exit_code == 2 and "--raw" in refused.stderr
    refused = invoke(model, "-p", "x", "--thinking-budget-message", "</think>")
    assert refused.exit_code == 2 and "message" in refused.stderr


def test_ends(models: Models) -> None:
    result = json.loads(answer(models("endless"), "--json", "-p", "Sing", "--max-tokens", "3"))
    assert (result["text"], result["finish_reason"]) == ("la la la ", "length")
    assert answer(models("hello"), "-p", "x", "--stop", "here") == "Hello t\n"
    assert answer(models("endless"), "-p", "Sing", "--max-tokens", "2", "--stop", "a l") == "l\n"


def test_there_is_one_line_break_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    for texts in (["a", "b"], ["a", "b\n"], ["a\nb"]):
        for at_once in (False, True):
            write([Piece(text) for text in texts], at_once=at_once)
            assert capsys.readouterr().out == "".join(texts).removesuffix("\n") + "\n"
    write([], at_once=False)
    assert capsys.readouterr().out == "\n"


def test_lengths_are_checked_before_weights_are_read(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(common, "load_weights", refuse)
    monkeypatch.setattr(common, "memory", lambda: {"total": 2**40, "available": 2**40})
    result = invoke(models("hello"), "-p", "x", "--context", "4097")
    assert result.exit_code == 2 and "at most 4096 tokens" in result.stderr
    result = invoke(models("hello"), "-p", "x " * 30, "--context", "20")
    assert result.exit_code == 2 and "raise --context (at most 4096)" in result.stderr
    monkeypatch.setattr(common, "DEFAULT_CONTEXT", 32)
    result = invoke(models("hello"), "-p", "x " * 30)
    assert result.exit_code == 2 and "the context 32, which leaves no room" in result.stderr
    monkeypatch.setattr(common, "memory", lambda: {"total": 1000, "available": 1000})
    result = invoke(models("hello"), "-p", "x", "--context", "4096")
    assert result.exit_code == 5 and "GiB of memory are free; use fewer tokens" in result.stderr


def test_a_context_that_is_asked_for_is_taken_and_shown(models: Models) -> None:
    result = invoke(models("hello"), "-p", "Hi", "--context", "64")
    assert (result.exit_code, result.stdout) == (0, "Hello there.\n")
    assert "context 64 of 4096 (--context), " in result.stderr
    finish = json.loads(answer(models("endless"), "--json", "-p", "Sing", "--context", "40"))
    assert finish["finish_reason"] == "length"
    assert finish["prompt_tokens"] + finish["completion_tokens"] == 40


def test_a_seed_repeats_an_answer(models: Models) -> None:
    # after a letter all tokens are equally likely
    texts = [
        answer(models("hello"), "--raw", "-p", "x", "--max-tokens", "8", "--seed", seed)
        for seed in ("3", "3", "4")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_logit_bias(models: Models) -> None:
    hello, letter = "263", "41"
    assert answer(models("hello"), "-p", "x", "--max-tokens", "1", "--logit-bias", f"{letter}=1000") == "J\n"
    banned = answer(models("hello"), "-p", "x", "--max-tokens", "1", "--logit-bias", f"{hello}=-inf")
    assert not banned.startswith("Hello")
    assert "names token 999999" in invoke(models("hello"), "-p", "x", "--logit-bias", "999999=1").stderr


def test_system_and_tools_reach_the_prompt(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "f", "parameters": {}}]))

    def length(*more: str) -> int:
        return int(json.loads(answer(models("hello"), "--json", "-p", "x", *more))["prompt_tokens"])

    plain = length()
    assert length("--system", "abc") == plain + len("<system\nabc>\n") == length("--system", "abc")
    assert length("--system", "") == plain
    wrapped = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert length("--tools", str(file)) == plain + len("<system\n>\n") + len(wrapped)


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["-p", " "], 2, "the prompt is empty"),
        (["-p", "x", "--raw", "--system", "s"], 2, "--raw cannot be combined with"),
        (["-p", "x", "--frequency-penalty", "inf"], 2, "frequency_penalty has to be a number"),
        (["-p", "x", "--presence-penalty", "nan"], 2, "presence_penalty has to be a number"),
        (["-p", "x" * 5000], 2, "tokens and the context 4096"),
        (["-p", "x", "--tools", "/nowhere"], 2, "/nowhere: cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    models: Models, args: list[str], code: int, sentence: str
) -> None:
    result = invoke(models("hello"), *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in result.stderr and "Traceback" not in result.stderr


def test_no_such_model(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "absent"), "-p", "x")
    assert result.exit_code == 3 and "no such directory" in result.stderr


# the built-in model


def report(path: str, *absent: str) -> dict[str, Any]:
    return {"path": path, "present": not absent, "absent_files": list(absent)}


def test_without_a_built_in_model_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "default_model_report", lambda: report("/there", "config.json"))
    result = invoke("-p", "x")
    assert result.exit_code == 3
    assert "/there lacks config.json" in result.stderr and "organisation/name" in result.stderr


def test_the_built_in_model_knows_its_name_and_the_date(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "default_model_report", lambda: report(models("hello")))
    opened = common.open_model(None)
    today = datetime.date.today()
    possible = [today, today + datetime.timedelta(days=1)]
    assert opened.system(None) in [
        f"You are Godwit, a helpful assistant. Today is {day:%Y-%m-%d}." for day in possible
    ]
    assert opened.system("Be brief.") == "Be brief." and opened.system("") is None
    assert common.open_model(models("hello")).system(None) is None
    assert json.loads(answer("--json", "-p", "x"))["model"] == "built-in"


def test_the_built_in_model_has_a_name(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "default_model_report", lambda: report(models("hello")))
    monkeypatch.chdir(tmp_path)
    for words in ((), ("built-in",)):
        assert json.loads(answer(*words, "--json", "-p", "x"))["model"] == "built-in"
    assert common.open_model("built-in").system(None) == common.open_model(None).system(None)
    Path("built-in").mkdir()  # what is there goes first
    assert invoke("built-in", "-p", "x").exit_code == 3


def test_a_broken_tokenizer_inside_a_packed_file(models: Models, tmp_path: Path) -> None:
    source = shutil.copytree(models("hello"), tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    quantize_checkpoint(source, tmp_path / "m.godwit", QuantRecipe.find("q8"))
    result = invoke(str(tmp_path / "m.godwit"), "-p", "x")
    assert result.exit_code == 3 and f"{tmp_path}/m.godwit/tokenizer.json is not valid" in result.stderr


# settings


@pytest.mark.parametrize(
    ("file", "asked", "wanted"),
    [
        ({}, {}, SamplingParams(temperature=0.7, top_p=0.9)),
        ({"temperature": 0.6, "top_k": 20.0}, {}, SamplingParams(temperature=0.6, top_k=20)),
        ({"temperature": 0.6}, {"temperature": 0.0, "seed": 3}, SamplingParams(temperature=0, seed=3)),
        ({"do_sample": False, "temperature": 0.6}, {}, SamplingParams(temperature=0)),
        ({"do_sample": False}, {"temperature": 1.0}, SamplingParams()),
        ({"max_new_tokens": 9, "top_p": 0.5}, {}, SamplingParams(max_tokens=9, top_p=0.5)),
        ({"repetition_penalty": 1.1}, {}, SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1)),
    ],
)
def test_the_user_comes_before_the_model_and_the_model_before_us(
    file: dict[str, Any], asked: dict[str, Any], wanted: SamplingParams
) -> None:
    assert common.sampling_params(SamplingOptions(**asked), file) == wanted


def test_wrong_settings_of_a_model_are_not_blamed_on_the_user() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature"):
        common.sampling_params(SamplingOptions(), {"temperature": math.nan})
    with pytest.raises(UsageError, match="temperature has to"):
        common.sampling_params(SamplingOptions(temperature=math.inf), {"temperature": 0.5})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "must be a list of tools"),
        ("[{}]", "tool 1 has no name"),
        ('[{"name": "f"}, {"function": {"name": ""}}]', "tool 2 has no name"),
        ('[{"function": 3}]', "tool 1 has no name"),
    ],
)
def test_tools_that_are_none(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=sentence):
        common.read_tools(file)


def test_tools_may_be_wrapped(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    tool = {"type": "function", "function": {"name": "f"}}
    for content in ([tool], {"tools": [tool]}, [{"name": "f"}]):
        file.write_text(json.dumps(content))
        assert common.read_tools(file) == [tool]


def test_the_context_fits_the_memory(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("hello", max_position=100_000)
    for free, context in ((1 << 40, 16384), (None, 16384), (1 << 22, None)):
        monkeypatch.setattr(common, "memory", lambda free=free: {"total": None, "available": free})
        result = invoke(model, "-p", "x", "--dtype", "float32")
        assert result.stdout == "Hello there.\n"
        chosen = int(result.stderr.split("context ")[1].split(" of 100000")[0])
        assert chosen == context if context else 512 <= chosen < 16384
    monkeypatch.setattr(common, "memory", lambda: {"total": None, "available": 1000})
    result = invoke(model, "-p", "x", "--dtype", "float32")
    assert result.exit_code == 5 and "512 tokens of context take" in result.stderr


def test_as_a_program(models: Models) -> None:
    command = [sys.executable, "-c", "from godwit.cli.main import main; main()", "generate", models("hello")]
    done = subprocess.run(command, input=b"caf\xe9?\n", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"Hello there.\n")


def test_only_the_built_in_tokenizer_is_not_tried_first(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def ask(*args: object) -> dict[str, str]:
        tried.append(args)
        return {}

    monkeypatch.setattr(Worker, "ask", ask)
    monkeypatch.setattr(trial, "_passed", set())
    for name in (None, "built-in"):
        common.open_model(name)
    assert not tried
    common.open_model(models("hello"))
    common.open_model(str(common.built_in()))
    assert len(tried) == 2
