"""`godwit chat`: a conversation in the terminal, or piped in line by line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from godwit.cli import common
from godwit.cli.options import DtypeName, QuantizeName, SamplingOptions, ThinkingOptions
from godwit.cli.terminal import Terminal, harmless
from godwit.errors import GodwitError, TemplateError, UsageError

if TYPE_CHECKING:
    from godwit.cli.reply import Reply, ReplyText, ToolCall
    from godwit.cli.responder import Responder
    from godwit.engine import Finish, Piece, SamplingParams

HELP = '''\
Type a message and press Enter. End a line with \\ to continue on the next, or put several lines \
between """ and """. Ctrl-C stops an answer, Ctrl-D ends the chat.

/help          show this text
/reset         forget the conversation
/regenerate    answer the last message again
/system TEXT   change the system message (without TEXT: show it; -: remove it)
/tools FILE    let the model call the tools in a JSON file (without FILE: list them; -: remove them)
/save FILE     write the conversation to a JSON file
/quit          end the chat

When the model calls a tool, type its result; an empty line means {"success": true}.'''
EMPTY_RESULT = '{"success": true}'
REASONS = {"cancelled": "stopped", "length": "cut off at the length limit"}


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
    speculate: bool = True,
) -> None:
    """Chat until the input ends.

    Raises: GodwitError of any kind before the first message; later errors are shown and the chat continues.
    """
    listed = common.read_tools(tools) if tools is not None else []
    opened = common.open_model(model)
    if opened.tokenizer.chat_template is None:
        raise TemplateError("this model has no chat template; use godwit generate --raw for plain text")
    params = common.sampling_params(sampling, opened.tokenizer.generation_defaults)
    opened.check_context(context)
    with opened.start(
        context=context, threads=threads, dtype=dtype, quantize=quantize, speculate=speculate
    ) as responder:
        chat = TerminalChat(
            responder,
            params,
            Terminal(),
            name=opened.name,
            system=opened.system(system),
            tools=listed,
            thinking=thinking,
        )
        chat.talk()


class TerminalChat:
    """The conversation and the commands that change it.

    Messages have the form that chat templates expect. The system message is kept separately.
    """

    def __init__(
        self,
        responder: Responder,
        params: SamplingParams,
        terminal: Terminal,
        *,
        name: str,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        thinking: ThinkingOptions | None = None,
    ) -> None:
        from godwit.cli.reply import ReplyFormat

        self.responder = responder
        self.params = params
        self.terminal = terminal
        self.name = name
        self.system = system
        self.tools = tools or []
        self.thinking = thinking or ThinkingOptions()
        self.messages: list[dict[str, Any]] = []
        self._format = ReplyFormat(responder.tokenizer)
        self._num_answers = 0
        self._stopped = False  # Ctrl-C was pressed during this answer

    def talk(self) -> None:
        """Read and answer messages until the input ends or the user quits."""
        if self.terminal.interactive:
            self.terminal.note("Type a message, or /help for commands.")
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
                self.terminal.note("\nPress Ctrl-C again or Ctrl-D to end the chat." if going else "")

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
        """Answer `messages`, asking the user for the results of tool calls.

        If there is no answer, the conversation is unchanged.
        """
        count, before, self.messages = len(messages), self.messages, messages
        try:
            while (calls := self._answer()) and self._ask_results(calls):
                pass
        finally:
            if len(self.messages) == count:
                self.messages = before

    def _answer(self) -> list[ToolCall]:
        """Show one answer and add it to the conversation; return its tool calls, unless it was stopped."""
        try:
            with self._stoppable():
                reply, finish = self._show_answer()
        except GodwitError as error:
            self.terminal.end_line()
            self.terminal.error(f"{error}{' (/reset forgets the conversation)' * bool(self.messages[:-1])}")
            return []
        self._num_answers += 1
        self._show_numbers(finish)
        if reply.empty:
            return []
        self.messages.append(reply.as_message())
        return [] if finish is None or finish.reason == "cancelled" else reply.calls

    def _show_answer(self) -> tuple[Reply, Finish | None]:
        """Stream an answer to the terminal; the Finish is None if Ctrl-C was pressed twice."""
        from godwit.cli.reply import with_call_ids
        from godwit.engine import ChatRenderer

        tokenizer = self.responder.tokenizer
        variables = common.thinking_variables(tokenizer, self.thinking)
        prompt = ChatRenderer(tokenizer, self.tools, variables).prompt([*with_call_ids(self._all_messages())])
        rules = common.thinking_rules(self.thinking, opened=prompt.thinking)
        reply = self._format.reply(self.tools, thinking=prompt.thinking)
        events = self.responder.answer(
            prompt,
            self._next_params(),
            thinking=self._format.rules(rules, self.tools),
            shown_ids=self._format.marks if self.tools else frozenset(),
            progress=self._progress,
        )
        self.terminal.begin_answer()
        finish = None
        try:
            finish = self._show_events(events, reply)
        except KeyboardInterrupt:
            if not self.terminal.interactive:
                raise
        self._show(reply.flush())
        self.terminal.end_line()
        return reply, finish

    def _show_events(self, events: Iterator[Piece | Finish], reply: Reply) -> Finish | None:
        from godwit.engine import Finish

        for event in events if not self._stopped else ():
            if isinstance(event, Finish):
                return replace(event, reason="stop") if reply.ended and not self._stopped else event
            self._show(reply.push(event.text))
            if reply.ended:
                self.responder.cancel()
        return None

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Within this context, one Ctrl-C ends the answer at the next token, a second one immediately."""
        self._stopped = False
        if not self.terminal.interactive:
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self._stopped:
                raise KeyboardInterrupt
            self._stopped = True
            self.responder.cancel()

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _next_params(self) -> SamplingParams:
        """Parameters with a different seed for each answer, or /regenerate would repeat the answer."""
        if self.params.seed is None or not self._num_answers:
            return self.params
        return replace(self.params, seed=(self.params.seed + self._num_answers) % 2**63)

    def _all_messages(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def _show(self, parts: Iterable[ReplyText | ToolCall]) -> None:
        from godwit.cli.reply import ToolCall

        for part in parts:
            if isinstance(part, ToolCall):
                self.terminal.call(part.name, part.arguments)
            else:
                self.terminal.part(part.kind, part.text)

    def _progress(self, done: int, total: int) -> None:
        self.terminal.progress(done, total, self.responder.chunk_size)

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

    def _ask_results(self, calls: Sequence[ToolCall]) -> bool:
        """Ask for the results of tool calls; False at the end of the input."""
        for call in calls:
            reply = self.terminal.read(f"result of {harmless(call.name)[:60]}> ")
            if reply is None:
                return False
            content = reply.text if reply.text.strip() else EMPTY_RESULT
            self.messages.append({"role": "tool", "name": call.name, "content": content})
        return True

    def _command(self, line: str) -> bool:
        """Run a command; False when the chat ends."""
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
                f'unknown command {name[:40]}; see /help, or put a message that starts with / between """'
            )
            return True
        try:
            commands[name](rest.strip())
        except GodwitError as error:
            self.terminal.error(str(error))
        return True

    def _reset(self, rest: str) -> None:
        self.messages = []
        self.responder.forget()
        self.terminal.note("Conversation reset.")

    def _regenerate(self, rest: str) -> None:
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UsageError("there is no message to answer yet")
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
            raise UsageError("give a file name, as in /save chat.json")
        path = Path(file).expanduser()
        content = {"model": self.name, "messages": self._all_messages(), "tools": self.tools}
        save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self.terminal.note(f"Saved {len(content['messages'])} messages to {path}")


def save_text(path: Path, text: str) -> None:
    """Write a file atomically, replacing an older one.

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
