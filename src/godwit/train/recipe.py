"""A training recipe: one TOML file, checked field by field before anything is loaded."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from godwit.errors import UsageError

T = TypeVar("T")

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own data mix and loss weights.

    Attributes:
        until: fraction of the run, 0 to 1, at which the stage ends.
        mix: share of tokens from each source; need not sum to one.
        role_weights: loss weights of answers and plain text, user turns, everything else, tool calls.
        mtp_weight: weight of the multi-token-prediction loss; 0 skips the module.
    """

    until: float
    mix: dict[str, float]
    role_weights: list[float] = field(default_factory=lambda: [1.0, 0.25, 0.0, 1.0])
    mtp_weight: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What to train, on which data, and for how long.

    Attributes:
        model: a ``config.json`` as a table.
        data: directory of pre-tokenised sources (``<name>.tokens.npy``, ``.roles.npy``, ``.offsets.npy``).
        tokenizer: directory of the tokenizer files to export with the model.
        init: checkpoint to start from; empty for random weights.
        steps: optimiser steps.
        row_length: tokens per packed row, a multiple of 64.
        rows: rows per micro-batch.
        accumulate: micro-batches per step.
        warmup_steps: steps of linear warm-up, after which the learning rate is constant.
        decay: share of the run, at its end, over which the learning rate decays linearly to zero.
        autocast: matrix products in bfloat16; None: only if the CPU has fast bfloat16 products.
    """

    model: dict[str, Any]
    data: str
    tokenizer: str
    steps: int
    stage: list[Stage]
    init: str = ""
    num_mtp: int = 1
    row_length: int = 2048
    rows: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    warmup_steps: int = 100
    decay: float = 0.3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    aux_weight: float = 1e-3
    seed: int = 0
    autocast: bool | None = None
    save_every: int = 100
    evaluate_every: int = 250
    evaluate_on: list[str] = field(default_factory=list)
    evaluate_batches: int = 4

    @staticmethod
    def from_file(path: str | Path) -> Recipe:
        """Read a recipe; paths in it are relative to its directory.

        Raises:
            UsageError: no such file, not TOML, unknown or missing fields, invalid values.
        """
        file = Path(path)
        if not file.is_file():
            raise UsageError(f"{file}: no such recipe; give the path of a TOML file")
        try:
            raw = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: not valid TOML: {error}") from error
        stages = raw.get("stage")
        if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
            raise UsageError(f"{file}: a recipe needs at least one [[stage]] table")
        raw["stage"] = [_build(Stage, stage, f"{file}: [[stage]]") for stage in stages]
        for name in ("data", "tokenizer", "init"):
            if isinstance(raw.get(name), str) and (name != "init" or (file.parent / raw[name]).is_dir()):
                raw[name] = str((file.parent / raw[name]).resolve())
        recipe = _build(Recipe, raw, str(file))
        recipe.check(str(file))
        return recipe

    def check(self, where: str) -> None:
        """Raises: UsageError: values are out of range or contradict each other."""
        ends = [stage.until for stage in self.stage]
        numbers = (self.learning_rate, self.weight_decay, self.aux_weight, self.clip, *ends)
        weights = [w for s in self.stage for w in (s.mtp_weight, *s.mix.values(), *s.role_weights)]
        problems = [
            (not all(map(math.isfinite, (*numbers, *weights))), "every number must be finite"),
            (min(*weights, self.weight_decay, self.aux_weight) < 0, "weights must be zero or more"),
            (self.steps < 1, "steps must be at least 1"),
            (self.row_length < 64 or self.row_length % 64 != 0, "row_length must be a multiple of 64"),
            (self.rows < 1 or self.accumulate < 1, "rows and accumulate must be at least 1"),
            (self.optimizer not in ("adamw", "muon"), 'optimizer must be "adamw" or "muon"'),
            (not 0 < self.learning_rate < 1, "learning_rate must lie between 0 and 1"),
            (not 0 <= self.decay <= 1, "decay must lie between 0 and 1"),
            (not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1), "beta1 and beta2 must lie between 0 and 1"),
            (self.clip <= 0, "clip must be more than 0"),
            (self.num_mtp not in (0, 1), "num_mtp must be 0 or 1"),
            (ends != sorted(set(ends)) or ends[0] <= 0, "each stage must end after the one before it"),
            (abs(ends[-1] - 1.0) > 1e-9, "the last stage must end at until = 1.0"),
            (any(len(s.role_weights) != 4 for s in self.stage), "role_weights needs four numbers"),
            (any(not any(s.mix.values()) for s in self.stage), "mix needs a source with a weight above zero"),
            (any(s.mtp_weight and not self.num_mtp for s in self.stage), "mtp_weight needs num_mtp = 1"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise UsageError(f"{where}: {sentence}")

    def stage_at(self, step: int) -> Stage:
        """The stage of a step; steps count from zero."""
        for stage in self.stage:
            if step < stage.until * self.steps:
                return stage
        return self.stage[-1]

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(warm, 1.0, left)

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.row_length * self.accumulate


def _build(kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in raw:
        if name not in known:
            raise UsageError(f"{where}: unknown field {name!r}; the fields are {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name not in raw:
            if item.default is MISSING and item.default_factory is MISSING:
                raise UsageError(f"{where}: field {name!r} is missing")
            continue
        values[name] = _checked(raw[name], hints[name], f"{where}: {name}")
    return kind(**values)


def _checked(value: Any, hint: Any, where: str) -> Any:
    if type(None) in get_args(hint):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))  # TOML has no null
    wanted = get_origin(hint) or hint
    if wanted is Any:
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UsageError(f"{where} must be {_KINDS.get(wanted, wanted.__name__)}, found {value!r}")
    if wanted is list:
        return [_checked(item, get_args(hint)[0], f"{where}: an item") for item in value]
    if wanted is dict:
        return {name: _checked(item, get_args(hint)[1], f"{where}: {name}") for name, item in value.items()}
    return value
