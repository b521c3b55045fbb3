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
    from godwit.engine import Answer, Event, Finish
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
) -> None:
    """Answer `prompt` (None: stdin) on stdout, with one line break at the end.

    Lengths are checked before weights are read.

    Raises: GodwitError of any kind; UsageError for an empty prompt and for options that exclude each other.
    """
    tolerate_any_text()
    if raw and (system is not None or tools is not None):
        raise UsageError("--raw continues a text as it is, so --system and --tools cannot go with it")
    if raw and thinking != ThinkingOptions():
        raise UsageError("--raw continues a text as it is, so options about thinking cannot go with it")
    listed = common.read_tools(tools) if tools is not None else []
    text = read_prompt() if prompt is None else prompt
    if not text.strip():
        raise UsageError("the prompt is empty; give one with -p TEXT or on stdin")
    opened = common.open_model(model)
    opened.check_context(context)
    params = common.sampling_params(sampling, opened.tokenizer.generation_defaults, logit_bias)
    variables = common.thinking_variables(opened.tokenizer, thinking)
    ids = encode(
        opened.tokenizer, text, raw=raw, system=opened.system(system), tools=listed, variables=variables
    )
    opened.check_context(context, len(ids))
    thinks = not raw and common.thinking_open(opened.tokenizer, ids)
    rules = None if raw else common.thinking_rules(thinking, opened=thinks)
    session = opened.start(context=context, threads=threads, dtype=dtype, quantize=quantize)
    events = session.stream(ids, params, thinking=rules)
    if not as_json:
        write(events, at_once=not stream)
        return
    from godwit.engine import Answer, parse_answer

    text, finish = collect(events)
    answer = Answer(text) if raw else parse_answer(text, thinking=thinks)
    print(json.dumps(report(answer, finish, opened.name), ensure_ascii=False))


def read_prompt() -> str:
    """The prompt from stdin, without the line break at its end."""
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    raw: bool,
    system: str | None,
    tools: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> list[int]:
    """Ids of the prompt: a plain text, or a conversation of one message.

    Raises:
        TemplateError: there is no chat template, or it fails.
    """
    if raw:
        return tokenizer.encode(text)
    if tokenizer.chat_template is None:
        raise TemplateError("this model has no chat template; continue a plain text with --raw")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.encode_chat(messages, tools=tools or None, **variables)


def write(events: Iterable[Event], *, at_once: bool) -> None:
    """Write the text of an answer to stdout as it comes, or `at_once` when it is complete."""
    from godwit.engine import Piece

    texts = (event.text for event in events if isinstance(event, Piece))
    last = ""
    for text in ["".join(texts)] if at_once else texts:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        last = text
    if not last.endswith("\n"):
        print()


def collect(events: Iterable[Event]) -> tuple[str, Finish]:
    """The whole text of an answer, and how it ended."""
    from godwit.engine import Finish

    *pieces, finish = events
    if not isinstance(finish, Finish):
        raise RuntimeError("an answer ended without saying why")
    return "".join(piece.text for piece in pieces if not isinstance(piece, Finish)), finish


def report(answer: Answer, finish: Finish, model: str) -> dict[str, Any]:
    """The object that --json writes; times are seconds, and a rate is null where nothing was measured."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "model": model,
        "text": answer.content,
        "thinking": answer.thinking,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls],
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
