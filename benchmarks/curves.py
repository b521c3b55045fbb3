"""Draw a run's learning curve as an SVG file: losses and held-out bits per byte over tokens.

python benchmarks/curves.py runs/recipe/log.jsonl --out docs/learning-curve.svg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]

COLOURS = ("#1f5fa8", "#c2571a", "#2e7d4f", "#7b4ea3", "#8a6d1d", "#a33a5b")
INK, FAINT = "#24292f", "#d8dee4"
WIDTH, HEIGHT = 920, 400
TOP, BOTTOM = 64, 344  # of the plots
MAX_POINTS = 500  # of a line
LABEL_GAP = 15.0  # least distance of two labels' baselines


@dataclass
class Series:
    """A named line; ``shadow`` is drawn faintly behind it."""

    name: str
    points: Points
    shadow: Points = field(default_factory=list)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run by step, each with the ``millions`` of tokens up to it.

    A step that was repeated after a kill counts once, by its last record; truncated lines are ignored. Tokens
    are summed from the speed of each step, since a run may be resumed with another batch size.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    ordered = [records[step] for step in sorted(records)]
    total = 0.0
    for record in ordered:
        total += record["tokens_per_second"] * record["seconds"]
        record["millions"] = total / 1e6
    return ordered


def smooth(points: Points) -> Points:
    """Exponential average over about a fiftieth of the points, without bias at the beginning."""
    keep = math.exp(-50 / max(50, len(points)))
    total = weight = 0.0
    averaged = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1.0
        averaged.append((x, total / weight))
    return averaged


def thin(points: Points) -> Points:
    """As many points as are distinguishable in the plot, including the last one."""
    every = math.ceil(len(points) / MAX_POINTS)
    return points[::-1][::every][::-1]


def loss_series(records: Sequence[dict[str, Any]]) -> list[Series]:
    """Smoothed training losses over the raw ones; the MTP loss if it was trained."""
    made = []
    for key, name in (("loss", "next token"), ("mtp_loss", "token after next")):
        raw = [(r["millions"], r[key]) for r in records if r.get(key) and math.isfinite(r[key])]
        if raw:
            made.append(Series(name, thin(smooth(raw)), thin(raw)))
    return made


def held_out_series(records: Sequence[dict[str, Any]]) -> list[Series]:
    """Bits per byte of every held-out source."""
    lines: dict[str, Points] = {}
    for record in records:
        for name, value in record.get("evaluation", {}).items():
            lines.setdefault(name, []).append((record["millions"], value))
    return [Series(name.removeprefix("heldout_").replace("_", " "), points) for name, points in lines.items()]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Plot:
    """Axes between ``left`` and ``right``, covering all points, and the lines on them."""

    def __init__(self, title: str, series: Sequence[Series], left: float, right: float, end: float) -> None:
        self.title, self.series = title, series
        self.left, self.right = left, right
        values = [y for line in series for _, y in (line.shadow or line.points)]
        low, high = min(values), max(values)
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        self.low, self.high, self.end = low - margin, high + margin, end

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.end

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def svg(self) -> str:
        parts = [text(self.left, TOP - 18, self.title, weight="600"), *self._axes()]
        for line, colour in zip(self.series, COLOURS * len(self.series), strict=False):
            parts += [self._path(line.shadow, colour, 0.8, 0.22), self._path(line.points, colour, 2.0, 1.0)]
        return "\n".join(filter(None, [*parts, *self._labels()]))

    def _axes(self) -> list[str]:
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<path d="M{self.left:.1f} {y:.1f}H{self.right:.1f}" stroke="{FAINT}"/>')
            parts.append(text(self.left - 8, y + 4, f"{value:g}", anchor="end"))
        for value in ticks(0, self.end):
            parts.append(text(self.x(value), BOTTOM + 20, f"{value:g}", anchor="middle"))
        parts.append(f'<path d="M{self.left:.1f} {BOTTOM}H{self.right:.1f}" stroke="{INK}"/>')
        middle = (self.left + self.right) / 2
        return [*parts, text(middle, BOTTOM + 42, "million tokens", anchor="middle")]

    def _path(self, points: Points, colour: str, width: float, opacity: float) -> str:
        places = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points]
        if len(places) == 1:
            x, y = places[0].split(",")
            return f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
        style = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
        return f'<polyline points="{" ".join(places)}" fill="none" {style}/>' if places else ""

    def _labels(self) -> list[str]:
        """Name and last value at the end of each line, moved apart if they would overlap."""
        ends = [(self.y(line.points[-1][1]), i) for i, line in enumerate(self.series)]
        parts, above = [], -math.inf
        for y, i in sorted(ends):
            above = max(y, above + LABEL_GAP)
            name, value = self.series[i].name, self.series[i].points[-1][1]
            label = f"{name} {value:.2f}"
            parts.append(text(self.right + 8, above + 4, label, colour=COLOURS[i % len(COLOURS)]))
        return parts


def text(
    x: float, y: float, words: str, *, anchor: str = "start", weight: str = "400", colour: str = INK
) -> str:
    """One line of text."""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} font-weight="{weight}" fill="{colour}">{escape(words)}</text>'


def draw(records: Sequence[dict[str, Any]], title: str = "") -> str:
    """The whole figure: losses on the left and, if measured, bits per byte on the right."""
    if not records:
        raise ValueError("the log has no steps yet")
    held_out = held_out_series(records)
    end = records[-1]["millions"]
    half = WIDTH / 2 if held_out else WIDTH
    plots = [Plot("Training loss (nats per token)", loss_series(records), 56, half - 150, end)]
    if held_out:
        plots.append(Plot("Held-out text (bits per byte)", held_out, half + 50, WIDTH - 120, end))
    body = [text(56, 26, title, weight="600")] if title else []
    body += [plot.svg() for plot in plots]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12.5" role="img">\n'
        f"<title>{escape(title or 'Learning curve')}</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("--out", type=Path, default=Path("docs/learning-curve.svg"))
    parser.add_argument("--title", default="")
    given = parser.parse_args()
    if not given.log.is_file():
        sys.exit(f"{given.log}: no such log")
    try:
        picture = draw(read_log(given.log), given.title)
    except ValueError as error:
        sys.exit(f"{given.log}: {error}")
    given.out.write_text(picture, encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
