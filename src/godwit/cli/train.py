"""`godwit train`: train from a recipe, with progress on stderr, and export the model."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from godwit.train import parallel
from godwit.train.recipe import Recipe
from godwit.train.trainer import Trainer, active_parameters


def run(recipe: Path, *, resume: bool = True, steps: int | None = None, out: Path | None = None) -> None:
    """Train `recipe` into `out` (default: runs/<its name>) for at most `steps` steps; print the model's path.

    Raises:
        UsageError: an invalid recipe, missing data, or a state of another model in `out`.
        CheckpointError: the state in `out` is damaged or cannot be written.
        GodwitError: the training diverged.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    out = Path("runs") / recipe.stem if out is None else out
    compiles = can_compile()
    trainer = Trainer(Recipe.from_file(recipe), out, compile_kernels=compiles)
    progress = TrainingProgress(trainer, steps)
    progress.begin(out, compiles)
    again = shlex.join(["godwit", "train", str(recipe), "--out", str(out)])
    with Interrupt(trainer, progress) as interrupt:
        try:
            trainer.run(progress.report, resume=resume, stop_after=steps)
        except KeyboardInterrupt:
            progress.say(f"Stopped; steps since the last saved state are lost. To continue: {again}")
            raise
        except Exception:
            if not interrupt.asked:
                raise  # otherwise Ctrl-C may have killed the compiler of a kernel
    if interrupt.asked:
        progress.say(f"Saved after step {trainer.step} of {trainer.recipe.steps}. To continue: {again}")
        raise KeyboardInterrupt
    if trainer.step < trainer.recipe.steps:
        progress.say(f"Ended after step {trainer.step} of {trainer.recipe.steps}. To continue: {again}")
    if parallel.rank() == 0:
        progress.say(f"Exporting the model to {out / 'model'}.")
        trainer.export(out / "model")
        print(out / "model")
    parallel.stop()


def can_compile() -> bool:
    """Whether the C++ compiler used by torch.compile is installed."""
    usual = "clang++" if platform.system() == "Darwin" else "g++"
    return shutil.which(os.environ.get("CXX") or usual) is not None


class Interrupt:
    """On the first Ctrl-C the trainer finishes its step and saves; on the second the program exits."""

    def __init__(self, trainer: Trainer, progress: TrainingProgress) -> None:
        self.trainer, self.progress = trainer, progress
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.previous = signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def __call__(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.trainer.stop()
        self.progress.say("Finishing this step, then saving; press Ctrl-C again to stop now.")


class TrainingProgress:
    """A progress line on stderr, rewritten in place on a terminal; only the first process prints it."""

    def __init__(self, trainer: Trainer, steps: int | None) -> None:
        self.recipe, self.model, self.autocast = trainer.recipe, trainer.model, trainer.autocast
        self.steps = steps
        self.last: int | None = None  # the last step of this run, known after its first
        self.pace: float | None = None  # seconds per step, a moving average
        self.rewrites = sys.stderr.isatty()
        self.open_line = False

    def begin(self, out: Path, compiles: bool) -> None:
        """Show what will be trained."""
        total = sum(param.numel() for param in self.model.parameters()) / 1e6
        active = active_parameters(self.model) / 1e6
        self.say(
            f"Training {total:,.1f} M parameters ({active:,.1f} M active) for {self.recipe.steps:,} steps "
            f"of {self.recipe.tokens_per_step:,} tokens into {out}."
        )
        self.say(_arithmetic(self.autocast, chosen=self.recipe.autocast is None))
        if compiles:
            self.say("The first step compiles the kernels, which takes about a minute.")
        else:
            self.say("There is no C++ compiler to compile the kernels; training is several times slower.")

    def report(self, record: dict[str, Any]) -> None:
        """Show the record of a step."""
        step = record["step"]
        if self.last is None:
            self.last = min(self.recipe.steps, step - 1 + (self.steps or self.recipe.steps))
            self.pace = None  # the first step includes compilation
        elif self.pace is None:
            self.pace = record["seconds"]
        else:
            self.pace += 0.1 * (record["seconds"] - self.pace)
        left = "?" if self.pace is None else duration_text(self.pace * (self.last - step))
        self._show(line_text(record, self.recipe.steps, left))
        if "evaluation" in record:
            bits = ", ".join(f"{name} {value:.4f}" for name, value in record["evaluation"].items())
            self.say(f"step {step}: held-out bits per byte: {bits}")

    def say(self, sentence: str) -> None:
        """Show a separate line."""
        self._show(sentence)
        if self.open_line:
            print(file=sys.stderr)
            self.open_line = False

    def _show(self, text: str) -> None:
        if parallel.rank() > 0:
            return
        if self.rewrites:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self.open_line = True
        else:
            print(text, file=sys.stderr, flush=True)


def _arithmetic(autocast: bool, chosen: bool) -> str:
    """The dtype of matrix products, and the reason for it."""
    if not chosen:
        return f"Matrix products run in {'bfloat16' if autocast else 'float32'}, as the recipe says."
    if autocast:
        return "Matrix products run in bfloat16, which is fast on this CPU (set autocast to change it)."
    return "Matrix products run in float32, as bfloat16 is slow on this CPU (set autocast to change it)."


def line_text(record: dict[str, Any], steps: int, left: str) -> str:
    """Step, losses, speed, expert balance (the busiest expert's load relative to the mean) and time left."""
    mtp = f"  mtp {record['mtp_loss']:.3f}" if record["mtp_loss"] else ""
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.3f}{mtp}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['gflops']:,.0f} GFLOP/s  "
        f"balance {record['balance']:.2f}  left {left}"
    )


def duration_text(seconds: float) -> str:
    """A duration such as 2h05m, 12m or 40s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)}s"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m"
