from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from godwit.cli import common, doctor
from godwit.cli.chat import TerminalChat, save_text
from godwit.cli.main import app
from godwit.cli.terminal import Terminal, harmless
from godwit.engine import SamplingParams
from godwit.errors import UsageError
from tests.cli.conftest import CALLS, Models
from tests.cli.console import Console
from tests.engine.tiny import CALL

FUNCTION = {"name": "get_time", "parameters": {"type": "object", "properties": {}}}
CALL_MESSAGE = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL}],
}


#: As Qwen's templates do: thinking is opened in the prompt, and that of earlier turns is left out.
THINKING = """
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""


def talk(*lines: str, args: list[str]) -> Any:
    """A chat with piped input."""
    result = CliRunner().invoke(app, ["chat", *args], input="".join(line + "\n" for line in lines))
    assert result.exit_code == 0, result.stderr
    return result


def saved(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "talk.json"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([FUNCTION]))
    return path


# without a terminal


def test_thinking_has_a_budget(models: Models, file: Path) -> None:
    model = models("hello", template="<think>\n")
    args = [model, "--thinking-budget", "0", "--thinking-budget-message", "So."]
    talk("Well?", f"/save {file}", args=args)
    message = saved(file)["messages"][-1]
    assert (message["content"], message["reasoning_content"]) == ("Hello there.", "So.")


def test_each_line_is_answered_on_stdout(models: Models) -> None:
    result = talk("Hi", "", "  ", "Again", args=[models("hello")])
    assert result.stdout == "Hello there.\nHello there.\n"
    assert "> " not in result.stderr and "\x1b" not in result.stdout + result.stderr


def test_no_input_is_no_error(models: Models) -> None:
    assert talk(args=[models("hello")]).stdout == ""


def test_the_numbers_tell_what_was_reused(models: Models) -> None:
    lines = talk("Hi", "Ho", args=[models("hello")]).stderr.splitlines()[2:]
    # <|im_start|> and "user\n", the text, <|im_end|>, "\n", <|im_start|>, "assistant\n"
    prompt = 1 + 5 + 2 + 2 + 1 + 10
    number = r"\d+(\.\d)?"
    assert re.fullmatch(
        rf"{prompt} prompt tokens \(0 cached\), {number} tok/s; 3 generated, {number} tok/s", lines[0]
    )
    # of the first answer all but its <|im_end|> are in the caches
    assert f"{2 * prompt + 2 + 2} prompt tokens ({prompt + 2} cached)" in lines[1]


def test_messages_of_several_lines(models: Models, file: Path) -> None:
    lines = ["a\\", "b\\", "c", '"""', "/reset is text here", "", 'end"""', '  """one line"""', "x\\"]
    talk(*lines, f"/save {file}", args=[models("hello")])
    # the last line went on into the command
    assert not file.exists()
    talk(*lines[:-1], f"/save {file}", args=[models("hello")])
    texts = [message["content"] for message in saved(file)["messages"] if message["role"] == "user"]
    assert texts == ["a\nb\nc", "/reset is text here\n\nend", "one line"]


def test_a_block_may_end_with_the_input(models: Models) -> None:
    assert talk('"""never', "closed", args=[models("hello")]).stdout == "Hello there.\n"
    assert talk("goes on\\", args=[models("hello")]).stdout == "Hello there.\n"


def test_save_writes_what_was_said(models: Models, file: Path, tools: Path) -> None:
    name = models("hello")
    talk("Hi", f"/save {file}", args=[name, "--system", "Be brief.", "--tools", str(tools)])
    assert saved(file) == {
        "model": name,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello there."},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
    }
    assert [path.name for path in file.parent.iterdir() if path != tools] == ["talk.json"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, models: Models) -> None:
    result = talk("/save", f"/save {tmp_path}", "/save /nowhere/x", args=[models("hello")])
    assert "give a file name" in result.stderr and "/nowhere/x: cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old"
    old.write_text("old")
    with pytest.raises(TypeError):
        save_text(old, 3)  # type: ignore[arg-type]
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]
    with pytest.raises(UsageError):
        save_text(tmp_path, "x")
    assert list(tmp_path.iterdir()) == [old]


def test_commands(models: Models, file: Path, tools: Path) -> None:
    result = talk(
        "/help", "/nonsense x", "/regenerate", "/system", "/system Be kind.", "/tools", f"/tools {tools}",
        "/tools /nowhere", "Hi", "/regenerate", f"/save {file}", "/reset", "/system -", "/tools -",
        f"/save {file}2", "/quit", "never read", args=[models("hello")],
    )  # fmt: skip
    for sentence in (
        "/save FILE     write the conversation",
        "unknown command /nonsense; see /help",
        "there is no message to answer yet",
        "No system message.",
        "The system message: Be kind.",
        "No tools.",
        "Tools: get_time",
        "/nowhere: cannot be read",
        "Conversation reset.",
    ):
        assert sentence in result.stderr
    assert result.stdout == "Hello there.\n" * 2
    roles = [message["role"] for message in saved(file)["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert saved(Path(f"{file}2")) == {"model": models("hello"), "messages": [], "tools": []}


def test_a_reset_begins_anew(models: Models) -> None:
    result = talk("Hi", "/reset", "Hi", args=[models("hello")])
    assert result.stderr.count("21 prompt tokens (0 cached)") == 2


def test_answers_differ_in_their_seed_but_a_talk_can_be_repeated(models: Models) -> None:
    args = [models("hello"), "--seed", "7", "--max-tokens", "12", "--system", "s"]
    unclear = ["--temperature", "100"]
    first = talk("Hi", "/regenerate", args=[*args, *unclear]).stdout
    assert talk("Hi", "/regenerate", args=[*args, *unclear]).stdout == first
    answers = first.split("\n", 1)
    assert answers[0] != answers[1].rstrip("\n")


# tools and thinking


def test_a_call_is_shown_and_its_result_asked_for(models: Models, file: Path, tools: Path) -> None:
    result = talk("Time?", '{"time": "10:04"}', f"/save {file}", args=[models("tool"), "--tools", str(tools)])
    assert result.stdout == 'call get_time {"city": "Oslo"}\nDone.\n'
    assert saved(file)["messages"] == [
        {"role": "user", "content": "Time?"},
        CALL_MESSAGE,
        {"role": "tool", "name": "get_time", "content": '{"time": "10:04"}'},
        {"role": "assistant", "content": "Done."},
    ]


def test_an_empty_result_is_success(models: Models, file: Path) -> None:
    talk("Time?", "", f"/save {file}", args=[models("tool")])
    assert saved(file)["messages"][2]["content"] == '{"success": true}'


def test_the_input_may_end_at_a_result(models: Models) -> None:
    assert talk("Time?", args=[models("tool")]).stdout == 'call get_time {"city": "Oslo"}\n'


def test_a_call_that_is_cut_off_is_not_asked_about(models: Models, file: Path) -> None:
    result = talk("Time?", f"/save {file}", args=[models("tool"), "--max-tokens", "1"])
    assert result.stdout == "<tool_call>\n"
    assert saved(file)["messages"][1]["content"] == "<tool_call>"


def test_a_stopped_answer_asks_for_no_results(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Time?\nno result\n"))
    with common.open_model(models("tool")).start(threads=1, dtype="float32") as responder:
        monkeypatch.setattr(Terminal, "call", lambda self, name, arguments: responder.cancel())
        chat = TerminalChat(responder, SamplingParams(), Terminal(), name="tool")
        chat.talk()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1] == CALL_MESSAGE


def test_thinking_is_no_part_of_the_answer(models: Models, file: Path) -> None:
    result = talk("Well?", f"/save {file}", args=[models("thinking")])
    assert result.stdout == "Yes.\n" and result.stderr.splitlines()[2] == "hm"
    assert saved(file)["messages"][1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}


HEAD = """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') }}
    {%- for call in m.tool_calls or [] %}{% set f = call.function %}{{ CALL }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ TOOLS }}{% endif %}
{{- '<|im_start|>assistant' ~ (':' if messages[-1].role == 'tool' else '\\n') }}"""


@pytest.mark.parametrize("dialect", ["hermes", "xml", "llama", "mistral", "mistral_args"])
def test_calls_of_every_dialect_make_a_round_trip(
    models: Models, file: Path, tools: Path, dialect: str
) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools.write_text(json.dumps([{"name": "get_time", "parameters": city}]))
    told, written, _ = CALLS[dialect]
    model = models(dialect, template=HEAD.replace("{{ CALL }}", written).replace("{{ TOOLS }}", told))
    result = talk("Time?", "10:04", f"/save {file}", args=[model, "--tools", str(tools)])
    assert result.stdout == 'call get_time {"city": "Oslo"}\nDone.\n'
    assert saved(file)["messages"] == [
        {"role": "user", "content": "Time?"},
        CALL_MESSAGE,
        {"role": "tool", "name": "get_time", "content": "10:04"},
        {"role": "assistant", "content": "Done."},
    ]
    report = json.loads(
        CliRunner()
        .invoke(app, ["generate", model, "--tools", str(tools), "--json", "-p", "Time?"])
        .stdout.splitlines()[-1]
    )
    assert report["tool_calls"] == [CALL] and report["text"] == "" and report["finish_reason"] == "stop"


def test_a_template_for_single_calls_ends_the_answer_with_the_first(models: Models, file: Path) -> None:
    told, written, _ = CALLS["hermes"]
    single = "{% if false %}{{ raise_exception('This model only supports single tool-calls') }}{% endif %}"
    model = models(
        "calls", template=HEAD.replace("{{ CALL }}", written).replace("{{ TOOLS }}", told) + single
    )
    result = talk("Time?", "10:04", f"/save {file}", args=[model, "--max-tokens", "60"])
    assert result.stdout == 'call get_time {"city": "Oslo"}\nDone.\n'
    assert "stopped" not in result.stderr
    assert saved(file)["messages"][1] == CALL_MESSAGE


def test_a_turn_after_thinking_reuses_the_prompt_before(models: Models) -> None:
    model = models("thinking_aloud", template=THINKING)
    result = talk("x" * 300, "Ho", args=[model])
    shown = [line for line in result.stderr.splitlines() if "prompt tokens" in line]
    assert result.stdout == "Yes.\nYes.\n" and result.stderr.count("hm\n") == 2
    # <|im_start|>, "user\n", the text, <|im_end|>, "\n", <|im_start|>, "assistant\n"; then <think>, "\n"
    prompt = 1 + 5 + 300 + 2 + 1 + 10
    assert shown[0].startswith(f"{prompt + 2} prompt tokens (0 cached)")
    assert f"({prompt} cached)" in shown[1]


# what goes wrong


def test_a_fault_of_the_engine_ends_the_chat(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("godwit.engine.runner.ModelRunner.run", broken)
    result = CliRunner().invoke(app, ["chat", models("hello")], input="Hi\n")
    assert result.exit_code == 1 and result.stdout == ""
    assert "godwit: unexpected RuntimeError: the roof fell in" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setattr("godwit.engine.runner.ModelRunner.run", _no_memory)
    result = CliRunner().invoke(app, ["chat", models("hello")], input="Hi\n")
    assert result.exit_code == 5 and "godwit: out of memory" in result.stderr


def _no_memory(*args: Any) -> None:
    raise MemoryError


def test_an_error_ends_the_answer_and_not_the_chat(models: Models, file: Path) -> None:
    result = talk("Hi", "x" * 5000, "Ho", f"/save {file}", args=[models("hello")])
    assert result.stdout == "Hello there.\n" * 2
    assert "and the context 4096, which leaves no room" in result.stderr and "/reset forgets" in result.stderr
    texts = [message["content"] for message in saved(file)["messages"]]
    assert texts == ["Hi", "Hello there.", "Ho", "Hello there."]


def test_a_full_context_is_said(models: Models) -> None:
    result = talk("Sing", args=[models("endless", max_position=64)])
    assert "cut off at the length limit" in result.stderr


def test_models_that_cannot_talk(models: Models) -> None:
    result = CliRunner().invoke(app, ["chat", models("hello", template=None)])
    assert result.exit_code == 7 and "godwit generate --raw" in result.stderr


def test_the_built_in_model_is_told_the_date(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"path": models("hello"), "present": True, "absent_files": []}
    monkeypatch.setattr(doctor, "default_model_report", lambda: report)
    talk(f"/save {file}", args=[])
    (message,) = saved(file)["messages"]
    assert re.fullmatch(
        r"You are Godwit, a helpful assistant\. Today is \d{4}-\d\d-\d\d\.", message["content"]
    )


def test_parts_of_an_answer_stand_on_their_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for _ in range(2):
        terminal.begin_answer()
        for text in ("\n", "\nhm", ".\n\n"):
            terminal.part("thinking", text)
        for text in ("\n", "\nYes\n", "\nand no"):
            terminal.part("text", text)
        terminal.call("f", {})
        terminal.part("text", "\nEnd")
        terminal.end_line()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("Yes\n\nand no\ncall f {}\nEnd\n" * 2, "hm.\n\n" * 2)
    terminal.begin_answer()
    terminal.part("text", "\nas it is")
    assert capsys.readouterr().out == "\nas it is"


def test_a_model_cannot_steer_the_terminal() -> None:
    assert harmless("a\x1b[31m\tb\r\n\x9b\x7f") == "a\ufffd[31m\tb\ufffd\n\ufffd\ufffd"


def test_input_that_is_not_text_is_read_all_the_same(models: Models) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from godwit.cli.main import main; main()", "chat", models("hello")],
        input=b"caf\xe9\nHo\n",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"Hello there.\nHello there.\n")


# in a terminal


@pytest.fixture
def console() -> Iterator[list[Console]]:
    opened: list[Console] = []
    yield opened
    for one in opened:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.close()


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    models: Models, console: list[Console], file: Path
) -> None:
    terminal = Console("chat", models("endless", max_position=100_000))
    console.append(terminal)
    terminal.expect("> ")
    terminal.type("Sing\n")
    terminal.expect("la la la ")
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect("> ")
    terminal.type(f"/save {file}\n")
    terminal.expect("Saved 2 messages to")
    song = saved(file)["messages"][1]
    assert song["role"] == "assistant" and song["content"].startswith("la la la ")
    terminal.expect("> ")
    terminal.type("More\n")
    terminal.expect("la la ")
    terminal.type("\x03")
    # what was sung before Ctrl-C is read from the caches, but for the last token
    words = song["content"].count("la ")
    assert f"({22 + words} cached)" in terminal.expect("stopped")
    terminal.expect("> ")
    terminal.interrupt("Press Ctrl-C again or Ctrl-D to end the chat.")
    terminal.type("/tools\n")
    terminal.expect("No tools.")
    terminal.expect("> ")
    terminal.interrupt("Ctrl-C again")
    terminal.expect("> ")
    terminal.interrupt("\n")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.all


def test_a_talk_in_a_terminal(models: Models, console: list[Console], file: Path) -> None:
    terminal = Console("chat", models("tool"), TERM="xterm")
    console.append(terminal)
    terminal.expect("/help for commands")
    terminal.expect("> ")
    terminal.type("/help\n")
    terminal.expect("/regenerate")
    terminal.expect("> ")
    terminal.type("Time\\\n")
    terminal.expect("... ")
    terminal.type("now?\n")
    terminal.expect('\x1b[36mcall get_time {"city": "Oslo"}')
    terminal.expect("\x1b[2m")
    terminal.expect("prompt tokens")
    terminal.expect("result of get_time> ")
    terminal.type("late\n")
    terminal.expect("Done.")
    terminal.expect("> ")
    terminal.type("\x1b[A" * 4 + "\n")  # four lines up in the history is /help
    terminal.expect("/regenerate")
    terminal.expect("> ")
    terminal.type("Time?\n")
    terminal.expect("result of get_time> ")
    terminal.interrupt("Ctrl-C again")
    terminal.type(f"/save {file}\n")
    terminal.expect("Saved 6 messages to")
    assert saved(file)["messages"][0]["content"] == "Time\nnow?"
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_colours_are_left_out_where_they_are_not_wanted(models: Models, console: list[Console]) -> None:
    terminal = Console("chat", models("steering"), TERM="xterm", NO_COLOR="1")
    console.append(terminal)
    terminal.expect("> ")
    terminal.type("x" * 3000 + "\n")
    terminal.expect("reading 2048 of 30")
    assert "\x1b[" not in terminal.expect("\ufffd[31mred").replace("\x1b[?2004", "")
    terminal.expect("generated")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
