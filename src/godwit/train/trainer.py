"""The training loop: deterministic, resumable at any moment, one line of progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from godwit.config import ModelConfig, MoeSpec
from godwit.errors import CheckpointError, UsageError
from godwit.kernels import ops
from godwit.kernels.training import LinearCrossEntropy
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import save_model
from godwit.train.data import PackedBatch, Sampler, Source
from godwit.train.evaluate import HeldOut
from godwit.train.losses import expert_balance, load_balancing_loss, role_weights
from godwit.train.optim import build_optimizers
from godwit.train.recipe import Recipe, Stage

Report = Callable[[dict[str, Any]], None]


@dataclass
class StepLosses:
    """Sums over a step, for the log."""

    main: float = 0.0
    mtp: float = 0.0
    aux: float = 0.0
    balance: float = 1.0


class Trainer:
    """Trains a recipe into a directory.

    Args:
        recipe: what to do.
        out: directory for state, log and the exported model.
        compile_kernels: fused, compiled kernels (fast, half a minute of warm-up) or the plain ones.

    Raises:
        UsageError: the data or the recipe do not fit together.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, compile_kernels: bool = True) -> None:
        # decays breed subnormal numbers, which cost a hundred times a normal one and carry nothing
        torch.set_flush_denormal(True)
        if compile_kernels:
            ops.use_training_kernels()
        self.recipe = recipe
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.config = ModelConfig.from_dict(recipe.model)
        self.model = CausalLM(self.config, recipe.num_mtp)
        self.model.init_weights(torch.Generator().manual_seed(recipe.seed))
        self.optimizers = build_optimizers(self.model, recipe)
        names = {name for stage in recipe.stage for name in stage.mix}
        sources = {name: Source.open(recipe.data, name) for name in sorted(names)}
        self._check_vocabulary(sources)
        self.sampler = Sampler(sources, recipe.row_length, recipe.rows, recipe.seed)
        self.cross_entropy = LinearCrossEntropy(compile_parts=compile_kernels)
        self.held_out = {
            name: HeldOut(recipe.data, name, recipe.row_length, recipe.rows, recipe.evaluate_batches)
            for name in recipe.evaluate_on
        }
        self.flops_per_token = 6 * active_parameters(self.model)
        sparse = [layer.ffn for layer in self.config.layers if isinstance(layer.ffn, MoeSpec)]
        self.top_k = sparse[0].top_k if sparse else 1
        self.step = 0

    def _check_vocabulary(self, sources: dict[str, Source]) -> None:
        for source in sources.values():
            top = int(source.tokens[: 2**22].max())
            if top >= self.config.vocab_size:
                raise UsageError(
                    f"source {source.name!r} holds token {top} but the model has {self.config.vocab_size}; "
                    "prepare the data with the model's own tokenizer"
                )

    def run(self, report: Report, *, resume: bool = True, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or ``stop_after`` more steps; ``report`` gets one record a step.

        Interrupting is safe: the last saved state is complete, and a resumed run repeats the lost steps exactly.
        """
        if resume:
            self._resume()
        last = self.recipe.steps if stop_after is None else min(self.recipe.steps, self.step + stop_after)
        while self.step < last:
            record = self._timed_step()
            self.step += 1
            if self._due(self.recipe.evaluate_every):
                record["evaluation"] = self.evaluate()
            if self._due(self.recipe.save_every) or self.step == last:
                self.save()
            report(record)
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.recipe.steps)

    def _timed_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        losses, norm = self._train_step()
        seconds = time.perf_counter() - started
        tokens = self.recipe.tokens_per_step
        return {
            "step": self.step + 1,
            "loss": round(losses.main, 6),
            "mtp_loss": round(losses.mtp, 6),
            "aux_loss": round(losses.aux, 6),
            "balance": round(losses.balance, 3),
            "gradient_norm": round(norm, 4),
            "learning_rate": self.recipe.learning_rate_at(self.step),
            "tokens": (self.step + 1) * tokens,
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
        for batch in batches:
            self._backward(batch, stage, max(main, 1.0), max(second, 1.0), losses)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        rate = self.recipe.learning_rate_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def _backward(self, batch: PackedBatch, stage: Stage, main: float, second: float, losses: StepLosses) -> None:
        logits: list[Tensor] = []
        forward = ForwardBatch.packed(batch.input_ids, batch.lengths, self.recipe.row_length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
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
                aux = load_balancing_loss(logits, self.top_k, pooled=False) / self.recipe.accumulate
                losses.aux += aux.item()
                losses.balance = expert_balance(logits, self.top_k)
                loss = loss + self.recipe.aux_weight * aux
        loss.backward()  # type: ignore[no-untyped-call]

    def evaluate(self) -> dict[str, float]:
        """Bits per byte on the held-out sources."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            return {
                name: round(held_out.bits_per_byte(self.model, self.cross_entropy), 4)
                for name, held_out in self.held_out.items()
            }

    @property
    def _state_file(self) -> Path:
        return self.out / "state.pt"

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sampler": self.sampler.state(),
            "config": json.dumps(dict(self.config.raw)),
        }
        temporary = self._state_file.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state_file)

    def _resume(self) -> None:
        if not self._state_file.is_file():
            return
        try:
            state = torch.load(self._state_file, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self._state_file} cannot be read ({error}); remove it to start again") from error
        if state["config"] != json.dumps(dict(self.config.raw)):
            raise UsageError(f"{self._state_file} belongs to another model; use another --out or --no-resume")
        self.step = int(state["step"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.load_state(state["sampler"])

    def export(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the model in the Hugging Face layout, with the recipe's tokenizer."""
        copy = CausalLM(self.config, self.recipe.num_mtp).to(dtype)
        copy.load_state_dict({name: value.to(dtype) for name, value in self.model.state_dict().items()})
        save_model(copy, path, companions=self.recipe.tokenizer, overwrite=True)


def active_parameters(model: CausalLM) -> int:
    """Matrix parameters that one token multiplies: everything but norms, unused experts and the embedding rows."""
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
