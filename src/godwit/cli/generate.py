"""`godwit generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from godwit.cli import common
from godwit.cli.options import DtypeName, QuantizeName, SamplingOptions, ThinkingOptions
from godwit.cli.terminal import harmless, tolerate_any_text
from godwit.errors import TemplateError, UsageError

if TYPE_CHECKING:
    from godwit.cli.reply import Reply
    from godwit.engine import Finish, Piece, Prompt
    from godwit.text.tokenizer import Tokenizer


def run(
    model: str | None,
    *,
    prompt: str | None,
    raw: bool,
    system: str | None,
    tools: Path | None,
    as_json: bool,
    stream: bool,
    logit_bias: Mapping[int, float],
    sampling: SamplingOptions,
    thinking: ThinkingOptions,
    context: int | None = None,
    threads: int | None,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    speculate: bool = True,
) -> None:
    """Write the answer to `prompt` (None: stdin) to stdout, ending with a line break.

    Lengths are checked before the weights are loaded.

    Raises: GodwitError of any kind; UsageError if the prompt is empty or options exclude each other.
    """
    tolerate_any_text()
    if raw and (system is not None or tools is not None):
        raise UsageError("--raw cannot be combined with --system or --tools; omit one of them")
    if raw and thinking != ThinkingOptions():
        raise UsageError("--raw cannot be combined with thinking options; omit one of them")
    listed = common.read_tools(tools) if tools is not None else []
    text = read_prompt() if prompt is None else prompt
    if not text.strip():
        raise UsageError("the prompt is empty; give one with -p TEXT or on stdin")
    opened = common.open_model(model)
    opened.check_context(context)
    params = common.sampling_params(sampling, opened.tokenizer.generation_defaults, logit_bias)
    variables = common.thinking_variables(opened.tokenizer, thinking)
    asked = make_prompt(
        opened.tokenizer, text, raw=raw, system=opened.system(system), tools=listed, variables=variables
    )
    opened.check_context(context, len(asked.ids))
    rules = None if raw else common.thinking_rules(thinking, opened=asked.thinking)
    from godwit.cli.reply import Reply, ReplyFormat

    with opened.start(
        context=context, threads=threads, dtype=dtype, quantize=quantize, speculate=speculate, reuse=False
    ) as responder:
        format = ReplyFormat(opened.tokenizer)
        events = responder.answer(
            asked,
            params,
            thinking=rules and format.rules(rules, listed),
            shown_ids=format.marks if listed else frozenset(),
        )
        if not as_json:
            write(events, at_once=not stream)
            return
        reply = Reply() if raw else format.reply(listed, thinking=asked.thinking)
        finish = collect(events, reply)
        print(json.dumps(report(reply, finish, opened.name), ensure_ascii=False))


def read_prompt() -> str:
    """The prompt from stdin, without its final line break."""
    if sys.stdin.isatty():
        print("Type the prompt; end it with Ctrl-D on an empty line.", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def make_prompt(
    tokenizer: Tokenizer,
    text: str,
    *,
    raw: bool,
    system: str | None,
    tools: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> Prompt:
    """The prompt: plain text, or a conversation of one message.

    Raises:
        TemplateError: there is no chat template, or it fails.
    """
    from godwit.engine import ChatRenderer, Prompt

    if raw:
        return Prompt(tuple(tokenizer.encode(text)))
    if tokenizer.chat_template is None:
        raise TemplateError("this model has no chat template; use --raw to continue plain text")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return ChatRenderer(tokenizer, tools, variables).prompt(messages, last=True)


def write(events: Iterable[Piece | Finish], *, at_once: bool) -> None:
    """Write an answer to stdout as it is generated, or `at_once` at the end."""
    from godwit.engine import Piece

    texts = (event.text for event in events if isinstance(event, Piece))
    last = ""
    for text in ["".join(texts)] if at_once else texts:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        last = text
    if not last.endswith("\n"):
        print()


def collect(events: Iterable[Piece | Finish], reply: Reply) -> Finish:
    """Collect a whole answer in `reply`, and return how it ended."""
    from godwit.engine import Finish

    for event in events:
        if isinstance(event, Finish):
            reply.flush()
            return event
        reply.push(event.text)
    raise RuntimeError("an answer ended without a finish event")


def report(reply: Reply, finish: Finish, model: str) -> dict[str, Any]:
    """The object that --json writes; times are in seconds, rates are null if nothing was measured."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "model": model,
        "text": reply.text,
        "thinking": reply.thinking,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in reply.calls],
        "finish_reason": finish.reason,
        "prompt_tokens": finish.prompt_tokens,
        "cached_tokens": finish.cached_tokens,
        "completion_tokens": finish.completion_tokens,
        "thinking_tokens": finish.thinking_tokens,
        "thinking_ended": finish.thinking_ended,
        "timings": {
            "prefill_seconds": rounded(finish.prefill_seconds),
            "prefill_tokens_per_second": rounded(finish.prefill_tokens_per_second),
            "decode_seconds": rounded(finish.decode_seconds),
            "decode_tokens_per_second": rounded(finish.decode_tokens_per_second),
        },
        "seed": finish.seed,
    }
