from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import godwit
from godwit import errors
from godwit.cli.main import app
from godwit.cli.options import SamplingOptions, ThinkingOptions, parse_logit_bias

HEAVY = ["torch", "numpy", "transformers", "tokenizers", "jinja2", "huggingface_hub", "rich"]
ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.GodwitError)]


class Verb:
    """Stands in for the module of a verb: notes how it was called, and raises or prints as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.error: BaseException | None = None
        module = ModuleType(f"godwit.cli.{name}")
        vars(module)["run"] = self.run
        monkeypatch.setitem(sys.modules, f"godwit.cli.{name}", module)

    def run(self, *args: Any, **kwargs: Any) -> int:
        self.args, self.kwargs = args, kwargs
        if self.error:
            raise self.error
        print("answer")
        return 0


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Verb:
    return Verb(monkeypatch, "generate")


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_help_and_version_stay_light() -> None:
    code = f"import sys, godwit.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(
    "verb",
    [
        *("chat", "generate", "serve", "inspect", "doctor", "bench"),
        *("quantize", "calibrate", "synth", "verify", "train"),
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    assert verb in invoke("--help").stdout
    shown = invoke(verb, "--help")
    assert shown.exit_code == 0 and f"Usage: godwit {verb}" in shown.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"godwit {godwit.__version__}\n"


def test_options_reach_the_verb(generate: Verb) -> None:
    given = "generate m -p hi --raw --json --no-stream --temperature 0 --top-k 5 --top-p 0.9 --min-p 0.1 "
    given += "--repetition-penalty 1.1 --presence-penalty 1 --frequency-penalty -1 --seed 7 --max-tokens 3 "
    given += "--stop a --stop b --logit-bias 4=-2.5 --logit-bias 5=1 --threads 2 --dtype float32 "
    given += "--reasoning-effort low --thinking-budget 9 --context 64 --no-speculate"
    result = invoke(*given.split())
    assert (result.exit_code, result.stdout, result.stderr) == (0, "answer\n", "")
    assert generate.args == ()
    assert generate.kwargs == {
        "model": "m",
        "prompt": "hi",
        "raw": True,
        "system": None,
        "tools": None,
        "as_json": True,
        "stream": False,
        "logit_bias": {4: -2.5, 5: 1.0},
        "sampling": SamplingOptions(
            temperature=0.0,
            top_k=5,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            seed=7,
            max_tokens=3,
            stop=["a", "b"],
        ),
        "thinking": ThinkingOptions(reasoning_effort="low", thinking_budget=9),
        "context": 64,
        "speculate": False,
        "threads": 2,
        "dtype": "float32",
        "quantize": None,
    }


def test_nothing_asked_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Verb(monkeypatch, "chat")
    assert invoke("chat").exit_code == 0
    assert chat.kwargs["model"] is None and chat.kwargs["sampling"] == SamplingOptions()
    assert invoke("chat").exit_code == 0
    assert chat.kwargs["sampling"].stop == [] and chat.kwargs["thinking"] == ThinkingOptions()


@pytest.mark.parametrize(
    "wrong",
    [
        *("--temperature -1", "--top-p 1.5", "--max-tokens 0", "--dtype int3"),
        *("--threads 0", "--threads 100000", "--nonsense"),
    ],
)
def test_values_out_of_range_are_refused(generate: Verb, wrong: str) -> None:
    result = invoke("generate", *wrong.split())
    assert result.exit_code == 2 and result.stdout == "" and not generate.kwargs


@pytest.mark.parametrize("pair", ["", "4", "a=1", "4=", "4=x", "=1", "-1=2", "4=nan", "4=inf", "4=1=2"])
def test_logit_bias_is_a_token_and_a_number(pair: str) -> None:
    with pytest.raises(errors.UsageError, match=r"--logit-bias takes ID=VALUE"):
        parse_logit_bias([pair])


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_ours_is_one_sentence_and_its_exit_code(
    generate: Verb, kind: type[errors.GodwitError]
) -> None:
    generate.error = kind("The file is cut short; fetch it again.")
    result = invoke("generate")
    assert (result.exit_code, result.stdout) == (kind.exit_code, "")
    assert result.stderr == "godwit: The file is cut short; fetch it again.\n"


def test_an_unexpected_error_is_one_line_that_names_the_way_to_more(generate: Verb) -> None:
    generate.error = RuntimeError("first\nsecond")
    result = invoke("generate")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("godwit: unexpected RuntimeError: first second (run with --debug")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("alloc_cpu.cpp: can't allocate memory: you tried 8 bytes")]
)
def test_memory_that_runs_out(generate: Verb, error: Exception) -> None:
    generate.error = error
    result = invoke("generate")
    assert result.exit_code == errors.MemoryBudgetError.exit_code
    assert result.stderr.startswith("godwit: out of memory; ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("odd"), errors.CheckpointError("cut short")])
def test_debug_shows_where(generate: Verb, error: Exception) -> None:
    generate.error = error
    assert "Traceback" in invoke("--debug", "generate").stderr
    assert "Traceback" not in invoke("generate").stderr


def test_interrupt_ends_with_130(generate: Verb) -> None:
    generate.error = KeyboardInterrupt()
    result = invoke("generate")
    assert (result.exit_code, result.stderr) == (130, "\ngodwit: interrupted\n")


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    command = [sys.executable, "-c", "from godwit.cli.main import main; main()", "doctor", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
