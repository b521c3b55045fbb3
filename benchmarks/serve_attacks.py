"""The longest gap in a stream while the server is attacked.

    python benchmarks/serve_attacks.py --seconds 10

Starts `godwit serve` with the built-in model. One client streams answers; a second process runs one kind of
attack after another, several at a time. Prints the longest gap between two tokens of the stream during each
attack, and without an attack.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attacks import ATTACKS, Attack  # noqa: E402
from benchmarks.load_client import Client, Mix, Tally  # noqa: E402
from benchmarks.servers import ServerProcess, godwit_command, serving  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402

#: The longest gap in milliseconds that an attack may cause on an otherwise idle machine.
ALLOWED_MS = 250.0
NOTHING = "nothing"


def send(name: str, url: str, seconds: float, at_a_time: int) -> list[int]:
    """Attack for this long in a separate process; return the statuses."""
    attack = next(one for one in ATTACKS if one.name == name)
    return asyncio.run(_send(attack, url, seconds, at_a_time))


async def _send(attack: Attack, url: str, seconds: float, at_a_time: int) -> list[int]:
    end = time.monotonic() + seconds
    statuses: list[int] = []

    async def go_on(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            statuses.append(await attack.run(url, rng))

    await asyncio.gather(*(go_on(seed) for seed in range(at_a_time)))
    return statuses


async def stream_beside(url: str, work: Any, seconds: float) -> Tally:
    """Stream answers for at least so long, and until the future ``work`` is done."""
    tally = Tally()
    mix = Mix(leaving=0.0, hostile=0.0, prompt_words=(5, 9), tokens=(400, 400), every_route=False)
    client = asyncio.create_task(Client(url, mix, 1, tally).run())
    began = time.monotonic()
    while time.monotonic() - began < seconds or not (work is None or work.done()):
        await asyncio.sleep(0.1)
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)
    return tally


def measure(server: ServerProcess, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each attack, and one without any."""
    rows = []
    chosen = [attack for attack in ATTACKS if not args.only or attack.name in args.only]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for attack in (None, *chosen):
            work = attack and pool.submit(send, attack.name, server.url, args.seconds, args.at_a_time)
            tally = asyncio.run(stream_beside(server.url, work, args.seconds))
            statuses = set(work.result()) if work else set[int]()
            row = {
                "attack": attack.name if attack else NOTHING,
                "longest_gap_ms": round(1e3 * max(tally.gaps, default=float("inf")), 1),
                "tokens": tally.tokens,
                "as_expected": attack is None or statuses <= set(attack.statuses),
                "errors": tally.errors[:3],
            }
            rows.append(row)
            print(f"{row['longest_gap_ms']:9,.1f} ms  {row['tokens']:6,} tokens  {row['attack']}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each attack")
    parser.add_argument("--at-a-time", type=int, default=4, help="connections per attack")
    parser.add_argument("--only", action="append", help="the name of an attack; may be repeated")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    command = godwit_command("--context", "2048", "--memory", "0.25")
    with tempfile.TemporaryDirectory() as folder, serving("godwit", command, Path(folder) / "log") as server:
        rows = measure(server, args)
    wrong = [
        row for row in rows if row["errors"] or not row["as_expected"] or row["longest_gap_ms"] > ALLOWED_MS
    ]
    for row in wrong:
        print("failed:", json.dumps(row))
    if args.output is not None:
        write_json(
            args.output,
            result_row(
                shlex.join(["python", *sys.argv]),
                model={"name": "built-in"},
                seconds=args.seconds,
                at_a_time=args.at_a_time,
                allowed_ms=ALLOWED_MS,
                rows=rows,
            ),
        )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
