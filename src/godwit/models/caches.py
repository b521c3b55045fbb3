"""A model's caches between steps: their specs and tensors.

Attention layers keep keys and values in blocks of :data:`~godwit.models.batch.BLOCK_SIZE` tokens. Delta
layers keep a window of convolution inputs and a float32 state per sequence. A state cannot be cropped, so the
tokens of a step that may be undone are written to a journal (decay, key and written row of each) and only
enter the state when the next step begins: :meth:`Caches.rollback` drops journal entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from godwit.config import AttentionSpec, GatedDeltaNetSpec, MixerSpec
from godwit.errors import UsageError
from godwit.models.batch import BLOCK_SIZE
from godwit.pages import zeros


@dataclass(frozen=True)
class PagedKVSpec:
    """Keys and values of one attention layer."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    state_bytes: ClassVar[int] = 0
    conv_bytes: ClassVar[int] = 0
    bytes_per_sequence: ClassVar[int] = 0
    journal_bytes: ClassVar[int] = 0

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(
        self, num_blocks: int, num_rows: int, max_rollback: int, device: torch.device | str
    ) -> PagedKV:
        """Zeroed blocks; sequences need no rows."""
        return PagedKV(self, num_blocks, device)


@dataclass(frozen=True)
class RecurrentSpec:
    """Convolution window and state of one delta layer; the state is always float32."""

    conv_dim: int
    conv_history: int
    num_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_dtype: torch.dtype
    bytes_per_token: ClassVar[int] = 0

    @property
    def state_bytes(self) -> int:
        return self.num_heads * self.head_k_dim * self.head_v_dim * 4

    @property
    def conv_bytes(self) -> int:
        return self.conv_dim * self.conv_history * self.conv_dtype.itemsize

    @property
    def bytes_per_sequence(self) -> int:
        return self.state_bytes + self.conv_bytes

    @property
    def journal_bytes(self) -> int:
        """For each sequence and each token of a step that may be undone."""
        written = self.num_heads * (1 + self.head_k_dim + self.head_v_dim) * 4
        return written + self.conv_dim * self.conv_dtype.itemsize

    def allocate(
        self, num_blocks: int, num_rows: int, max_rollback: int, device: torch.device | str
    ) -> RecurrentState:
        """Zeroed rows; no blocks."""
        return RecurrentState(self, num_rows, max_rollback, device)


CacheSpec = PagedKVSpec | RecurrentSpec


def _paged(spec: AttentionSpec, dtype: torch.dtype) -> PagedKVSpec:
    return PagedKVSpec(spec.num_kv_heads, spec.head_dim, dtype)


def _recurrent(spec: GatedDeltaNetSpec, dtype: torch.dtype) -> RecurrentSpec:
    window = spec.conv_kernel - 1
    return RecurrentSpec(spec.conv_dim, window, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim, dtype)


_SPEC_OF: Mapping[type, Callable[[Any, torch.dtype], CacheSpec]] = MappingProxyType(
    {AttentionSpec: _paged, GatedDeltaNetSpec: _recurrent}
)


def cache_spec(mixer: MixerSpec, dtype: torch.dtype) -> CacheSpec:
    """The cache of a layer with this mixer; ``dtype`` of keys and values or of the convolution window."""
    return _SPEC_OF[type(mixer)](mixer, dtype)


class PagedKV:
    """Blocks of one attention layer: ``k`` and ``v`` are ``[blocks, 16, kv_heads, D]``.

    The native kernels order the bytes inside a block their own way (``csrc/kernels.h``, PagedCache).
    """

    def __init__(self, spec: PagedKVSpec, num_blocks: int, device: torch.device | str) -> None:
        shape = (num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
        self.k = zeros(shape, spec.dtype, device)
        self.v = zeros(shape, spec.dtype, device)
        self.native: object | None = None  # the native kernels' view, made at the first use


class RecurrentState:
    """Rows of one delta layer.

    Attributes:
        conv: ``[rows, history + max_rollback, C]`` raw inputs, the newest last.
        state: ``[rows, V, Dk, Dv]`` float32, without the journal's tokens.
        journal_g, journal_k, journal_delta: ``[rows, max_rollback, V, ...]`` float32.
    """

    def __init__(
        self, spec: RecurrentSpec, num_rows: int, max_rollback: int, device: torch.device | str
    ) -> None:
        heads, dk, dv = spec.num_heads, spec.head_k_dim, spec.head_v_dim
        self.history = spec.conv_history
        window = spec.conv_history + max_rollback
        self.conv = zeros((num_rows, window, spec.conv_dim), spec.conv_dtype, device)
        self.state = zeros((num_rows, heads, dk, dv), torch.float32, device)
        self.journal_g = torch.zeros(num_rows, max_rollback, heads, device=device)
        self.journal_k = torch.zeros(num_rows, max_rollback, heads, dk, device=device)
        self.journal_delta = torch.zeros(num_rows, max_rollback, heads, dv, device=device)
        self.native: object | None = None  # the native kernels' view, made at the first use


@dataclass
class Caches:
    """The caches of all layers, the MTP layer's last; ``pending`` counts journaled tokens of each row."""

    layers: list[PagedKV | RecurrentState]
    mtp: list[PagedKV]
    max_rollback: int
    pending: list[int] = field(default_factory=list)

    @staticmethod
    def allocate(
        specs: Sequence[CacheSpec],
        num_blocks: int,
        num_rows: int,
        *,
        num_mtp: int = 0,
        max_rollback: int = 0,
        device: torch.device | str = "cpu",
    ) -> Caches:
        """Zeroed caches for ``specs`` (of which the last ``num_mtp`` belong to the MTP module)."""
        made = [spec.allocate(num_blocks, num_rows, max_rollback, device) for spec in specs]
        split = len(made) - num_mtp
        mtp = [cache for cache in made[split:] if isinstance(cache, PagedKV)]
        return Caches(made[:split], mtp, max_rollback, [0] * num_rows)

    def paged(self) -> list[PagedKV]:
        """The caches of the attention layers, without those of the MTP module."""
        return [cache for cache in self.layers if isinstance(cache, PagedKV)]

    def recurrent(self) -> list[RecurrentState]:
        """The caches of the delta layers."""
        return [cache for cache in self.layers if isinstance(cache, RecurrentState)]

    def reset_row(self, row: int) -> None:
        """Make ``row`` the state of an empty sequence."""
        self.pending[row] = 0
        for cache in self.recurrent():
            cache.conv[row].zero_()
            cache.state[row].zero_()

    def rollback(self, row: int, num_tokens: int) -> None:
        """Undo the last ``num_tokens`` tokens of the sequence in ``row``.

        Paged keys and values need no work: a shorter sequence never reads them.

        Raises:
            UsageError: more tokens than the last step declared tentative.
        """
        if not 0 <= num_tokens <= self.pending[row]:
            raise UsageError(
                f"cannot undo {num_tokens} tokens: the last step declared {self.pending[row]} tentative"
            )
        if num_tokens == 0:
            return
        self.pending[row] -= num_tokens
        for cache in self.recurrent():
            if cache.conv.device.type == "cpu":  # runs for each rejected draft; torch.roll is slow
                window = cache.conv.view(torch.uint8).numpy()[row]
                window[num_tokens:] = window[:-num_tokens]
            else:
                cache.conv[row] = cache.conv[row].roll(num_tokens, 0)
