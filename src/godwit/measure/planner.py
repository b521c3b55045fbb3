"""What a model weighs and what fits: parameters part by part, bytes of cache and state, the memory for them.

All of it follows from the configuration: the model is laid out on the meta device, which holds no numbers.
Bytes of weights and caches are those of bfloat16; the recurrent state is float32 as in every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from godwit.config import GatedDeltaNetSpec, ModelConfig, MoeSpec
from godwit.errors import CheckpointError
from godwit.models.caches import PagedKVSpec, RecurrentSpec
from godwit.models.causal_lm import CausalLM

DTYPE = torch.bfloat16

#: What the parts of a model are called, in the order of a report.
PARTS = MappingProxyType(
    {
        "delta": "delta mixers",
        "attention": "attention mixers",
        "routers": "routers",
        "experts": "experts",
        "shared": "shared experts and gates",
        "dense": "dense feed-forward",
        "norms": "norms between",
        "embedding": "embedding",
        "head": "head",
        "mtp": "multi-token prediction",
    }
)


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part: all, and those that decoding one token reads."""

    total: int = 0
    active: int = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; bytes unless called parameters.

    Attributes:
        parts: by the names of :data:`PARTS`. A head tied to the embedding owns nothing but is read whole; the
            module for multi-token prediction is not needed to decode and counts as inactive.
        kv_per_token: keys and values of the trunk's attention layers.
        mtp_kv_per_token: the same of the multi-token-prediction module.
        state, conv: per sequence, whatever its length.
    """

    parts: dict[str, PartSize]
    kv_per_token: int
    mtp_kv_per_token: int
    state: int
    conv: int

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that decoding one token reads; of the embedding it is a single row, left out here."""
        return sum(part.active for part in self.parts.values())

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.total * DTYPE.itemsize

    def cache(self, context: int) -> int:
        """Bytes that a sequence of ``context`` tokens keeps."""
        return (self.kv_per_token + self.mtp_kv_per_token) * context + self.state + self.conv

    def resident(self, context: int) -> int:
        """Bytes of the weights and one sequence of ``context`` tokens."""
        return self.weights + self.cache(context)

    def read_per_token(self, context: int) -> int:
        """Bytes that decoding one token after ``context`` others moves: weights, cache, state in and out."""
        kv = self.kv_per_token * (context + 1)
        return self.active * DTYPE.itemsize + kv + 2 * (self.state + self.conv)

    def context_in(self, budget: int, limit: int) -> int:
        """The longest context, up to ``limit``, that ``budget`` bytes hold beside the weights."""
        room = budget - self.resident(0)
        if room < 0:
            return 0
        per_token = self.kv_per_token + self.mtp_kv_per_token
        return min(limit, room // per_token) if per_token else limit


def sizes_of(config: ModelConfig, num_mtp: int = 0) -> Sizes:
    """Sizes of a model of this configuration with ``num_mtp`` layers for multi-token prediction.

    Raises:
        CheckpointError: the configuration describes tensors that no machine can address.
    """
    try:
        with torch.device("meta"):
            model = CausalLM(config, num_mtp).to(DTYPE)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(
            "the config describes tensors too large for any machine; fetch it again"
        ) from error
    specs = model.cache_specs()
    trunk, mtp = specs[: len(config.layers)], specs[len(config.layers) :]
    delta = [spec for spec in trunk if isinstance(spec, RecurrentSpec)]
    return Sizes(
        _parts(model),
        _kv_bytes(trunk),
        _kv_bytes(mtp),
        sum(spec.state_bytes for spec in delta),
        sum(spec.conv_bytes for spec in delta),
    )


def _kv_bytes(specs: Iterable[object]) -> int:
    return sum(spec.bytes_per_token for spec in specs if isinstance(spec, PagedKVSpec))


def _parts(model: CausalLM) -> dict[str, PartSize]:
    counts = {name: [0, 0] for name in PARTS}
    for name, param in model.named_parameters():
        part = part_of(name, model.config)
        counts[part][0] += param.numel()
        counts[part][1] += _active(name, part, param.numel(), model.config)
    if model.head is None:
        counts["head"][1] = model.head_weight.numel()
    return {name: PartSize(*count) for name, count in counts.items()}


def part_of(name: str, config: ModelConfig) -> str:
    """Which of :data:`PARTS` a parameter belongs to, by its name."""
    top = name.split(".")[0]
    if top in ("embedding", "head", "mtp"):
        return top
    if top == "norm" or ".input_norm." in name or ".ffn_norm." in name:
        return "norms"
    if ".mixer." in name:
        return "delta" if isinstance(config.layers[_layer(name)].mixer, GatedDeltaNetSpec) else "attention"
    for mark, part in ((".router.", "routers"), (".experts.", "experts"), (".shared_", "shared")):
        if mark in name:
            return part
    return "dense"


def _active(name: str, part: str, count: int, config: ModelConfig) -> int:
    if part in ("embedding", "mtp"):
        return 0
    if part == "experts":
        ffn = config.layers[_layer(name)].ffn
        return count * ffn.top_k // ffn.num_experts if isinstance(ffn, MoeSpec) else count
    return count


def _layer(name: str) -> int:
    """Number of the layer in ``layers.7.mixer.weight``."""
    return int(name.split(".")[1])
