from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

_Array = Tensor | NDArray[Any]

def cpu_features() -> dict[str, bool]:
    """Each known CPU feature and whether the CPU and the operating system let programs use it."""

def available_instruction_sets() -> list[str]:
    """The instruction sets this CPU can run, from the plainest ("scalar") to the widest."""

def instruction_set() -> str:
    """The instruction set in use: the widest available until another is set.

    The environment variable GODWIT_INSTRUCTION_SET sets one when this module is imported, which raises
    ImportError where the name is unknown or the CPU lacks it.
    """

def set_instruction_set(name: str) -> None:
    """Use this instruction set from now on; ValueError where the CPU lacks it."""

def num_cores(root: str = "") -> int:
    """Logical cores this process may use, by affinity and cgroup quota (v2 and v1); at least 1.

    `root` stands before /proc and /sys, for tests.
    """

def num_threads() -> int:
    """Threads that ops use, the calling one included: one for each core until another number is set."""

def set_num_threads(count: int) -> None:
    """Let ops use this many threads; results do not depend on it."""

def read_bandwidth(bytes: int, repeats: int = 3) -> float:
    """GB/s of reading so much memory with all threads, the best of some repeats."""

def peak(arithmetic: str, seconds: float = 0.1) -> float:
    """10^9 operations a second of multiply-adds in registers: all threads, the instruction set in use.

    The best of the tries that fit in `seconds`, at least one.

    Args:
        arithmetic: "int8", "bfloat16" or "float32".
        seconds: from 0 to 60.
    """

def set_profiling(on: bool) -> None:
    """Measure where time goes from now on, or stop; switching it on forgets what was measured."""

def profile() -> dict[str, tuple[float, int]]:
    """Seconds and calls by name; a name's seconds include those of what it calls."""

def scratch_bytes() -> int:
    """Memory that ops keep for their intermediate results."""

#: The formats of packed weights: "bf16", "q8", "q4". csrc/kernels.h has their layout.
FORMATS: tuple[str, str, str]

def weight_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""

# Arrays are contiguous and in the CPU's memory; others are refused with a ValueError. Objects keep alive what
# they were made of. Ops run one at a time, without the interpreter's lock.

class Weight:
    """A packed matrix [rows, cols]; ``data`` is uint8 of ``weight_bytes``, aligned to 64 bytes."""

    def __init__(self, format: str, rows: int, cols: int, data: _Array) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Batch:
    """The tokens of a step: a copy of int64 arrays (or lists, tuples), named as in ``ForwardBatch``.

    ``state_rows`` are its ``state_indices``; ``pending`` counts each sequence's journaled tokens.
    """

    def __init__(
        self,
        positions: _Array,
        cu_seqlens: _Array | Sequence[int],
        seq_lens: _Array | Sequence[int],
        slot_mapping: _Array,
        block_tables: _Array,
        state_rows: _Array | Sequence[int],
        num_tentative: _Array | Sequence[int],
        pending: _Array | Sequence[int],
    ) -> None: ...

class PagedCache:
    """Keys and values of an attention layer: bfloat16 ``[blocks, 16, kv_heads, D]`` as kernels.h says."""

    def __init__(self, k: _Array, v: _Array) -> None: ...

class RecurrentCache:
    """What one delta layer remembers, float32: see ``godwit.models.caches.RecurrentState``."""

    def __init__(
        self,
        conv: _Array,
        state: _Array,
        journal_g: _Array,
        journal_k: _Array,
        journal_delta: _Array,
        history: int,
    ) -> None: ...

class GatedDeltaNet:
    """The weights of a gated delta layer; ``decay`` is ``-exp(A_log)``, norms are whole factors."""

    def __init__(
        self,
        norm: _Array,
        qkvz: Weight,
        ba: Weight,
        out: Weight,
        conv: _Array,
        decay: _Array,
        dt_bias: _Array,
        out_norm: _Array,
        num_k_heads: int,
        num_v_heads: int,
        dk: int,
        dv: int,
        eps: float,
    ) -> None: ...

class Attention:
    """The weights of an attention layer; ``in_proj`` has rows query | gate | key | value."""

    def __init__(
        self,
        norm: _Array,
        in_proj: Weight,
        out_proj: Weight,
        in_bias: _Array | None,
        out_bias: _Array | None,
        q_norm: _Array | None,
        k_norm: _Array | None,
        inv_freq: _Array,
        num_heads: int,
        num_kv_heads: int,
        dim: int,
        gate: bool,
        eps: float,
        rope_scale: float,
    ) -> None: ...

class Mlp:
    """A SwiGLU: ``w13`` has the gate's rows, then up's."""

    def __init__(
        self, w13: Weight, w2: Weight, bias13: _Array | None = None, bias2: _Array | None = None
    ) -> None: ...

class Ffn:
    """The feed-forward part of a layer: dense with ``shared`` alone, sparse with ``router`` and ``experts``.

    Expert e begins at byte ``e * expert_stride`` of ``experts``: w13 in ``format13``, at ``offset2`` w2.
    ``place_expert`` moves one to an array of its own, so that experts may lie anywhere.
    """

    def __init__(
        self,
        norm: _Array,
        eps: float,
        shared: Mlp | None,
        shared_gate: _Array | None = None,
        router: Weight | None = None,
        experts: _Array | None = None,
        expert_stride: int = 0,
        offset2: int = 0,
        format13: str = "q4",
        format2: str = "q4",
        num_experts: int = 0,
        top_k: int = 0,
        intermediate: int = 0,
        renormalize: bool = False,
    ) -> None: ...
    def place_expert(self, index: int, expert: _Array) -> None:
        """From the next op on, read this expert from ``expert``: w13, at ``offset2`` w2; 64-byte aligned."""

class Stack:
    """Decoder layers, each a mixer and a feed-forward part, and a norm: one op for all of them."""

    def __init__(
        self, mixers: Sequence[GatedDeltaNet | Attention], ffns: Sequence[Ffn], norm: _Array, eps: float
    ) -> None: ...
    def run(
        self,
        batch: Batch,
        caches: Sequence[PagedCache | RecurrentCache],
        x: _Array,
        router_logits: Sequence[_Array | None] | None = None,
    ) -> None:
        """``x [T, H]`` goes through all layers and the norm, in place; the caches advance.

        ``router_logits [T, E]`` of the layers that route receive their router's; None for the others.
        """

def linear(x: _Array, w: Weight, bias: _Array | None, out: _Array) -> None:
    """``out [M, rows] = x [M, cols] w^T + bias``."""

def embed(w: Weight, ids: _Array, out: _Array) -> None:
    """``out [M, cols]`` = rows ``ids [M]`` of ``w``."""

def rms_norm(x: _Array, factor: _Array, eps: float, out: _Array) -> None:
    """``out [M, N] = x / rms(x) * factor``; ``out`` may be ``x``."""

def gated_delta_net(layer: GatedDeltaNet, batch: Batch, cache: RecurrentCache, x: _Array) -> None:
    """``x [T, H] += mixer(norm(x))``; the cache advances."""

def attention(layer: Attention, batch: Batch, cache: PagedCache, x: _Array) -> None:
    """``x [T, H] += mixer(norm(x))``; the cache advances."""

def ffn(layer: Ffn, x: _Array, router_logits: _Array | None = None) -> None:
    """``x [T, H] += ffn(norm(x))``; ``router_logits [T, E]`` receives the router's."""

def top_k(values: _Array, k: int) -> tuple[list[float], list[int]]:
    """The k largest values, largest first, the lower index first among equals, and where they are."""
