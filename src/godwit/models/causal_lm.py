"""CausalLM: embedding, decoder layers, final norm, head, and the multi-token-prediction module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from godwit.config import LayerSpec, ModelConfig
from godwit.errors import UsageError
from godwit.kernels import ops
from godwit.models.batch import ForwardBatch
from godwit.models.caches import Caches, CacheSpec, PagedKV, RecurrentState, cache_spec
from godwit.models.layers import Embedding, Experts, Linear, build_ffn, build_norm
from godwit.models.mixers import GatedDeltaNet, build_mixer
from godwit.qtensor import QuantTensor


class DecoderLayer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, spec: LayerSpec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.input_norm = build_norm(config.hidden_size, config)
        self.mixer = build_mixer(spec.mixer, config)
        self.ffn_norm = build_norm(config.hidden_size, config)
        self.ffn = build_ffn(spec.ffn, config)

    def forward(
        self,
        x: Tensor,
        batch: ForwardBatch,
        caches: Caches | None = None,
        cache: object | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        x = x + self.mixer(self.input_norm(x), batch, caches, cache)
        out: Tensor = x + self.ffn(self.ffn_norm(x), router_logits)
        return out

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        """The layer's cache, in ``dtype`` unless its mixer specifies another one."""
        return cache_spec(self.spec.mixer, self.mixer.cache_dtype or dtype)


class Stack(Protocol):
    """Runs decoder layers and the norm after them, instead of the modules' own ``forward``."""

    def __call__(
        self,
        x: Tensor,
        batch: ForwardBatch,
        caches: Sequence[PagedKV | RecurrentState] | None,
        pending: Sequence[int],
        router_logits: list[Tensor] | None,
    ) -> Tensor:
        """``x [T, H]`` through all layers, normed; ``pending`` counts the journaled tokens of each row."""
        ...


class MTPHead(nn.Module):
    """Predicts one token further: the trunk's normed state joined with the next embedding, one layer, a norm.

    It uses the trunk's embedding and head. DeepSeek-V3 (2024) describes the module; sizes follow Qwen3-Next.
    """

    stack: Stack | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = build_norm(config.hidden_size, config)
        self.hidden_norm = build_norm(config.hidden_size, config)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config.mtp_layer, config)])
        self.norm = build_norm(config.hidden_size, config)

    def forward(
        self,
        hidden: Tensor,
        next_embeddings: Tensor,
        batch: ForwardBatch,
        caches: Caches | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Slot p joins ``hidden [T, H]`` of token p with the embedding of token p + 1; result ``[T, H]``."""
        joined = torch.cat((self.embedding_norm(next_embeddings), self.hidden_norm(hidden)), -1)
        x = self.fc(joined)
        if self.stack is not None:
            return self.stack(x, batch, caches.mtp if caches else None, (), router_logits)
        for index, layer in enumerate(self.layers):
            x = layer(x, batch, caches, caches.mtp[index] if caches else None, router_logits)
        out: Tensor = self.norm(x)
        return out


class CausalLM(nn.Module):
    """A decoder of any supported family.

    Args:
        config: what to build.
        num_mtp: MTP layers; None: the config's number, or 0.

    Attributes:
        stack: runs the layers of a model with packed weights; None: the modules run themselves.
    """

    stack: Stack | None = None

    def __init__(self, config: ModelConfig, num_mtp: int | None = None) -> None:
        super().__init__()
        self.config = config
        num_mtp = config.num_mtp_layers or 0 if num_mtp is None else num_mtp
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(spec, config) for spec in config.layers])
        self.norm = build_norm(config.hidden_size, config)
        self.mtp = MTPHead(config) if num_mtp else None
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def num_mtp(self) -> int:
        """MTP layers: 0 or 1."""
        return int(self.mtp is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; float32 with packed weights."""
        weight = _held(self.embedding)
        return torch.float32 if isinstance(weight, QuantTensor) else weight.dtype

    @property
    def device(self) -> torch.device:
        weight = _held(self.embedding)
        return weight.data.device if isinstance(weight, QuantTensor) else weight.device

    @property
    def head_weight(self) -> Tensor:
        """``[V, H]``, the embedding's if they are tied; only without packed weights."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, batch: ForwardBatch, caches: Caches | None = None, *, router_logits: list[Tensor] | None = None
    ) -> Tensor:
        """Normed hidden states ``[T, H]`` of the packed tokens; ``caches=None`` for training and scoring.

        Args:
            batch: the tokens; see :class:`ForwardBatch`.
            caches: advanced in place.
            router_logits: receives one ``[T, E]`` tensor per sparse layer.

        Raises:
            UsageError: more tentative tokens than the step has, or than the caches can undo.
        """
        if caches is not None:
            self._check_tentative(batch, caches)
        x = self.embedding(batch.input_ids)
        out: Tensor
        if self.stack is not None:
            pending = [caches.pending[row] for row in batch.state_indices] if caches else []
            out = self.stack(x, batch, caches.layers if caches else None, pending, router_logits)
        else:
            for index, layer in enumerate(self.layers):
                x = layer(x, batch, caches, caches.layers[index] if caches else None, router_logits)
            out = self.norm(x)
        if caches is not None:
            for row, count in zip(batch.state_indices, batch.num_tentative, strict=True):
                caches.pending[row] = count
        return out

    def forward_mtp(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        batch: ForwardBatch,
        caches: Caches | None = None,
        *,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """States ``[T, H]`` whose logits predict the token after ``next_ids [T]``.

        Raises:
            UsageError: the model has no MTP module.
        """
        if self.mtp is None:
            raise UsageError("this model has no MTP module")
        out: Tensor = self.mtp(hidden, self.embedding(next_ids), batch, caches, router_logits)
        return out

    def compute_logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits ``[T or len(rows), V]`` in the activation dtype."""
        return ops.linear(
            hidden if rows is None else hidden[rows],
            _held(self.embedding if self.head is None else self.head),
        )

    def cache_specs(self) -> list[CacheSpec]:
        """One spec per layer, the MTP layer's last."""
        return [layer.cache_spec(self.dtype) for layer in self.all_layers()]

    def allocate_caches(self, num_blocks: int, num_rows: int = 1, max_rollback: int = 0) -> Caches:
        """Zeroed caches for this model on its device."""
        return Caches.allocate(
            self.cache_specs(),
            num_blocks,
            num_rows,
            num_mtp=self.num_mtp,
            max_rollback=max_rollback,
            device=self.device,
        )

    def all_layers(self) -> list[DecoderLayer]:
        """The decoder layers, the MTP module's last."""
        layers = [*self.layers, *(self.mtp.layers if self.mtp is not None else ())]
        return [layer for layer in layers if isinstance(layer, DecoderLayer)]

    def _check_tentative(self, batch: ForwardBatch, caches: Caches) -> None:
        for count, length in zip(batch.num_tentative, batch.lengths, strict=True):
            if not 0 <= count <= min(length, caches.max_rollback):
                raise UsageError(
                    f"{count} tentative tokens in a step of {length}; "
                    f"the caches can undo {caches.max_rollback}"
                )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """New weights: normal with the config's deviation, neutral norms, decays from U(0.01, 16)."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, Linear | Embedding):
                module.weight.normal_(0.0, std, generator=generator)
            elif isinstance(module, Experts):
                module.w13.normal_(0.0, std, generator=generator)
                module.w2.normal_(0.0, std, generator=generator)
            elif isinstance(module, GatedDeltaNet):
                bound = 1.0 / math.sqrt(module.spec.conv_kernel)
                module.conv_weight.uniform_(-bound, bound, generator=generator)
                module.A_log.uniform_(0.01, 16.0, generator=generator).log_()


def _held(module: Embedding | Linear) -> Tensor | QuantTensor:
    """A module's weight, which in a packed model is not a parameter."""
    held: Tensor | QuantTensor = module.weight
    return held


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in float32; targets of -100 are ignored."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100)
