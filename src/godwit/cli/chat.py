"""`godwit chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from godwit.cli import common
from godwit.cli.options import DtypeName, QuantizeName, SamplingOptions, ThinkingOptions
from godwit.cli.terminal import Terminal, harmless
from godwit.errors import GodwitError, TemplateError, UsageError

if TYPE_CHECKING:
    from godwit.engine import Answer, Finish, SamplingParams, Segmenter, Session, ThinkingRules, ToolCall
    from godwit.text.tokenizer import Tokenizer

HELP = '''\
Type a message and press Enter. A line that ends with \\ goes on in the next one, and \
""" begins a block of lines that ends with """. Ctrl-C stops an answer, Ctrl-D ends the chat.

/help          this text
/reset         forget the conversation
/regenerate    answer the last message again
/system TEXT   change the system message (without TEXT: show it; -: none)
/tools FILE    let the model call the tools in a JSON file (without FILE: list them; -: none)
/save FILE     write the conversation to a JSON file
/quit          end the chat

When the model calls a tool you are asked for the result; an empty line stands for {"success": true}.'''
EMPTY_RESULT = '{"success": true}'
REASONS = {"cancelled": "stopped", "length": "cut off by the limit of its length"}


def run(
    model: str | None,
    *,
    system: str | None,
    tools: Path | None,
    sampling: SamplingOptions,
    thinking: ThinkingOptions,
    context: int | None = None,
    threads: int | None,
    dtype: DtypeName,
    quantize: QuantizeName | None,
) -> None:
    """Talk until the input ends.

    Raises: GodwitError of any kind before the first message; later ones are shown and the chat goes on.
    """
    listed = common.read_tools(tools) if tools is not None else []
    opened = common.open_model(model)
    if opened.tokenizer.chat_template is None:
        raise TemplateError("this model has no chat template; use godwit generate --raw for plain texts")
    params = common.sampling_params(sampling, opened.tokenizer.generation_defaults)
    opened.check_context(context)
    session = opened.start(context=context, threads=threads, dtype=dtype, quantize=quantize)
    chat = Chat(
        session,
        params,
        Terminal(),
        name=opened.name,
        system=opened.system(system),
        tools=listed,
        thinking=thinking,
    )
    chat.talk()


class Chat:
    """The conversation and the commands that change it.

    Messages are those of chat templates, without the system message, which is kept apart.
    """

    def __init__(
        self,
        session: Session,
        params: SamplingParams,
        terminal: Terminal,
        *,
        name: str,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        thinking: ThinkingOptions | None = None,
    ) -> None:
        self.session = session
        self.params = params
        self.terminal = terminal
        self.name = name
        self.system = system
        self.tools = tools or []
        self.thinking = thinking or ThinkingOptions()
        self.messages: list[dict[str, Any]] = []
        self._num_answers = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.session.tokenizer

    def talk(self) -> None:
        """Read and answer messages until the input ends or the user leaves."""
        if self.terminal.interactive:
            self.terminal.note("Type a message; /help shows what else there is.")
        warned, going = False, True
        while going:
            try:
                going = self._next()
                warned = False
            except KeyboardInterrupt:
                if not self.terminal.interactive:
                    raise
                going = not warned
                warned = True
                self.terminal.note("\nCtrl-C again or Ctrl-D ends the chat." if going else "")

    def _next(self) -> bool:
        """Read one message and act on it; False when the chat ends."""
        message = self.terminal.read("> ")
        if message is None:
            if self.terminal.interactive:
                self.terminal.note("")
            return False
        if message.text.startswith("/") and not message.literal:
            return self._command(message.text)
        if message.text.strip():
            self._attempt([*self.messages, {"role": "user", "content": message.text}])
        return True

    def _attempt(self, messages: list[dict[str, Any]]) -> None:
        """Answer `messages`, asking for the results of tools that are called on the way.

        If no answer comes of it, the conversation stays what it was.
        """
        count, before, self.messages = len(messages), self.messages, messages
        try:
            while (answer := self._answer()) is not None:
                if not answer.tool_calls or not self._ask_results(answer.tool_calls):
                    break
        finally:
            if len(self.messages) == count:
                self.messages = before

    def _answer(self) -> Answer | None:
        """Show one answer and keep it; None when none came, so that nothing follows from it."""
        from godwit.engine import Segmenter, parse_answer

        try:
            with self._stoppable():
                variables = common.thinking_variables(self.tokenizer, self.thinking)
                ids = self.tokenizer.encode_chat(self._all_messages(), tools=self.tools or None, **variables)
                thinking = common.thinking_open(self.tokenizer, ids)
                rules = common.thinking_rules(self.thinking, opened=thinking)
                text, finish = self._show_answer(ids, Segmenter(thinking=thinking), rules)
        except GodwitError as error:
            self.terminal.end_line()
            self.terminal.error(f"{error}{' (/reset forgets the conversation)' * bool(self.messages[:-1])}")
            return None
        self._num_answers += 1
        self._show_numbers(finish)
        if not text:
            return None
        answer = parse_answer(text, thinking=thinking)
        self.messages.append(answer.as_message())
        stopped = finish is None or finish.reason == "cancelled"
        return replace(answer, tool_calls=()) if stopped else answer

    def _show_answer(
        self, ids: list[int], segmenter: Segmenter, rules: ThinkingRules
    ) -> tuple[str, Finish | None]:
        """Stream an answer to the terminal; its whole text, and no Finish where it was broken off hard."""
        from godwit.engine import Piece

        text, finish = "", None
        self.terminal.begin_answer()
        try:
            params = self._next_params()
            for event in self.session.stream(ids, params, progress=self._progress, thinking=rules):
                if isinstance(event, Piece):
                    text += event.text
                    self._show(segmenter.push(event.text))
                else:
                    finish = event
        except KeyboardInterrupt:
            if not self.terminal.interactive:
                raise
        self._show(segmenter.flush())
        self.terminal.end_line()
        return text, finish

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """While this lasts, the first Ctrl-C ends the answer at the next token, the second one at once."""
        if not self.terminal.interactive:
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self.session.cancelled:
                raise KeyboardInterrupt
            self.session.cancel()

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _next_params(self) -> SamplingParams:
        """Each answer has a seed of its own, also where one is given: the same again would say the same."""
        if self.params.seed is None or not self._num_answers:
            return self.params
        return replace(self.params, seed=(self.params.seed + self._num_answers) % 2**63)

    def _all_messages(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def _show(self, parts: list[tuple[Any, str]]) -> None:
        from godwit.engine import parse_call

        for kind, text in parts:
            if kind != "tool_call":
                self.terminal.part(kind, text)
            elif (call := parse_call(text)) is not None:
                self.terminal.call(call.name, call.arguments)
            else:
                self.terminal.part("text", f"<tool_call>{text}</tool_call>")

    def _progress(self, done: int, total: int) -> None:
        self.terminal.progress(done, total, self.session.chunk_size)

    def _show_numbers(self, finish: Finish | None) -> None:
        if finish is None:
            self.terminal.note("stopped")
            return
        parts = [
            f"{finish.prompt_tokens} prompt tokens ({finish.cached_tokens} cached)",
            f"{finish.completion_tokens} generated",
        ]
        if (rate := finish.prefill_tokens_per_second) is not None:
            parts[0] += f", {rate:.0f} tok/s"
        if (rate := finish.decode_tokens_per_second) is not None:
            parts[1] += f", {rate:.1f} tok/s"
        if finish.reason in REASONS:
            parts.append(REASONS[finish.reason])
        self.terminal.note("; ".join(parts))

    def _ask_results(self, calls: tuple[ToolCall, ...]) -> bool:
        """Ask for what the tools return; False when the user gives none."""
        for call in calls:
            reply = self.terminal.read(f"result of {harmless(call.name)[:60]}> ")
            if reply is None:
                return False
            content = reply.text if reply.text.strip() else EMPTY_RESULT
            self.messages.append({"role": "tool", "name": call.name, "content": content})
        return True

    def _command(self, line: str) -> bool:
        """Obey a command; False when the chat ends."""
        name, _, rest = line.partition(" ")
        commands = {
            "/help": lambda rest: self.terminal.note(HELP),
            "/reset": self._reset,
            "/regenerate": self._regenerate,
            "/system": self._set_system,
            "/tools": self._set_tools,
            "/save": self._save,
        }
        if name == "/quit":
            return False
        if name not in commands:
            self.terminal.error(
                f'{name[:40]} is no command; /help lists them, and """ before a message takes it as it is'
            )
            return True
        try:
            commands[name](rest.strip())
        except GodwitError as error:
            self.terminal.error(str(error))
        return True

    def _reset(self, rest: str) -> None:
        self.messages = []
        self.session.reset()
        self.terminal.note("The conversation is forgotten.")

    def _regenerate(self, rest: str) -> None:
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UsageError("There is no message to answer yet.")
        self._attempt(messages)

    def _set_system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        self.terminal.note(f"The system message: {self.system}" if self.system else "No system message.")

    def _set_tools(self, file: str) -> None:
        if file:
            self.tools = [] if file == "-" else common.read_tools(Path(file).expanduser())
        names = ", ".join(tool["function"]["name"] for tool in self.tools)
        self.terminal.note(f"Tools: {names}" if names else "No tools.")

    def _save(self, file: str) -> None:
        if not file:
            raise UsageError("Name the file, as in /save talk.json")
        path = Path(file).expanduser()
        content = {"model": self.name, "messages": self._all_messages(), "tools": self.tools}
        save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self.terminal.note(f"{len(content['messages'])} messages are in {path}")


def save_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; an older one of the name is replaced.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
