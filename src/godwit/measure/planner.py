"""The size of a model and the memory it needs: parameters by part, bytes of weights, caches and state.

All of it follows from the config. Weights and caches count as bfloat16; the recurrent state is float32, as in
every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from godwit.config import ModelConfig
from godwit.models.caches import cache_spec
from godwit.models.inventory import PARTS, parameters

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part: all of them, and those read to decode one token."""

    total: int = 0
    active: int = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, in bytes unless called parameters.

    Attributes:
        parts: by the names of :data:`~godwit.models.inventory.PARTS`. A head tied to the embedding has no
            parameters but is read whole; the MTP module counts as inactive.
        kv_per_token: keys and values of the decoder layers.
        mtp_kv_per_token: the same for the MTP module.
        state, conv: per sequence, regardless of its length.
    """

    parts: dict[str, PartSize]
    kv_per_token: int
    mtp_kv_per_token: int
    state: int
    conv: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Parameters read to decode one token, without the one row of the embedding."""
        return sum(part.active for part in self.parts.values())

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.total * DTYPE.itemsize

    def cache(self, context: int) -> int:
        """Bytes of the caches of a sequence of ``context`` tokens."""
        return (self.kv_per_token + self.mtp_kv_per_token) * context + self.state + self.conv

    def resident(self, context: int) -> int:
        """Bytes of the weights and one sequence of ``context`` tokens."""
        return self.weights + self.cache(context)

    def read_per_token(self, context: int) -> int:
        """Bytes moved to decode one token after ``context`` others: weights, cache, state in and out."""
        kv = self.kv_per_token * (context + 1)
        return self.active * DTYPE.itemsize + kv + 2 * (self.state + self.conv)

    def context_in(self, budget: int, limit: int) -> int:
        """The longest context, up to ``limit``, that fits in ``budget`` bytes together with the weights."""
        room = budget - self.resident(0)
        if room < 0:
            return 0
        per_token = self.kv_per_token + self.mtp_kv_per_token
        return min(limit, room // per_token) if per_token else limit


def sizes_of(config: ModelConfig, num_mtp: int = 0) -> Sizes:
    """Sizes of a model of this config, with or without (0) its MTP module.

    Raises:
        CheckpointError: the config describes tensors too large for any machine.
        UnsupportedModelError: an MTP module in a model without attention layers.
    """
    parts = _parts(config, num_mtp)
    trunk = [cache_spec(layer.mixer, DTYPE) for layer in config.layers]
    return Sizes(
        parts,
        sum(spec.bytes_per_token for spec in trunk),
        cache_spec(config.mtp_layer.mixer, DTYPE).bytes_per_token if num_mtp else 0,
        sum(spec.state_bytes for spec in trunk),
        sum(spec.conv_bytes for spec in trunk),
    )


def _parts(config: ModelConfig, num_mtp: int) -> dict[str, PartSize]:
    total, active = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for parameter in parameters(config, num_mtp):
        total[parameter.part] += parameter.count
        active[parameter.part] += parameter.active
    if config.tie_embeddings:
        active["head"] = config.vocab_size * config.hidden_size
    return {part: PartSize(total[part], active[part]) for part in PARTS}
