"""Godwit against ``transformers``: the largest relative error of every family in every case.

Prints the table as markdown and writes it, with the conditions of the run, to
``benchmarks/results/parity.json``; exits with status 1 if a limit is exceeded. Needs the ``test`` extra. Run
from anywhere:

    python benchmarks/parity.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from godwit.measure.report import result_row, write_json  # noqa: E402
from tests.models import harness  # noqa: E402
from tests.models.families import FAMILIES, Family  # noqa: E402

Row = dict[str, float]


def measure(family: Family) -> Row:
    """Error of each case."""
    with tempfile.TemporaryDirectory() as directory:
        pair = harness.make_pair(family, Path(directory) / "model")
        return {name: case(pair, Path(directory) / name) for name, case in harness.CASES.items()}


def markdown(rows: Mapping[str, Row]) -> str:
    """The table; errors above their limit are bold."""
    lines = ["| family | " + " | ".join(harness.CASES) + " |", "|---|" + "---|" * len(harness.CASES)]
    for family, row in rows.items():
        cells = [f"{value:.1e}" if within(case, value) else f"**{value:.1e}**" for case, value in row.items()]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def within(case: str, value: float) -> bool:
    return value <= harness.limit(case)


def report(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The rows with what is needed to reproduce them."""
    return result_row(
        shlex.join(["python", *sys.argv]),
        ("torch", "transformers"),
        unit="largest absolute difference / largest absolute value of the reference, float32",
        limits={case: harness.limit(case) for case in harness.CASES},
        errors=rows,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parity.json")
    args = parser.parse_args()
    rows = {family.name: measure(family) for family in FAMILIES}
    print(markdown(rows))
    write_json(args.output, report(rows))
    print(f"written to {args.output}", file=sys.stderr)
    return 0 if all(within(case, value) for row in rows.values() for case, value in row.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
