"""Cost of the prefix index per admitted prompt, by number of snapshots.

    python benchmarks/prefix_cost.py

All prompts start with the same system text; a state is kept at the end of each prompt and answer. The index
is filled to its budget, so each prompt also evicts snapshots and blocks. No model runs, and states are a few
bytes each: only the CPU time of the index is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from godwit.engine.cache import BlockPool, StateSnapshot, num_blocks  # noqa: E402
from godwit.engine.cache.prefix import PrefixIndex  # noqa: E402
from godwit.measure.report import result_row, write_json  # noqa: E402
from godwit.models.batch import BLOCK_SIZE  # noqa: E402

STATE_BYTES = 8
VOCAB = 50_000


class Conversations:
    """Uses an index with room for ``num_snapshots`` like the engine, one prompt after another."""

    def __init__(self, num_snapshots: int, system: int, prompt: int, answer: int) -> None:
        self._rng = random.Random(num_snapshots)
        self._system = self._text(system)
        self._prompt, self._answer = prompt, answer
        own = num_blocks(prompt + answer) + 2
        self.pool = BlockPool(num_blocks(system) + own * (num_snapshots // 2 + 2))
        max_bytes = num_snapshots * STATE_BYTES
        self.index = PrefixIndex(self.pool, recurrent=True, max_bytes=max_bytes)

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(VOCAB) for _ in range(length)]

    def next(self) -> float:
        """CPU seconds of the index for one more conversation."""
        prompt = [*self._system, *self._text(self._prompt)]
        whole = [*prompt, *self._text(self._answer)]
        state = StateSnapshot((torch.zeros(STATE_BYTES, dtype=torch.uint8),))
        chain: list[bytes] = []
        began = thread_time()
        hit = self.index.match(prompt, "", chain)
        self.index.use(hit)
        missing = num_blocks(len(whole)) - hit.position // BLOCK_SIZE - self.pool.num_free
        if missing > 0:
            self.index.evict(missing)
        path = [] if hit.node is None else [node.block for node in hit.node.ancestors()][::-1]
        adopted = path[: hit.position // BLOCK_SIZE]
        self.pool.share(adopted)
        blocks = [*adopted, *self.pool.allocate(num_blocks(len(whole)) - len(adopted))]
        first = len(adopted)
        for ids in (prompt, whole):
            end = len(ids) // BLOCK_SIZE
            self.index.commit(ids, "", chain, blocks, first, end)
            self.index.add_snapshot(ids, "", chain, blocks, lambda: state)
            first = end
        self.pool.free(blocks)
        return thread_time() - began


def measure(num_snapshots: int, args: argparse.Namespace) -> dict[str, Any]:
    """Median CPU time per prompt once the index is full."""
    asked = Conversations(num_snapshots, args.system, args.prompt, args.answer)
    while not asked.index.stats.num_evicted_snapshots:
        asked.next()
    seconds = [asked.next() for _ in range(args.prompts)]
    asked.index.check_integrity()
    return {
        "snapshots": asked.index.stats.num_snapshots,
        "blocks": asked.index.stats.num_blocks,
        "evicted_snapshots": asked.index.stats.num_evicted_snapshots,
        "milliseconds": round(1e3 * median(seconds), 3),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The runs as markdown."""
    lines = ["| snapshots | blocks | CPU ms per prompt |", "|---:|---:|---:|"]
    return "\n".join(
        [*lines, *(f"| {r['snapshots']:,} | {r['blocks']:,} | {r['milliseconds']:.3f} |" for r in rows)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--snapshots", default="100,1000,10000", metavar="N,N", help="sizes of the index")
    parser.add_argument("--prompts", type=int, default=200, help="prompts timed at each size")
    parser.add_argument("--system", type=int, default=500, help="tokens that all prompts share")
    parser.add_argument("--prompt", type=int, default=300, help="further tokens of each prompt")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "prefix-cost.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rows = [measure(int(size), args) for size in args.snapshots.split(",")]
    tokens = {"system": args.system, "prompt": args.prompt, "answer": args.answer}
    row = result_row(shlex.join(["python", *sys.argv]), tokens=tokens, prompts=args.prompts, sizes=rows)
    write_json(args.output, row)
    print(json.dumps(row) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
