"""A server under load from clients that stream, disconnect or attack; and a comparison with llama.cpp's.

    python benchmarks/serve_load.py run --seconds 300
    python benchmarks/serve_load.py peer --llama-python VENV/bin/python --dir /tmp/peers

    pip install llama-cpp-python[server]==0.3.36 gguf                           # in a separate environment

`run` starts `godwit serve` with the built-in model and 64 clients that send one request after another:
short and long ones, to all APIs, with tools and schemas. In a tenth of them the client disconnects early, and
every twentieth is an attack. It reports wrong answers, whether memory grew after the caches were full (the
first fifth of the time) or beyond `--memory`, and whether all of the engine's blocks are accounted for at the
end.

`peer` lets `godwit serve` and llama-cpp-python's server take turns with the same clients and a model of the
same architecture and size, using only plain chats with fixed numbers of answer tokens. That server handles
one request at a time, so many clients compare servers, and one client compares engines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.load_client import Client, Mix, Tally  # noqa: E402
from benchmarks.plain_http import request  # noqa: E402
from benchmarks.servers import IDLE_SECONDS, ServerProcess, godwit_command, serving  # noqa: E402
from godwit.measure.bench import spread  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402

HERE = Path(__file__).resolve().parent
BUILT_IN = ROOT / "src" / "godwit" / "default_model"
#: Memory that a server may use beyond its idle memory, per byte of `--memory`.
ALLOWANCE = 1.1
#: Shares of the time: until the caches are full, and over which memory is averaged.
WARM_UP, WINDOW = 0.2, 0.1
#: Both servers sample in the same way, and neither may end an answer early.
CHOOSING = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "frequency_penalty": 0, "presence_penalty": 0}
STOP_IDS = (6135, 6137)


async def drive(
    server: ServerProcess,
    mix: Mix,
    num_clients: int,
    seconds: float,
    watch: Callable[[float], None] = lambda share: None,
    seed: int = 0,
) -> Tally:
    """Let clients send requests for so long.

    Args:
        server: that answers.
        mix: what they send.
        num_clients: at a time.
        seconds: until all leave.
        watch: is called a few times a second with the share of the time that has passed.
        seed: with another one all texts are others, so that a server cannot know them.
    """
    tally = Tally()
    clients = [Client(server.url, mix, 1000 * seed + n, tally) for n in range(num_clients)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        watch(passed / seconds)
        await asyncio.sleep(min(0.25, seconds - passed))
        for task in tasks:
            if task.done():
                task.result()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return tally


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(seconds)
    pick = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    return {n: round(1e3 * ordered[int(len(ordered) * q)], 2) if ordered else None for n, q in pick}


def figures(tally: Tally, seconds: float) -> dict[str, Any]:
    """The results in a tally."""
    return {
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "finished": tally.finished,
        "left": tally.left,
        "hostile": tally.hostile,
        "ttft_ms": quantiles(tally.first),
        "itl_ms": quantiles(tally.gaps),
        "longest_gap_ms": round(1e3 * max(tally.gaps, default=0.0), 2),
    }


async def gauges(server: ServerProcess) -> dict[str, float]:
    """The numbers of /metrics that have no labels."""
    async with request(server.url, "/metrics", method="GET") as reply:
        text = (await reply.body()).decode()
    lines = (line.split() for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name.removeprefix("godwit_"): float(value) for name, value in lines}


# under load


@dataclass
class Watch:
    """The memory of a server during a run."""

    server: ServerProcess
    samples: list[tuple[float, int]] = field(default_factory=list)

    def look(self, share: float) -> None:
        self.samples.append((share, self.server.memory()))

    def around(self, start: float, end: float) -> int:
        """Median of the bytes between two shares of the time."""
        inside = [size for share, size in self.samples if start <= share <= end]
        return int(median(inside)) if inside else 0


def run(args: argparse.Namespace) -> int:
    """Put a server under load and report the results."""
    command = godwit_command("--self-check", "--context", "2048", "--memory", str(args.memory), *args.serve)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(serving("godwit", command, args.log or folder / "log"))
        watch = Watch(server)
        asyncio.run(drive(server, Mix(), 8, 2.0))  # starts the processes for schemas and templates
        with progress() as bar:
            task = bar.add_task(f"{args.clients} clients", total=1.0)

            def look(share: float) -> None:
                watch.look(share)
                bar.update(task, completed=share)

            rest_bytes, before = server.memory(), server.cpu_seconds()
            tally = asyncio.run(drive(server, Mix(), args.clients, args.seconds, look))
            busy = (server.cpu_seconds() - before) / args.seconds
        books = asyncio.run(rest(server))
    allowed = rest_bytes + int(ALLOWANCE * args.memory * 2**30)
    after, end = watch.around(WARM_UP, WARM_UP + WINDOW), watch.around(1 - WINDOW, 1)
    row = result_row(
        shlex.join(["python", *sys.argv]),
        model={"name": "built-in"},
        clients=args.clients,
        seconds=args.seconds,
        **figures(tally, args.seconds),
        server_cores=round(busy, 2),
        memory={
            "at_rest": rest_bytes,
            "allowed": allowed,
            "after_warm_up": after,
            "end": end,
            "growth": round(end / after - 1, 4),
            "mib_each_twentieth": [watch.around(n / 20, (n + 1) / 20) >> 20 for n in range(20)],
        },
        books=books,
        num_errors=len(tally.errors),
        errors=sorted(set(tally.errors))[:20],
        slowest_refusals={name: round(taken, 2) for name, taken in sorted(tally.slowest.items())},
    )
    show(row, args)
    return int(bool(tally.errors) or not books["right"] or end > min(allowed, 1.05 * after))


async def rest(server: ServerProcess) -> dict[str, Any]:
    """Wait until the engine is idle and has checked its blocks; returns its counts."""
    end = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < end:
        await asyncio.sleep(0.2)
        found = await gauges(server)
        if not found.get("engine_num_running", 1) and not found.get("engine_num_waiting", 1):
            break
    names = ("num_running", "num_waiting", "num_failures", "num_checks", "num_preemptions")
    books: dict[str, Any] = {name: int(found.get(f"engine_{name}", -1)) for name in names}
    books["engine_restarts"] = int(found["engine_restarts_total"])
    rows_free = found["engine_free_rows"] == found["engine_num_rows"]
    nothing = ("num_running", "num_waiting", "num_failures", "engine_restarts")
    books["right"] = rows_free and books["num_checks"] > 0 and not any(books[name] for name in nothing)
    return books


def show(row: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the result: a file, and a table or JSON."""
    if args.output is not None:
        write_json(args.output, row)
    if args.json:
        print(json.dumps(row))
        return
    table = Table(title=f"{row['clients']} clients for {row['seconds']:.0f} s")
    for head in ("", "p50", "p95", "p99"):
        table.add_column(head, justify="left" if not head else "right")
    for name, title in (("ttft_ms", "first token, ms"), ("itl_ms", "between tokens, ms")):
        table.add_row(title, *(f"{row[name][q]:,.0f}" for q in ("p50", "p95", "p99")))
    memory, books = row["memory"], row["books"]
    console = Console()
    console.print(table)
    console.print(
        f"{row['tokens_per_second']:,.0f} tokens/s; {row['finished']:,} answers, {row['left']:,} left, "
        f"{row['hostile']:,} hostile requests refused\n"
        f"errors: {row['num_errors']}; memory {memory['after_warm_up'] / 2**20:,.0f} -> "
        f"{memory['end'] / 2**20:,.0f} MiB ({memory['growth']:+.1%}), of {memory['allowed'] / 2**20:,.0f} "
        f"allowed; the longest gap in a stream {row['longest_gap_ms']:,.0f} ms; the server took "
        f"{row['server_cores']:.2f} cores; books {'right' if books['right'] else 'WRONG'}: {books}",
        highlight=False,
    )
    for error in row["errors"]:
        console.print(f"  {error}", markup=False)


# compared with llama.cpp


def peer(args: argparse.Namespace) -> int:
    """Compare two servers, slice by slice."""
    mix = Mix(
        leaving=0.0, hostile=0.0, prompt_words=(20, 200), tokens=(32, 128), every_route=False, exact=True,
        extra={**CHOOSING, "logit_bias": {str(id): -100 for id in STOP_IDS}},
    )  # fmt: skip
    counts = [int(word) for word in args.clients.split(",")]
    tallies: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack, progress() as bar:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(serving(*entrant)) for entrant in entrants(args, folder)]
        task = bar.add_task("two servers", total=float(args.rounds * len(counts) * len(servers)))
        for server in servers:
            asyncio.run(drive(server, mix, 1, 2.0))
        for number in range(args.rounds):
            for count in counts:
                for server in servers[:: -1 if number % 2 else 1]:
                    for each in servers:
                        each.settle()
                    tally = asyncio.run(drive(server, mix, count, args.slice, seed=1 + number))
                    if tally.errors:
                        raise RuntimeError(f"{server.name}: {tally.errors[0]}")
                    tallies.setdefault((server.name, count), []).append(figures(tally, args.slice))
                    bar.advance(task)
    rows = [{"server": name, "clients": count, **joined(found)} for (name, count), found in tallies.items()]
    row = result_row(
        shlex.join(["python", *sys.argv]),
        model={"shape": "built-in", "format": "bf16"},
        rounds=args.rounds,
        slice_seconds=args.slice,
        threads={"godwit serve": args.threads, "llama-cpp-python": args.llama_threads},
        requests="20 to 200 words, 32 to 128 tokens",
        servers=rows,
    )
    if args.output is not None:
        write_json(args.output, row)
    print(json.dumps(row) if args.json else peer_table(rows))
    return 0


def joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over rounds."""
    times = {
        name: {
            q: median(values)
            if (values := [one[name][q] for one in found if one[name][q] is not None])
            else None
            for q in ("p50", "p95", "p99")
        }
        for name in ("ttft_ms", "itl_ms")
    }
    return {"tokens_per_second": spread([one["tokens_per_second"] for one in found]), **times}


def peer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as markdown."""
    lines = [
        "| server | clients | tokens/s | first token p50, p95 (ms) | between tokens p50, p95 (ms) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["clients"]):
        times = (
            ", ".join("" if row[n][q] is None else f"{row[n][q]:,.1f}" for q in ("p50", "p95"))
            for n in ("ttft_ms", "itl_ms")
        )
        speed = row["tokens_per_second"]
        cells = (row["server"], str(row["clients"]), f"{speed['median']:,.0f}", *times)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def entrants(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[str], Path, str | None]]:
    """Name, command, log and URL of both servers; creates the GGUF file if it is missing."""
    gguf = args.dir / "built-in-bf16.gguf"
    if not gguf.exists():
        args.dir.mkdir(parents=True, exist_ok=True)
        script = [str(HERE / "gguf_model.py"), str(BUILT_IN / "config.json"), str(gguf), "--mix", "bf16"]
        subprocess.run([args.llama_python, *script, "--tokenizer", str(BUILT_IN)], check=True)
    threads = str(args.threads)
    yield "godwit serve", godwit_command("--threads", threads, "--context", "2048"), folder / "godwit", None
    options = {
        "model": gguf,
        "n_ctx": 2048,
        "n_threads": args.llama_threads,
        "n_threads_batch": args.llama_threads,
        "port": args.llama_port,
        "interrupt_requests": "false",
        "verbose": "false",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [str(args.llama_python), "-m", "llama_cpp.server", *words]
    yield "llama-cpp-python", command, folder / "llama", f"http://127.0.0.1:{args.llama_port}"


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    verbs = parser.add_subparsers(required=True)
    for verb, name in ((run, "serve-load.json"), (peer, "serve-peer.json")):
        one = verbs.add_parser(verb.__name__, help=(verb.__doc__ or "").split("\n", 1)[0])
        one.set_defaults(verb=verb)
        one.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / name)
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if verb is run:
            one.add_argument("--clients", type=int, default=64)
            one.add_argument("--seconds", type=float, default=300)
            one.add_argument("--memory", type=float, default=0.25, help="for the caches, in GiB")
            one.add_argument("--log", type=Path, help="keep the server's log here")
            one.add_argument("serve", nargs="*", help="further arguments for godwit serve, after --")
        else:
            one.add_argument("--clients", default="1,64", help="numbers of concurrent clients to measure")
            one.add_argument("--rounds", type=int, default=3)
            one.add_argument("--slice", type=float, default=10.0, help="seconds per case and round")
            one.add_argument("--threads", type=int, default=2)
            one.add_argument("--llama-threads", type=int, default=1)
            one.add_argument("--dir", type=Path, required=True, help="directory of the GGUF file")
            one.add_argument("--llama-python", required=True)
            one.add_argument("--llama-port", type=int, default=8765)
    args = parser.parse_args()
    result: int = args.verb(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
