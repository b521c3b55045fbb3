"""Compare speculative with plain decoding: the same requests to two engines in one process, in turns.

    python benchmarks/speculation.py run --quantize bf16,q8 --output benchmarks/results/speculation.json
    python benchmarks/speculation.py run --model FILE.godwit --sequences 1,4 --output ...
    python benchmarks/speculation.py table benchmarks/results/speculation.json

Each setting is a number of clients, which send the next request as soon as they get an answer, and a kind of
request: `chat` (ordinary prompts, the model's recommended sampling), `repeat` (repetitive texts, greedy) and
`hot` (temperature 1.5). Speed is the number of answer tokens divided by the total time, including prefill; a
setting's ratio is the median of the rounds' ratios. The answers of both engines must be the same tokens, or
the run fails. `run` replaces equal settings in the output and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import queue
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from godwit import _native  # noqa: E402
from godwit.checkpoint.packed import PackedFile  # noqa: E402
from godwit.cli import common  # noqa: E402
from godwit.engine import Engine, GenerationRequest, SamplingParams  # noqa: E402
from godwit.engine.stream import Finish  # noqa: E402
from godwit.errors import CheckpointError  # noqa: E402
from godwit.measure.bench import spread  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402
from godwit.models.causal_lm import CausalLM  # noqa: E402
from godwit.models.native import load_packed  # noqa: E402
from godwit.models.packing import pack_checkpoint  # noqa: E402
from godwit.models.recipe import QuantRecipe  # noqa: E402

KINDS = ("chat", "repeat", "hot")
QUESTIONS = (
    "Tell me a story about a fox and a bird.",
    "What can I cook with rice and eggs?",
    "Why is the sky blue?",
    "Write a short letter to a friend who moved away.",
    "How do I learn to swim?",
    "What is the weather in Oslo?",
    "Give me three ideas for a birthday present.",
    "Explain what a bridge is to a child.",
)
REPEATS = (
    "red, green, blue, white, black, ",
    "The cat sat on the mat. The dog sat on the log. ",
    "def add(a, b):\n    return a + b\n\n",
    "1 apple, 2 pears, 3 plums, 4 figs; ",
    "Monday: soup. Tuesday: bread. Wednesday: fish. ",
    "She said yes, he said no, they said maybe, ",
    "<li>one</li><li>two</li><li>three</li>",
    "north, east, south, west, up, down, ",
)


class Numbers:
    """A substitute tokenizer for files without one; its tokens have no text."""

    stop_ids: frozenset[int] = frozenset()
    complete = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def stream(self, *, shown: Collection[int] = ()) -> Numbers:
        return self

    def push(self, id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def encode(self, text: str) -> list[int]:
        return [hash((text[:3], place)) % self.vocab_size for place in range(min(64, len(text)))]


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the material of its requests."""

    name: str
    format: str
    model: CausalLM
    tokenizer: Any
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def requests(self, kind: str, count: int, tokens: int) -> list[GenerationRequest]:
        """``count`` requests for answers of ``tokens`` tokens each."""
        made = []
        for number in range(count):
            sampling = {"repeat": {"temperature": 0.0}, "hot": {"temperature": 1.5}}.get(kind, self.defaults)
            banned = dict.fromkeys(self.tokenizer.stop_ids, -float("inf"))
            params = SamplingParams(
                **{**sampling, "seed": number, "max_tokens": tokens, "logit_bias": banned}
            )
            made.append(GenerationRequest(tuple(self._ids(kind, number)), params))
        return made

    def _ids(self, kind: str, number: int) -> list[int]:
        again = f" ({number})" if number >= 8 else ""
        text = REPEATS[number % 8] * 6 if kind == "repeat" else QUESTIONS[number % 8] + again
        if kind == "repeat" or isinstance(self.tokenizer, Numbers):
            ids: list[int] = self.tokenizer.encode(again + text)
            return ids
        return list(self.tokenizer.encode_chat([{"role": "user", "content": text}]))


def load(path: str | None, format: str | None) -> Loaded:
    """The built-in model or a packed file."""
    opened = None
    try:
        opened = common.open_model(path)
    except CheckpointError:
        if path is None or not path.endswith(".godwit"):
            raise
    if opened is None:
        file = PackedFile.open(str(path))
        model = load_packed(file)
        return Loaded(
            Path(str(path)).name, "packed", model, Numbers(model.config.vocab_size), {"temperature": 0.7}
        )
    if isinstance(opened.source, PackedFile):
        model = load_packed(opened.source)
    else:
        model, _ = pack_checkpoint(opened.source, QuantRecipe.find(format or "bf16"))
    defaults = common.recommended(opened.tokenizer.generation_defaults)
    return Loaded(opened.name, format or "packed", model, opened.tokenizer, defaults)


def play(engine: Engine, requests: Sequence[GenerationRequest], clients: int) -> tuple[float, list[Finish]]:
    """Seconds to answer all requests, at most ``clients`` at a time; and the answers."""
    done: queue.SimpleQueue[tuple[int, Finish]] = queue.SimpleQueue()
    streams = {}

    def submit(number: int) -> None:
        stream = streams[number] = engine.submit(requests[number])
        stream.on_event(lambda event: done.put((number, event)) if isinstance(event, Finish) else None)

    finishes: dict[int, Finish] = {}
    began = time.perf_counter()
    for number in range(min(clients, len(requests))):
        submit(number)
    waiting = iter(range(clients, len(requests)))
    while len(finishes) < len(requests):
        number, finish = done.get()
        finishes[number] = finish
        if (following := next(waiting, None)) is not None:
            submit(following)
    return time.perf_counter() - began, [finishes[number] for number in range(len(requests))]


def compare(
    engines: Sequence[Engine], loaded: Loaded, kind: str, clients: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One setting: both engines in turns, after a warm-up round."""
    requests = loaded.requests(kind, clients * args.each, args.tokens)
    speeds: tuple[list[float], list[float]] = ([], [])
    drafted = accepted = 0
    estimates = []
    for number in range(args.rounds + 1):
        answers: dict[int, list[Finish]] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            seconds, answers[which] = play(engines[which], requests, clients)
            if number:
                made = sum(len(finish.token_ids) for finish in answers[which])
                speeds[which].append(made / seconds)
        if any(a.token_ids != b.token_ids for a, b in zip(answers[0], answers[1], strict=True)):
            raise SystemExit(f"{kind}, {clients} clients: answers differ with speculation")
        if number:
            drafted += sum(finish.drafted for finish in answers[1])
            accepted += sum(finish.accepted for finish in answers[1])
            estimates += [finish.speedup for finish in answers[1] if finish.speedup is not None]
    made = args.rounds * clients * args.each * args.tokens
    return {
        "kind": kind,
        "clients": clients,
        "plain": spread(speeds[0]),
        "speculating": spread(speeds[1]),
        "ratio": spread([b / a for a, b in zip(*speeds, strict=True)]),
        "drafted": drafted / made,
        "accepted": accepted / made,
        "estimated": spread(estimates) if estimates else None,
    }


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure each model."""
    for format in args.quantize.split(",") if args.model is None else [None]:
        loaded = load(args.model, format)
        engines = [
            Engine(
                loaded.model,
                loaded.tokenizer,
                max_context=args.context,
                max_sequences=32,
                speculate=speculate,
            )
            for speculate in (False, True)
        ]
        for clients in map(int, args.sequences.split(",")):
            for kind in args.kinds.split(","):
                row = {"model": loaded.name, "format": loaded.format, "rounds": args.rounds}
                row |= compare(engines, loaded, kind, clients, args)
                print(line(row), file=sys.stderr, flush=True)
                yield row
        for engine in engines:
            engine.close()


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a setting."""
    return row["model"], row["format"], row["clients"], KINDS.index(row["kind"])


def line(row: Mapping[str, Any]) -> str:
    """A setting as a line of the table."""
    estimated = row["estimated"]
    return (
        f"| {row['model']}, {row['format']} | {row['clients']} | {row['kind']} "
        f"| {row['plain']['median']:,.0f} | {row['speculating']['median']:,.0f} "
        f"| {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f}) "
        f"| {row['drafted']:.2f} | {row['accepted']:.2f} "
        f"| {'' if estimated is None else format(estimated['median'], '.2f')} |"
    )


def table(result: Mapping[str, Any]) -> str:
    """All settings as markdown."""
    head = (
        "| model | clients | kind | plain tok/s | with drafts | ratio | drafted | accepted | own estimate |"
    )
    machine = result["machine"]
    return "\n".join(
        [
            head,
            "|---|---:|---|---:|---:|---:|---:|---:|---:|",
            *map(line, result["settings"]),
            "",
            "Medians of the rounds (smallest to largest); drafted and accepted for each token; "
            f"{result['threads']} threads on {machine['cores']} cores of {machine['cpu']}. "
            f"last `{result['command']}`, {result['date']}, commit {result['commit'][:12]}.",
        ]
    )


def run(args: argparse.Namespace) -> None:
    """Measure and write the results."""
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    before = json.loads(args.output.read_text())["settings"] if args.output.exists() else []
    found = {key(row): row for row in before} | {key(row): row for row in settings(args)}
    result = result_row(
        shlex.join(["python", *sys.argv]).replace(str(args.model), "FILE.godwit"),
        threads=args.threads,
        settings=[found[one] for one in sorted(found)],
    )
    write_json(args.output, result)
    print(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="measure")
    one.add_argument("--model", help="a packed file; default: the built-in model")
    one.add_argument("--quantize", default="bf16,q8", help="formats of the built-in model")
    one.add_argument("--sequences", default="1,2,4,8,16,32", help="numbers of clients")
    one.add_argument("--kinds", default=",".join(KINDS))
    one.add_argument("--tokens", type=int, default=96, help="tokens per answer")
    one.add_argument("--each", type=int, default=2, help="requests per client and round")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--context", type=int, default=1024)
    one.add_argument("--threads", type=int, default=_native.num_cores())
    one.add_argument("--output", type=Path, required=True)
    two = verbs.add_parser("table", help="print a result as markdown")
    two.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.verb == "run":
        run(args)
    else:
        print(table(json.loads(args.file.read_text())))


if __name__ == "__main__":
    main()
