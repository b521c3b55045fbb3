"""The training loop: deterministic, resumable at any moment, one line of progress."""

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
    """Sums over a step, for the log."""

    main: float = 0.0
    mtp: float = 0.0
    aux: float = 0.0
    load: ExpertLoad = field(default_factory=ExpertLoad)


class Trainer:
    """Trains a recipe into a directory.

    Args:
        recipe: what to do.
        out: directory for state, log and the exported model.
        compile_kernels: fused, compiled kernels (fast, half a minute of warm-up) or the plain ones.

    Attributes:
        autocast: whether matrix products run in bfloat16.

    Raises:
        UsageError: the data or the recipe do not fit together.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, compile_kernels: bool = True) -> None:
        # decays breed subnormal numbers, which cost a hundred times a normal one and carry nothing
        torch.set_flush_denormal(True)
        if compile_kernels:
            ops.use_training_kernels()
        parallel.start()
        if recipe.accumulate % parallel.world_size():
            raise UsageError(
                f"{recipe.accumulate} micro-batches cannot be dealt to {parallel.world_size()} processes; "
                "make accumulate a multiple of their number"
            )
        self.recipe = recipe
        self.autocast = multiplies_bf16_fast() if recipe.autocast is None else recipe.autocast
        self.out = Path(out)
        if not (Path(recipe.tokenizer) / "tokenizer.json").is_file():
            raise UsageError(f"{recipe.tokenizer}: holds no tokenizer.json, which the model is exported with")
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
                f"init: {source} has another config.json than the recipe's [model]; make them equal"
            )
        try:
            self.model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise UsageError(f"init: {source} has other MTP layers than the recipe's num_mtp") from error

    def _check_vocabulary(self, source: TokenSource) -> None:
        top = int(source.tokens.max())
        if top >= self.config.vocab_size:
            raise UsageError(
                f"source {source.name!r} holds token {top} but the model has {self.config.vocab_size}; "
                "prepare the data with the model's own tokenizer"
            )

    def run(self, report: Report, *, resume: bool = True, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or ``stop_after`` more steps; ``report`` gets one record a step.

        Killing it is safe: the last saved state is whole, and a resumed run repeats the lost steps exactly.
        Without ``resume`` whatever state and log the directory holds make way.

        Raises:
            CheckpointError: the saved state is damaged or does not fit the recipe, or cannot be written.
            UsageError: the saved state belongs to another model.
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
        """Make :meth:`run` save and end after the step at hand; a signal handler may call this."""
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
                f"step {self.step + 1} diverged (the gradient is {norm}); nothing of it was saved: "
                "lower learning_rate and go on from the last saved state"
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
        """Remove what a run that got further left behind: steps of the log that come again, an old state."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            self._state_file.unlink(missing_ok=True)
        lines = self._log_file.read_text(encoding="utf-8").splitlines() if self._log_file.is_file() else []
        temporary = self._log_file.with_suffix(".tmp")
        temporary.write_text("".join(f"{x}\n" for x in lines if _step_of(x) <= self.step), encoding="utf-8")
        temporary.replace(self._log_file)

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename.

        Raises:
            CheckpointError: the disk refuses; the state saved before is still whole.
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
                f"{self._state_file} could not be written ({error}); the state saved before it is still whole"
            ) from error
        self._saved_step = self.step

    def _resume(self) -> None:
        if not self._state_file.is_file():
            return
        try:
            state = torch.load(self._state_file, weights_only=True)
            same_model = json.loads(state["config"]) == json.loads(json.dumps(dict(self.config.raw)))
        except Exception as error:  # whatever a damaged archive makes the unpickler raise
            raise CheckpointError(
                f"{self._state_file} is damaged; put back a copy of it, or start again with --no-resume"
            ) from error
        if not same_model:
            raise UsageError(f"{self._state_file} belongs to another model; use another --out or --no-resume")
        try:
            self._restore(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._state_file} does not fit this recipe's optimiser or num_mtp; "
                "put them back as they were, or start again with --no-resume"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)  # the recipe's weight decay and betas, which may have changed
        self.sampler.load_state(state["sampler"])
        self.step = self._saved_step = int(state["step"])
        self.tokens = int(state.get("tokens", self.step * self.recipe.tokens_per_step))

    def export(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the model in the Hugging Face layout, with the recipe's tokenizer."""
        copy = CausalLM(self.config, self.recipe.num_mtp).to(dtype)
        copy.load_state_dict({name: value.to(dtype) for name, value in self.model.state_dict().items()})
        save_model(copy, path, companions=self.recipe.tokenizer, overwrite=True)


def _step_of(line: str) -> float:
    """The step of a line of the log; a line cut off by a kill is beyond any step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def active_parameters(model: CausalLM) -> int:
    """Matrix parameters that one token multiplies: all but norms, unused experts and the embedding's rows."""
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
