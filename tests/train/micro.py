"""A model of some ten thousand parameters, what it learns from, and runs of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from godwit.train.recipe import Recipe
from godwit.train.trainer import Trainer

VOCAB = 64
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size": 32,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}

Document = tuple[list[int], list[int]]


def write_source(directory: Path, name: str, documents: list[Document], *, sizes: bool = False) -> None:
    """Save (tokens, roles) pairs as a source; with ``sizes`` two bytes a learned token."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate([np.asarray(ids, np.uint16) for ids, _ in documents])
    roles = np.concatenate([np.asarray(codes, np.uint8) for _, codes in documents])
    np.save(directory / f"{name}.tokens.npy", tokens)
    np.save(directory / f"{name}.roles.npy", roles)
    np.save(directory / f"{name}.offsets.npy", np.cumsum([0] + [len(ids) for ids, _ in documents]))
    if sizes:
        learned = [2 * sum(code == 0 for code in codes[1:]) for _, codes in documents]
        np.save(directory / f"{name}.bytes.npy", np.asarray(learned))


def documents(count: int, low: int, high: int, seed: int = 0, vocab: int = VOCAB) -> list[Document]:
    """Counting up by a step that the first token names, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length, step = int(rng.integers(low, high + 1)), int(rng.integers(1, 6))
        ids = [step, *((step * np.arange(1, length) + rng.integers(vocab)) % vocab).tolist()]
        codes = [2, *rng.choice(3, length - 1, p=[0.7, 0.2, 0.1]).tolist()]
        made.append((ids, codes))
    return made


def write_data(directory: Path) -> Path:
    """Sources ``a`` (short documents), ``b`` (longer) and ``held``, and what stands for a tokenizer."""
    write_source(directory, "a", documents(200, 2, 40, seed=1))
    write_source(directory, "b", documents(60, 30, 150, seed=2))
    write_source(directory, "held", documents(12, 5, 160, seed=3), sizes=True)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def write_recipe(directory: Path) -> Path:
    """A recipe and its data: 8 steps, saved at 3 and 6, a new stage at 4."""
    write_data(directory / "data")
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in MODEL.items())
    path = directory / "micro.toml"
    path.write_text(
        f"""
data = "data"
tokenizer = "data"
steps = 8
row_length = 128
rows = 2
learning_rate = 1e-2
warmup_steps = 2
save_every = 3
evaluate_every = 4
evaluate_on = ["held"]
autocast = false

[[stage]]
until = 0.5
mix = {{ a = 1, b = 1.0 }}

[[stage]]
until = 1.0
mtp_weight = 0.3
mix = {{ a = 0.2, b = 0.8 }}

[model]
{model}
"""
    )
    return path


@contextmanager
def number_modes() -> Iterator[None]:
    """One thread, so that sums have one order; what comes after a trainer shall not flush subnormals."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without what the clock decides."""
    clock = ("seconds", "tokens_per_second", "gflops")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in clock} for record in records]


def train(recipe: Recipe, out: Path, *, resume: bool = True, stop_after: int | None = None) -> Trainer:
    """Run a recipe with the plain kernels."""
    trainer = Trainer(recipe, out, compile_kernels=False)
    trainer.run(lambda record: None, resume=resume, stop_after=stop_after)
    return trainer
