"""Compare Godwit with llama.cpp and transformers: the same architecture, random weights, taking turns.

    python benchmarks/peers.py run --layers 8 --dir /tmp/peers --llama-python VENV/bin/python
    python benchmarks/peers.py table benchmarks/results/peers*.json --readme README.md

    CXXFLAGS="-fno-tree-dse -fno-dse" pip install llama-cpp-python==0.3.36 gguf  # in a separate environment

`run` makes a model of Qwen3-Next's width for each engine (and keeps it in --dir), starts each engine in its
own process and lets them take turns, case by case and round by round, measuring the machine's limits between
rounds. It writes one JSON row. llama.cpp needs a Python with `llama-cpp-python` and `gguf`; the flags prevent
GCC before 13 from removing its tile configuration, without which it crashes on CPUs with AMX. transformers
runs in bfloat16, so only few layers fit. `table` prints the rows as markdown and inserts them between the
markers in a README.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gguf_model import MIXES, token_bytes  # noqa: E402
from benchmarks.peer_worker import Case  # noqa: E402
from godwit import _native  # noqa: E402
from godwit.config import ModelConfig  # noqa: E402
from godwit.measure.bench import spread  # noqa: E402
from godwit.measure.ceilings import FIGURES, CpuTimes, Noise, measure_ceilings  # noqa: E402
from godwit.measure.costs import costs_of  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
REST = 0.3  # seconds between two engines, for the threads of the first to go idle

#: The config.json of Qwen3-Next-80B-A3B.
QWEN3_NEXT: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "max_position_embeddings": 262144,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "intermediate_size": 5120,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
)


@dataclass(frozen=True)
class Entrant:
    """An engine with the weights it runs: a row of the table.

    Attributes:
        weights: their format; "" if the engine reports it.
        command: starts the worker, without the cases.
        token_bytes: bytes of weights read per token; None if the engine reports it.
    """

    engine: str
    weights: str
    command: tuple[str, ...]
    token_bytes: float | None = None


class Worker:
    """A running engine."""

    def __init__(self, entrant: Entrant, cases: Sequence[Case]) -> None:
        self.entrant = entrant
        listed = json.dumps([asdict(case) for case in cases])
        self.process = subprocess.Popen(
            [*entrant.command, "--cases", listed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._reply()

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"{self.about['version']}, {self.entrant.weights or self.about['weights']}"

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply."""
        if self.process.stdin is None:
            raise RuntimeError("the worker has no stdin")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{' '.join(self.entrant.command[:4])} ... ended with status {code}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def worker(entrant: Entrant, cases: Sequence[Case]) -> Iterator[Worker]:
    """Start an engine, and stop it at the end of the block."""
    started = Worker(entrant, cases)
    try:
        yield started
    finally:
        for stream in (started.process.stdin, started.process.stdout):
            if stream is not None:
                stream.close()
        try:
            started.process.wait(30)
        except subprocess.TimeoutExpired:
            started.process.kill()
            started.process.wait()


def compare(
    entrants: Sequence[Entrant], cases: Sequence[Case], repeats: int, ceiling_bytes: int | None = None
) -> dict[str, Any]:
    """Let the engines take turns; one row for each, with the ceilings and the noise of the whole run."""
    with ExitStack() as stack:
        workers = []
        for entrant in entrants:
            print(f"starting {entrant.engine} {entrant.weights}", file=sys.stderr)
            workers.append(stack.enter_context(worker(entrant, cases)))
        for case in cases:  # warm up: reads the files, fills the caches at each depth
            for each in workers:
                each.ask(
                    asdict(
                        Case(case.kind, 1 if case.kind == "decode" else case.tokens, case.depth, case.batch)
                    )
                )
        seconds: dict[tuple[int, Case], list[float]] = {}
        before, ceilings = CpuTimes.now(), [measure_ceilings(ceiling_bytes)]
        for number in range(repeats):
            for case in cases:
                for index in rotated(len(workers), number):
                    time.sleep(REST)
                    taken = workers[index].ask(asdict(case))["seconds"]
                    seconds.setdefault((index, case), []).append(taken)
                    print(
                        f"round {number + 1}: {workers[index].name}: {title(case)} {taken:.3f} s",
                        file=sys.stderr,
                    )
            ceilings.append(measure_ceilings(ceiling_bytes))
        noise = Noise.between(before, CpuTimes.now(), [found.read_bandwidth for found in ceilings])
        rows = [engine_row(each, {c: seconds[index, c] for c in cases}) for index, each in enumerate(workers)]
    return {
        "engines": rows,
        "ceilings": {name: spread([getattr(found, name) for found in ceilings]) for name in FIGURES},
        "noise": {"bandwidth_spread": noise.bandwidth_spread, "steal": noise.steal},
        # the workers are other processes, so the share of others says nothing
        "warnings": Noise(noise.bandwidth_spread, noise.steal, None).warnings(),
    }


def rotated(count: int, number: int) -> list[int]:
    """0 to count - 1, starting with a different one each time."""
    return [(number + i) % count for i in range(count)]


def engine_row(each: Worker, seconds: Mapping[Case, Sequence[float]]) -> dict[str, Any]:
    """Speeds and memory of one engine."""
    return {
        "name": each.name,
        "engine": each.entrant.engine,
        "weight_bytes_per_token": each.entrant.token_bytes or each.about["weight_bytes_per_token"],
        "memory": each.ask({"kind": "memory"}),
        "cases": [
            {**asdict(case), "tokens_per_second": spread([case.tokens * case.batch / t for t in taken])}
            for case, taken in seconds.items()
        ],
    }


def title(case: Case) -> str:
    """A column heading."""
    if case.kind == "prefill":
        return f"prefill {case.tokens:,}"
    batch = f", {case.batch} at once" if case.batch > 1 else ""
    return f"decode at {case.depth:,}{batch}"


def table(row: Mapping[str, Any]) -> str:
    """One run as markdown: a line for each engine, a column for each case, and the conditions."""
    cases = [
        Case(*(case[name] for name in ("kind", "tokens", "depth", "batch")))
        for case in row["engines"][0]["cases"]
    ]
    bandwidth, machine = row["ceilings"]["read_bandwidth"], row["machine"]
    lines = [
        "| engine, weights | bytes a token | " + " | ".join(map(title, cases)) + " | memory |",
        "|---|---:|" + "---:|" * len(cases) + "---:|",
    ]
    for engine in row["engines"]:
        cells = [f"{engine['weight_bytes_per_token'] / 1e6:,.0f} MB"]
        cells += [speed(case["tokens_per_second"]) for case in engine["cases"]]
        use = engine["memory"]["proportional"] or engine["memory"]["peak"]
        cells.append("" if use is None else f"{use / 1e9:.1f} GB")
        lines.append(f"| {engine['name']} | " + " | ".join(cells) + " |")
    layers = f"{row['model']['layers']} of {QWEN3_NEXT['num_hidden_layers']} layers"
    cores = f"{row['threads']} threads on {machine['cores']} cores of {machine['cpu']}"
    notes = [
        f"Tokens per second: medians of {row['repeats']} rounds (smallest to largest); {layers} of "
        f"Qwen3-Next's width and the whole head, random weights, {cores}. Bytes a token are those of the "
        f"weights it needs. In the same run this machine read {speed(bandwidth)} GB/s and multiplied "
        f"{speed(row['ceilings']['int8'], 0)} GOP/s in int8.",
        *(f"Note that {warning}." for warning in row["warnings"]),
        f"`{row['command']}`, {row['date']}, commit {row['commit'][:12]}.",
    ]
    return "\n".join([*lines, "", *notes])


def speed(value: Mapping[str, float], digits: int | None = None) -> str:
    """Median and range, with the significant digits."""
    places = digits if digits is not None else 0 if value["median"] >= 100 else 1
    middle, low, high = (f"{value[name]:,.{places}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def insert_table(text: str, content: str) -> str:
    """`text` with the part between the markers replaced by `content`.

    Raises:
        ValueError: the markers do not occur exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must have {BEGIN} and after it {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def make_entrants(args: argparse.Namespace) -> list[Entrant]:
    """The requested engines; creates their models if missing."""
    if args.layers < 4 or args.layers % 4:
        raise SystemExit("--layers must be a multiple of 4, since every fourth layer is attention")
    args.dir.mkdir(parents=True, exist_ok=True)
    config = {**QWEN3_NEXT, "num_hidden_layers": args.layers}
    folder = args.dir / f"shape-{args.layers}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    common = ("--threads", str(args.threads), "--chunk", str(args.chunk))
    found = []
    for name in args.engines.split(","):
        if name == "godwit":
            file = args.dir / f"godwit-{args.format}-{args.layers}.godwit"
            if not file.exists():
                from godwit.shrink.synth import synthesize

                synthesize(QWEN3_NEXT, file, num_layers=args.layers, format=args.format)
            found.append(Entrant(name, "", (*_worker(sys.executable), name, str(file), *common)))
        elif name == "llama.cpp":
            if args.llama_python is None:
                raise SystemExit("llama.cpp needs --llama-python, a Python with llama-cpp-python and gguf")
            found += [_llama(mix, config, folder, args, common) for mix in args.gguf.split(",")]
        elif name == "transformers":
            needed = token_bytes_bf16(config)
            command = (*_worker(sys.executable), name, str(folder), *common)
            found.append(Entrant(name, "", command, needed))
        else:
            raise SystemExit(f"unknown engine {name}; use godwit, llama.cpp or transformers")
    return found


def _worker(python: str | Path) -> tuple[str, str]:
    return str(python), str(HERE / "peer_worker.py")


def _llama(
    mix: str, config: Mapping[str, Any], folder: Path, args: argparse.Namespace, common: tuple[str, ...]
) -> Entrant:
    if mix not in MIXES:
        raise SystemExit(f"--gguf {mix}: must be one of {', '.join(MIXES)}")
    file = args.dir / f"{mix}-{args.layers}.gguf"
    if not file.exists():
        script = str(HERE / "gguf_model.py")
        subprocess.run(
            [args.llama_python, script, str(folder / "config.json"), str(file), "--mix", mix], check=True
        )
    command = (*_worker(args.llama_python), "llama.cpp", str(file), *common)
    return Entrant("llama.cpp", mix.upper(), command, token_bytes(config, mix))


def token_bytes_bf16(config: Mapping[str, Any]) -> float:
    """Bytes of bfloat16 weights read to decode one token."""
    return costs_of(ModelConfig.from_dict(config), {}, [], "bfloat16").step_bytes(1, -1)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Prompts, then depths with one sequence, then batches without depth."""
    prompts, depths, batches = (
        [int(word) for word in text.split(",")] for text in (args.prompts, args.depths, args.batches)
    )
    cases = [Case("prefill", count) for count in prompts if count]
    cases += [Case("decode", args.new_tokens, depth) for depth in depths]
    cases += [Case("decode", args.new_tokens, 0, batch) for batch in batches]
    return list(dict.fromkeys(cases))


def run(args: argparse.Namespace) -> None:
    """Measure and write the row."""
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    figures = compare(make_entrants(args), make_cases(args), args.repeats)
    row = result_row(
        shlex.join(["python", *sys.argv]),
        model={"shape": "Qwen3-Next-80B-A3B", "layers": args.layers},
        threads=args.threads,
        chunk=args.chunk,
        repeats=args.repeats,
        **figures,
    )
    write_json(args.output, row)
    print(table(row))
    print(f"written to {args.output}", file=sys.stderr)


def show(args: argparse.Namespace) -> None:
    """Print the tables of earlier runs, and insert them in a README."""
    content = "\n\n".join(table(json.loads(file.read_text())) for file in args.rows)
    print(content)
    if args.readme is not None:
        args.readme.write_text(insert_table(args.readme.read_text(), content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    verbs = parser.add_subparsers(required=True)
    measured = verbs.add_parser("run", help="measure")
    measured.set_defaults(verb=run)
    measured.add_argument("--layers", type=int, default=8)
    measured.add_argument("--dir", type=Path, required=True, help="directory of models; tens of gigabytes")
    measured.add_argument("--engines", default="godwit,llama.cpp")
    measured.add_argument("--format", default="q4", help="of godwit's weights")
    measured.add_argument("--gguf", default="q4_k_m", help=f"mixes for llama.cpp: {','.join(MIXES)}")
    measured.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python and gguf")
    measured.add_argument("-p", dest="prompts", default="512")
    measured.add_argument("-n", dest="new_tokens", type=int, default=32)
    measured.add_argument("-d", dest="depths", default="0,4096", help="with one sequence")
    measured.add_argument("-b", dest="batches", default="1", help="at depth 0")
    measured.add_argument("--repeats", type=int, default=5)
    measured.add_argument("--threads", type=int, default=2)
    measured.add_argument("--chunk", type=int, default=512, help="prompt tokens per step")
    measured.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    shown = verbs.add_parser("table", help="print rows as markdown")
    shown.set_defaults(verb=show)
    shown.add_argument("rows", type=Path, nargs="+")
    shown.add_argument("--readme", type=Path, help="insert the tables between the markers of this file")
    args = parser.parse_args()
    args.verb(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
