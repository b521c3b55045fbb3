"""Models with packed weights: :class:`CausalLM` with its layers run by the native CPU kernels.

Packing replaces each matrix by a :class:`QuantTensor` and each stack of experts by :class:`QuantExperts`; the
other parameters are float32. One native call runs all layers of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from godwit import _native
from godwit.checkpoint.packed import PackedFile
from godwit.config import AttentionSpec, DenseSpec, GatedDeltaNetSpec, ModelConfig, MoeSpec
from godwit.errors import CheckpointError, UsageError
from godwit.kernels import native
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import Caches, PagedKV, RecurrentState
from godwit.models.causal_lm import CausalLM, DecoderLayer
from godwit.models.inventory import EXACT, count_mtp, parameters
from godwit.models.layers import DenseMlp, Experts, Linear, RMSNorm, SparseMoeBlock, SwiGLU
from godwit.models.mixers import Attention, GatedDeltaNet
from godwit.qtensor import QuantExperts, QuantTensor, expert_layout, quantize

Value = Tensor | QuantTensor | QuantExperts
_ROUNDED_AT_ONCE = 1 << 20  # weights


def load_packed(source: str | Path | PackedFile) -> CausalLM:
    """A model from a packed file, whose weights are mapped, not copied.

    Raises:
        CheckpointError: the file is damaged, or its tensors do not match its config; lists all mismatches.
    """
    file = source if isinstance(source, PackedFile) else PackedFile.open(source)
    values = ((name, file.packed(name)) for name in file.blobs)
    return assemble(file.config, count_mtp(file.blobs), values, str(file.path))


def assemble(config: ModelConfig, num_mtp: int, values: Iterable[tuple[str, Value]], source: str) -> CausalLM:
    """A model on the native kernels, from packed matrices and plain vectors named like parameters.

    Args:
        config: of the model.
        num_mtp: its MTP layers.
        values: consumed one by one; a stack of experts has the name of its module.
        source: their origin, for messages.

    Raises:
        CheckpointError: names or shapes do not match the model, or parameters are missing.
    """
    with torch.device("meta"):
        model = CausalLM(config, num_mtp)
    _assign_all(model, values, source)
    return _finish(model)


def pack_model(model: CausalLM, format: str | Callable[[str], str]) -> CausalLM:
    """Pack every matrix of ``model`` in memory.

    Args:
        model: with ordinary parameters on the CPU.
        format: one of :data:`godwit.qtensor.FORMATS`, with routers and gate projections in bf16; or a
            function from the name of a matrix to its format.
    """
    matrices = {p.name for p in parameters(model.config, model.num_mtp) if p.is_matrix}

    def format_of(name: str) -> str:
        if callable(format):
            return format(name)
        return "bf16" if name.endswith(EXACT) else format

    def values() -> Iterable[tuple[str, Value]]:
        for module_name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                formats = format_of(f"{module_name}.w13"), format_of(f"{module_name}.w2")
                yield module_name, _pack_experts(module, *formats)
            else:
                for leaf, param in module.named_parameters(recurse=False):
                    name = f"{module_name}.{leaf}"
                    packs = name in matrices
                    yield name, quantize(param, format_of(name)) if packs else param.detach().float()

    return assemble(model.config, model.num_mtp, values(), "the model")


@dataclass
class Rounding:
    """The effect of packing matrices of other dtypes as bf16.

    ``dtypes`` are their names; ``exact`` of the ``matrices`` lose nothing; ``error`` is the root mean square
    of all changes over that of the weights.
    """

    dtypes: set[str] = field(default_factory=set)
    matrices: int = 0
    exact: int = 0
    change: float = 0.0
    size: float = 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.change / self.size) if self.size else 0.0

    def add(self, matrix: Tensor) -> None:
        """Count ``matrix [rows, cols]``; a weight beyond the range of bf16 makes the error infinite."""
        self.dtypes.add(str(matrix.dtype).removeprefix("torch."))
        self.matrices += 1
        before = self.change
        for rows in torch.split(matrix.detach(), max(1, _ROUNDED_AT_ONCE // max(1, matrix.shape[1]))):
            whole = rows.float()
            self.size += float(whole.square().sum(dtype=torch.float64))
            self.change += float((whole - whole.bfloat16().float()).square().sum(dtype=torch.float64))
        self.exact += self.change == before

    def merge(self, other: Rounding) -> None:
        """Count the matrices of ``other`` too."""
        self.dtypes |= other.dtypes
        self.matrices += other.matrices
        self.exact += other.exact
        self.change += other.change
        self.size += other.size


def count_parameters(model: CausalLM) -> int:
    """Number of weights of a model, packed or not, without padding."""
    return sum(listed.count for listed in parameters(model.config, model.num_mtp))


def formats(model: CausalLM) -> list[str]:
    """The formats of the packed weights, most bytes first."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        for value in (getattr(module, "packed", None), vars(module).get("weight")):
            if isinstance(value, QuantTensor | QuantExperts):
                name = value.format if isinstance(value, QuantTensor) else value.format13
                sizes[name] = sizes.get(name, 0) + value.nbytes
    return sorted(sizes, key=lambda name: -sizes[name])


def _pack_experts(experts: Experts, format13: str, format2: str) -> QuantExperts:
    count, double, hidden = experts.w13.shape
    offset2, stride = expert_layout(format13, format2, hidden, double // 2)
    data = torch.zeros(count * stride, dtype=torch.uint8)
    stack = QuantExperts(format13, format2, count, hidden, double // 2, stride, offset2, data)
    for index in range(count):
        for target, source in zip(stack.expert(index), (experts.w13[index], experts.w2[index]), strict=True):
            target.data.copy_(quantize(source, target.format).data)
    return stack


def _assign_all(model: CausalLM, values: Iterable[tuple[str, Value]], source: str) -> None:
    """Assign ``values`` by name.

    Raises:
        CheckpointError: names or shapes do not match the model, or parameters are missing.
    """
    # A stack of experts is one value, checked by the shape of its w2: [experts, hidden, intermediate].
    wanted = {p.packed_name: p.shape for p in parameters(model.config, model.num_mtp)}
    problems = []
    for name, value in values:
        shape = tuple(value.shape) if not isinstance(value, QuantExperts) else (
            value.num_experts, value.hidden, value.intermediate)  # fmt: skip
        expected = wanted.pop(name, None)
        if expected != shape:
            problems.append(
                f"{name} {'is not expected' if expected is None else f'is {shape}, not {expected}'}"
            )
            continue
        _assign(model, name, value)
    problems += [f"{name} is missing" for name in wanted]
    if problems:
        raise CheckpointError(f"{source} does not fit its config: {'; '.join(problems)}")


def _assign(model: CausalLM, name: str, value: Value) -> None:
    if isinstance(value, QuantExperts):
        experts = model.get_submodule(name)
        if isinstance(experts, Experts):
            del experts.w13, experts.w2
            experts.packed = value
        return
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, leaf)
    if isinstance(value, QuantTensor):
        object.__setattr__(module, leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value.float().contiguous(), requires_grad=False))


def _finish(model: CausalLM) -> CausalLM:
    layers = model.all_layers()
    for layer in layers:
        layer.mixer.cache_dtype = _CACHE_DTYPE[layer.spec.mixer.part]
    trunk = len(model.config.layers)
    model.stack = NativeStack(layers[:trunk], model.norm)
    if model.mtp is not None:
        model.mtp.stack = NativeStack(layers[trunk:], model.mtp.norm)
    return model.requires_grad_(False)


#: Of keys and values, and of the window of the convolution, in the native kernels.
_CACHE_DTYPE = MappingProxyType({"attention": torch.bfloat16, "delta": torch.float32})


class NativeStack:
    """Runs decoder layers with packed weights and a norm; a :class:`~godwit.models.causal_lm.Stack`."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: RMSNorm) -> None:
        self.layers = layers
        mixers = [_BUILDERS[type(layer.spec.mixer)](layer.mixer, layer.input_norm) for layer in layers]
        ffns = [_BUILDERS[type(layer.spec.ffn)](layer.ffn, layer.ffn_norm) for layer in layers]
        self.stack = _native.Stack(mixers, ffns, _factor(norm), norm.eps)

    def __call__(
        self,
        x: Tensor,
        batch: ForwardBatch,
        caches: Sequence[PagedKV | RecurrentState] | None,
        pending: Sequence[int],
        router_logits: list[Tensor] | None,
    ) -> Tensor:
        """``x [T, H]`` through all layers and the norm; without caches, in caches made for this call."""
        x = x.float().clone(memory_format=torch.contiguous_format)
        if caches is None:
            batch, caches, pending = self._own_caches(batch)
        logits = None if router_logits is None else [self._logits(layer, x.shape[0]) for layer in self.layers]
        self.stack.run(_step(batch, pending), [_view(cache) for cache in caches], x, logits)
        if router_logits is not None and logits is not None:
            router_logits.extend(one for one in logits if one is not None)
        return x

    @staticmethod
    def _logits(layer: DecoderLayer, num_tokens: int) -> Tensor | None:
        num_experts = layer.spec.ffn.num_experts
        return torch.empty(num_tokens, num_experts) if num_experts else None

    def _own_caches(
        self, batch: ForwardBatch
    ) -> tuple[ForwardBatch, list[PagedKV | RecurrentState], list[int]]:
        """A batch of whole sequences, and caches for this call only: scoring without caches."""
        needed = [-(-length // BLOCK_SIZE) for length in batch.lengths]
        first = 0
        tables = []
        for count in needed:
            tables.append(list(range(first, first + count)))
            first += count
        pieces = [piece.tolist() for piece in torch.split(batch.input_ids, batch.lengths)]
        numbers = list(range(len(pieces)))
        own = ForwardBatch.cached(pieces, [0] * len(pieces), tables, numbers)
        specs = [layer.cache_spec(torch.float32) for layer in self.layers]
        caches = Caches.allocate(specs, max(first, 1), max(len(pieces), 1))
        return own, caches.layers, [0] * len(pieces)


def _step(batch: ForwardBatch, pending: Sequence[int]) -> _native.Batch:
    """The native view of a batch with caches."""
    if batch.slot_mapping is None or batch.block_tables is None:
        raise UsageError("a batch with caches needs slots and block tables")

    num_seqs = len(batch.seq_lens)
    return _native.Batch(
        batch.positions,
        batch.cu_seqlens,
        batch.seq_lens,
        batch.slot_mapping,
        batch.block_tables,
        batch.state_indices,
        batch.num_tentative,
        pending if len(pending) == num_seqs else [0] * num_seqs,
    )


def _view(cache: PagedKV | RecurrentState) -> _native.PagedCache | _native.RecurrentCache:
    """The native view of a layer's cache, made once and stored with it."""
    view = cache.native
    if isinstance(view, _native.PagedCache | _native.RecurrentCache):
        return view
    if isinstance(cache, PagedKV):
        view = _native.PagedCache(cache.k, cache.v)
    else:
        view = _native.RecurrentCache(
            cache.conv, cache.state, cache.journal_g, cache.journal_k, cache.journal_delta, cache.history
        )
    cache.native = view
    return view


def _factor(norm: RMSNorm) -> Tensor:
    """The factor of a normalised vector."""
    weight = norm.weight.detach().float()
    return (1.0 + weight if norm.zero_centered else weight).contiguous()


def _packed(module: Linear) -> _native.Weight:
    weight: object = module.weight
    if not isinstance(weight, QuantTensor):
        raise UsageError("a matrix of a packed model is not packed")
    return native.weight(weight)


def _vector(param: Tensor | None) -> Tensor | None:
    return None if param is None else param.detach().float().flatten().contiguous()


def _delta(mixer: GatedDeltaNet, norm: RMSNorm) -> _native.GatedDeltaNet:
    spec = mixer.spec
    return _native.GatedDeltaNet(
        _factor(norm),
        _packed(mixer.in_proj_qkvz),
        _packed(mixer.in_proj_ba),
        _packed(mixer.out_proj),
        mixer.conv_weight.detach().float().contiguous(),
        -mixer.A_log.detach().float().exp(),
        mixer.dt_bias.detach().float().contiguous(),
        mixer.norm_weight.detach().float().contiguous(),
        spec.num_k_heads,
        spec.num_v_heads,
        spec.head_k_dim,
        spec.head_v_dim,
        mixer.eps,
    )


def _attention(mixer: Attention, norm: RMSNorm) -> _native.Attention:
    spec = mixer.spec
    return _native.Attention(
        _factor(norm),
        _packed(mixer.in_proj),
        _packed(mixer.out_proj),
        _vector(mixer.in_proj.bias),
        _vector(mixer.out_proj.bias),
        None if mixer.q_norm is None else _factor(mixer.q_norm),
        None if mixer.k_norm is None else _factor(mixer.k_norm),
        mixer.rotary.frequencies.float().contiguous(),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.output_gate,
        norm.eps,
        mixer.rotary.scale,
    )


def _mlp(module: SwiGLU) -> _native.Mlp:
    return _native.Mlp(
        _packed(module.w13), _packed(module.w2), _vector(module.w13.bias), _vector(module.w2.bias)
    )


def _dense(ffn: DenseMlp, norm: RMSNorm) -> _native.Ffn:
    return _native.Ffn(_factor(norm), norm.eps, _mlp(ffn))


def _sparse(ffn: SparseMoeBlock, norm: RMSNorm) -> _native.Ffn:
    experts, spec = ffn.experts.packed, ffn.spec
    if experts is None:
        raise UsageError("the experts of a packed model are not packed")
    return _native.Ffn(
        _factor(norm),
        norm.eps,
        None if ffn.shared_expert is None else _mlp(ffn.shared_expert),
        None if ffn.shared_gate is None else _vector(ffn.shared_gate.weight),
        _packed(ffn.router),
        experts.data,
        experts.stride,
        experts.offset2,
        experts.format13,
        experts.format2,
        spec.num_experts,
        spec.top_k,
        spec.intermediate,
        spec.renormalize,
    )


#: Type of a mixer's or feed-forward part's spec -> builder of its native form from module and norm.
_BUILDERS: Mapping[type, Callable[[Any, RMSNorm], Any]] = MappingProxyType(
    {AttentionSpec: _attention, GatedDeltaNetSpec: _delta, DenseSpec: _dense, MoeSpec: _sparse}
)
