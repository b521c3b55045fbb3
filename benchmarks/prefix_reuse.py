"""Prefix reuse: an agent's conversation of ten turns on a model of full width, with and without reuse.

    python benchmarks/prefix_reuse.py godwit-q4-8.godwit      # made by benchmarks/peers.py, for example

The prompt starts with 4,000 tokens of system text and tools; each turn adds a question or the result of a
tool call. The model is random, so its answers are fixed in advance: a constraint forces the words that the
next turn has in its conversation, as if the model had chosen them. Each turn is measured once with the
engine's cache, and once with a unique salt, which prevents reuse. Time to the first token includes applying
the template, tokenizing, queueing and prefill. Finally the third message is changed: only what precedes it
is reused.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.load_client import words  # noqa: E402
from godwit.cli import common  # noqa: E402
from godwit.engine import Engine, GenerationRequest, SamplingParams  # noqa: E402
from godwit.engine.stream import Finish, Piece  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402
from godwit.models.native import load_packed  # noqa: E402
from godwit.server.prompts import Conversation, PromptMaker  # noqa: E402
from godwit.text.tokenizer import Tokenizer  # noqa: E402


class Writer:
    """Makes texts of a given number of tokens."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)

    def text(self, num_tokens: int) -> str:
        """Words of ``num_tokens`` tokens, give or take one."""
        listed: list[str] = []
        while len(self._tokenizer.encode(" ".join(listed))) < num_tokens:
            listed += words(self._rng, max(1, num_tokens // 32)).split()
        while len(listed) > 1 and len(self._tokenizer.encode(" ".join(listed))) > num_tokens:
            listed.pop()
        return " ".join(listed)

    def between(self, least: int, most: int) -> str:
        return self.text(self._rng.randint(least, most))

    def tool(self, number: int) -> dict[str, Any]:
        names = words(self._rng, 4).split()
        fields = {name: {"type": "string", "description": self.text(15)} for name in names}
        parameters = {"type": "object", "properties": fields, "required": names[:2]}
        name = f"{names[0]}_{number}"
        described = {"name": name, "description": self.text(30), "parameters": parameters}
        return {"type": "function", "function": described}


class Said:
    """A constraint that forces an answer to be these tokens."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._ids = iter(ids)
        self._next = next(self._ids)
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask[self._next] = True
        return mask

    def accept(self, token: int) -> None:
        self._next = next(self._ids, token)


class Agent:
    """Calls an engine like the server does.

    Args:
        engine: the engine.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.maker = PromptMaker(tokenizer, engine.max_context)
        self._stop = next(iter(sorted(tokenizer.stop_ids & {tokenizer.token_to_id("<|im_end|>")})))

    def ask(self, conversation: Conversation, answer: str, salt: str) -> tuple[float, Finish]:
        """Seconds to the first token, and the finish event; the answer is forced to be this text."""
        ids = [*self.tokenizer.encode(answer, allow_special=True, add_special_tokens=False), self._stop]
        said = Said(ids, self.engine.vocab_size)
        began = perf_counter()
        prompt = self.maker.chat(conversation)
        params = SamplingParams(temperature=0, max_tokens=len(ids) + 1)
        stream = self.engine.submit(GenerationRequest(prompt.ids, params, prompt.boundaries, salt, said))
        first = 0.0
        for event in stream:
            if isinstance(event, Piece) and not first:
                first = perf_counter() - began
            if isinstance(event, Finish):
                return first, event
        raise RuntimeError("the answer has no finish event")


def turns(writer: Writer, count: int) -> Iterator[tuple[str, dict[str, str], str]]:
    """(kind, message, answer) of each turn: a question, then a tool's result, and so on."""
    for number in range(count):
        if number % 2:
            yield "tool result", {"role": "tool", "content": writer.between(200, 400)}, writer.text(40)
        else:
            yield "question", {"role": "user", "content": writer.between(50, 150)}, writer.text(40)


def called(answer: str, writer: Writer, tool: Mapping[str, Any]) -> str:
    """An answer that calls a tool, in the model's format."""
    call = {"name": tool["function"]["name"], "arguments": {"name": writer.text(8)}}
    words = " ".join(answer.split()[:12])
    return f"{words}\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


def converse(args: argparse.Namespace, agent: Agent) -> dict[str, Any]:
    """Run the conversation turn by turn, and then the edit."""
    writer = Writer(agent.tokenizer)
    tools = [writer.tool(number) for number in range(8)]
    used = len(agent.maker.chat(Conversation([{"role": "user", "content": "."}], tools)).ids)
    messages: list[dict[str, str]] = [{"role": "system", "content": writer.text(args.prefix - used)}]
    agent.ask(Conversation([{"role": "user", "content": writer.text(600)}], tools), "Well.", "warm-up")
    cold = {int(word) for word in args.cold.split(",")} if args.cold else set()
    rows, listed = [], list(turns(writer, args.turns))
    for number, (kind, message, answer) in enumerate(track(listed, "turns", console=Console(stderr=True))):
        messages.append(message)
        text = called(answer, writer, tools[0]) if kind == "question" else answer
        row: dict[str, Any] = {"turn": number + 1, "message": kind}
        for name in ("cold", "warm")[:: -1 if number % 2 else 1]:
            salt = f"cold {number}" if name == "cold" else "agent"
            if name == "cold" and cold and number + 1 not in cold:
                continue
            seconds, finish = agent.ask(Conversation(messages, tools), text, salt)
            row[name] = {"seconds": round(seconds, 4), "cached": finish.cached_tokens}
            row["prompt"] = finish.prompt_tokens
            row["note"] = finish.reuse_note
        rows.append(row)
        messages.append({"role": "assistant", "content": text})
    agent.engine.check_integrity()
    edited = [*messages[:-1]]
    edited[2] = {**edited[2], "content": writer.text(100)}
    place = common_tokens(agent, Conversation(messages[:-1], tools), Conversation(edited, tools))
    seconds, finish = agent.ask(Conversation(edited, tools), "Well.", "agent")
    edit = {"differs_at": place, "cached": finish.cached_tokens, "prompt": finish.prompt_tokens}
    return {"turns": rows, "edit": {**edit, "seconds": round(seconds, 4), "note": finish.reuse_note}}


def common_tokens(agent: Agent, one: Conversation, other: Conversation) -> int:
    """The position at which the prompts of two conversations differ."""
    pairs = zip(agent.maker.chat(one).ids, agent.maker.chat(other).ids, strict=False)
    return next(place for place, (a, b) in enumerate(pairs) if a != b)


def speedups(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Speed-up of the first token by reuse for each turn except the first."""
    return [row["cold"]["seconds"] / row["warm"]["seconds"] for row in rows[1:] if "cold" in row]


def table(row: Mapping[str, Any]) -> str:
    """The run as markdown."""
    lines = [
        "| turn | adds | prompt | reused | first token without reuse | with | times faster |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for turn in row["turns"]:
        warm, cold = turn["warm"], turn.get("cold")
        without = f"{cold['seconds']:.2f} s" if cold else ""
        factor = f"{cold['seconds'] / warm['seconds']:.1f}" if cold else ""
        cells = (turn["turn"], turn["message"], f"{turn['prompt']:,}", f"{warm['cached']:,}", without)
        lines.append("| " + " | ".join(map(str, (*cells, f"{warm['seconds']:.2f} s", factor))) + " |")
    edit = row["edit"]
    lines += [
        "",
        f"Then the third message changed: of {edit['prompt']:,} tokens the first {edit['differs_at']:,} were "
        f"the same, {edit['cached']:,} were reused, and the first token came after {edit['seconds']:.2f} s. "
        f"{row['model']['layers']} layers of Qwen3-Next's width, {row['threads']} threads. "
        f"`{row['command']}`, {row['date']}, commit {row['commit'][:12]}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a packed file; uses the built-in tokenizer if it has none")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens of system text and tools")
    parser.add_argument("--cold", metavar="N,N", help="turns also measured without reuse; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "prefix-reuse.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    common.use_threads(args.threads)
    model = load_packed(args.model)
    tokenizer = common.open_model(None).tokenizer
    with Engine(model, tokenizer, max_context=16384, max_sequences=2) as engine:
        found = converse(args, Agent(engine, tokenizer))
    factors = speedups(found["turns"])
    times = {"median": round(median(factors), 1), "least": round(min(factors), 1)} if factors else None
    row = result_row(
        shlex.join(["python", *sys.argv]),
        threads=args.threads,
        prefix=args.prefix,
        model={"name": args.model.name, "layers": len(model.config.layers)},
        **found,
        times_faster=times,
    )
    if args.output is not None:
        write_json(args.output, row)
    print(json.dumps(row) if args.json else table(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
