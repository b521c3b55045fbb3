"""The training loop: deterministic and resumable."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from godwit.config import ModelConfig, MoeSpec
from godwit.errors import CheckpointError, GodwitError, UsageError
from godwit.kernels import ops
from godwit.kernels.bfloat16 import multiplies_bf16_fast
from godwit.kernels.training import LinearCrossEntropy
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model, save_model
from godwit.train import parallel
from godwit.train.data import PackedBatch, RowSampler, TokenSource
from godwit.train.evaluate import HeldOut
from godwit.train.losses import ExpertLoad, expert_balance, load_balancing_loss, role_weights
from godwit.train.optim import build_optimizers
from godwit.train.recipe import Recipe, Stage

Report = Callable[[dict[str, Any]], None]


@dataclass
class StepLosses:
    """Losses summed over a step, for the log."""

    main: float = 0.0
    mtp: float = 0.0
    aux: float = 0.0
    load: ExpertLoad = field(default_factory=ExpertLoad)


class Trainer:
    """Trains a recipe into a directory.

    Args:
        recipe: the training recipe.
        out: directory for state and log.
        compile_kernels: use fused, compiled kernels (fast after half a minute of compilation).

    Attributes:
        autocast: whether matrix products run in bfloat16.

    Raises:
        UsageError: the data do not match the recipe, or the recipe the number of processes.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, compile_kernels: bool = True) -> None:
        # decay produces subnormal numbers, which are a hundred times slower and do not affect the result
        torch.set_flush_denormal(True)
        if compile_kernels:
            ops.use_training_kernels()
        parallel.start()
        if recipe.accumulate % parallel.world_size():
            raise UsageError(
                f"cannot divide {recipe.accumulate} micro-batches among {parallel.world_size()} processes; "
                "make accumulate a multiple of the number of processes"
            )
        self.recipe = recipe
        self.autocast = multiplies_bf16_fast() if recipe.autocast is None else recipe.autocast
        self.out = Path(out)
        if not (Path(recipe.tokenizer) / "tokenizer.json").is_file():
            raise UsageError(
                f"{recipe.tokenizer}: no tokenizer.json; set tokenizer to the model's tokenizer directory"
            )
        self.config = ModelConfig.from_dict(recipe.model)
        self.model = CausalLM(self.config, recipe.num_mtp)
        self.model.init_weights(torch.Generator().manual_seed(recipe.seed))
        if recipe.init:
            self._start_from(recipe.init)
        self.optimizers = build_optimizers(self.model, recipe)
        names = {name for stage in recipe.stage for name in stage.mix}
        sources = {name: TokenSource.open(recipe.data, name) for name in sorted(names)}
        self.sampler = RowSampler(sources, recipe.row_length, recipe.rows, recipe.seed)
        self.cross_entropy = LinearCrossEntropy(compile_parts=compile_kernels)
        self.held_out = {
            name: HeldOut(recipe.data, name, recipe.row_length, recipe.rows, recipe.evaluate_batches)
            for name in recipe.evaluate_on
        }
        for name in sorted(names | set(recipe.evaluate_on)):
            self._check_vocabulary(TokenSource.open(recipe.data, name))
        self.flops_per_token = 6 * active_parameters(self.model)
        sparse = [layer.ffn for layer in self.config.layers if isinstance(layer.ffn, MoeSpec)]
        self.top_k = sparse[0].top_k if sparse else 1
        self.step = self.tokens = 0  # done so far
        self._saved_step = 0
        self._stop_asked = self._stop_agreed = False

    def _start_from(self, source: str) -> None:
        model = load_model(source, dtype=torch.float32)
        if replace(model.config, raw={}) != replace(self.config, raw={}):
            raise UsageError(
                f"init: the config.json of {source} differs from the recipe's [model]; make them equal"
            )
        try:
            self.model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise UsageError(
                f"init: {source} has a different number of MTP layers than num_mtp; make them equal"
            ) from error

    def _check_vocabulary(self, source: TokenSource) -> None:
        top = int(source.tokens.max())
        if top >= self.config.vocab_size:
            raise UsageError(
                f"source {source.name!r} has token {top}, but vocab_size is {self.config.vocab_size}; "
                "prepare the data with the model's tokenizer"
            )

    def run(self, report: Report, *, resume: bool = True, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or for ``stop_after`` more steps; ``report`` is called after each.

        The process may be killed at any time: the last saved state stays intact, and a resumed run repeats
        the lost steps exactly. Without ``resume``, an existing state and log are replaced.

        Raises:
            CheckpointError: the saved state is damaged, does not match the recipe, or cannot be written.
            UsageError: the saved state is of a different model.
            GodwitError: the training diverged.
        """
        if resume:
            self._resume()
        if parallel.rank() == 0:
            self._clear_later_traces()
        last = self.recipe.steps if stop_after is None else min(self.recipe.steps, self.step + stop_after)
        while self.step < last and not self._stop_agreed:
            record = self._timed_step()
            self.step += 1
            if self.held_out and self._due(self.recipe.evaluate_every):
                record["evaluation"] = self.evaluate()
            if parallel.rank() > 0:
                continue
            with self._log_file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            if self._due(self.recipe.save_every):
                self.save()
            report(record)
        if parallel.rank() == 0 and self.step > self._saved_step:
            self.save()

    def stop(self) -> None:
        """Make :meth:`run` save and return after the current step; safe to call from a signal handler."""
        self._stop_asked = True

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.recipe.steps)

    def _timed_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        losses, norm = self._train_step()
        seconds = time.perf_counter() - started
        tokens = self.recipe.tokens_per_step
        self.tokens += tokens
        return {
            "step": self.step + 1,
            "loss": round(losses.main, 6),
            "mtp_loss": round(losses.mtp, 6),
            "aux_loss": round(losses.aux, 6),
            "balance": round(expert_balance(losses.load), 3),
            "gradient_norm": round(norm, 4),
            "learning_rate": self.recipe.learning_rate_at(self.step),
            "tokens": self.tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "gflops": round(tokens / seconds * self.flops_per_token / 1e9, 1),
            "seconds": round(seconds, 3),
        }

    def _train_step(self) -> tuple[StepLosses, float]:
        stage = self.recipe.stage_at(self.step)
        if self.step > 0 and self.recipe.stage_at(self.step - 1) is not stage:
            self.sampler.start_stage()
        batches = [self.sampler.batch(stage.mix) for _ in range(self.recipe.accumulate)]
        main = sum(float(role_weights(b.roles, stage.role_weights).sum()) for b in batches)
        second = sum(float(role_weights(b.roles2, stage.role_weights).sum()) for b in batches)
        losses = StepLosses()
        for batch in batches[parallel.rank() :: parallel.world_size()]:
            self._backward(batch, stage, max(main, 1.0), max(second, 1.0), losses)
        parallel.sum_gradients(self.model.parameters())
        sums = parallel.sum_scalars([losses.main, losses.mtp, losses.aux, float(self._stop_asked)])
        losses.main, losses.mtp, losses.aux, stop = sums
        self._stop_agreed = stop > 0
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if not math.isfinite(norm):
            raise GodwitError(
                f"step {self.step + 1} diverged (the gradient norm is {norm}) and was not saved; "
                "lower learning_rate and resume from the last saved state"
            )
        rate = self.recipe.learning_rate_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def _backward(
        self, batch: PackedBatch, stage: Stage, main: float, second: float, losses: StepLosses
    ) -> None:
        logits: list[Tensor] = []
        forward = ForwardBatch.packed(batch.input_ids, batch.lengths, self.recipe.row_length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = self.model(forward, router_logits=logits)
            weights = role_weights(batch.roles, stage.role_weights) / main
            loss = self.cross_entropy(hidden, self.model.head_weight, batch.targets, weights)
            losses.main += loss.item()
            if stage.mtp_weight:
                deeper = self.model.forward_mtp(hidden, batch.targets, forward, router_logits=logits)
                weights2 = role_weights(batch.roles2, stage.role_weights) / second
                mtp = self.cross_entropy(deeper, self.model.head_weight, batch.targets2, weights2)
                losses.mtp += mtp.item()
                loss = loss + stage.mtp_weight * mtp
            if logits:
                aux = load_balancing_loss(logits, self.top_k, pooled=False, load=losses.load)
                aux = aux / self.recipe.accumulate
                losses.aux += aux.item()
                loss = loss + self.recipe.aux_weight * aux
        loss.backward()  # type: ignore[no-untyped-call]

    def evaluate(self) -> dict[str, float]:
        """Bits per byte on the held-out sources."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return {
                name: round(held_out.bits_per_byte(self.model, self.cross_entropy), 4)
                for name, held_out in self.held_out.items()
            }

    @property
    def _state_file(self) -> Path:
        return self.out / "state.pt"

    @property
    def _log_file(self) -> Path:
        return self.out / "log.jsonl"

    def _clear_later_traces(self) -> None:
        """Drop log lines of steps that will be repeated, and the old state when starting over."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            self._state_file.unlink(missing_ok=True)
        lines = self._log_file.read_text(encoding="utf-8").splitlines() if self._log_file.is_file() else []
        temporary = self._log_file.with_suffix(".tmp")
        temporary.write_text("".join(f"{x}\n" for x in lines if _step_of(x) <= self.step), encoding="utf-8")
        temporary.replace(self._log_file)

    def save(self) -> None:
        """Write the state under a temporary name, then rename it.

        Raises:
            CheckpointError: it could not be written; the previous state is intact.
        """
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sampler": self.sampler.state(),
            "config": json.dumps(dict(self.config.raw)),
        }
        temporary = self._state_file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._state_file)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"could not write {self._state_file} ({error}); the previously saved state is intact"
            ) from error
        self._saved_step = self.step

    def _resume(self) -> None:
        if not self._state_file.is_file():
            return
        try:
            state = torch.load(self._state_file, weights_only=True)
            same_model = json.loads(state["config"]) == json.loads(json.dumps(dict(self.config.raw)))
        except Exception as error:  # a damaged archive can make the unpickler raise anything
            raise CheckpointError(
                f"{self._state_file} is damaged; restore it from a backup, or start over with --no-resume"
            ) from error
        if not same_model:
            raise UsageError(f"{self._state_file} belongs to another model; use another --out or --no-resume")
        try:
            self._restore(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._state_file} does not match the recipe's optimizer or num_mtp; "
                "change them back, or start over with --no-resume"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)  # keep the recipe's weight decay and betas, which may have changed
        self.sampler.load_state(state["sampler"])
        self.step = self._saved_step = int(state["step"])
        self.tokens = int(state.get("tokens", self.step * self.recipe.tokens_per_step))

    def export(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the model in the Hugging Face layout, together with the recipe's tokenizer."""
        copy = CausalLM(self.config, self.recipe.num_mtp).to(dtype)
        copy.load_state_dict({name: value.to(dtype) for name, value in self.model.state_dict().items()})
        save_model(copy, path, companions=self.recipe.tokenizer, overwrite=True)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for a line that a kill truncated."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def active_parameters(model: CausalLM) -> int:
    """Matrix parameters used per token: all except norms, inactive experts and the embedding lookup."""
    total = model.head_weight.numel()
    for layer, spec in zip(model.layers, model.config.layers, strict=True):
        for name, param in layer.named_parameters():
            if param.ndim < 2:
                continue
            used = param.numel()
            if ".experts." in name and isinstance(spec.ffn, MoeSpec):
                used = used * spec.ffn.top_k // spec.ffn.num_experts
            total += used
    return total
