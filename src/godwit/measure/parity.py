"""Checks the native kernels against the PyTorch reference, on a small model of the family to be measured.

A benchmark of wrong kernels is worthless, so `bench` refuses to report one. The check takes about a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.errors import KernelParityError
from godwit.measure.costs import packed_weights
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import Caches
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import FORMATS, GROUP, SPAN, QuantExperts, QuantTensor

Pack = Callable[[CausalLM, str], CausalLM]

HIDDEN, VOCAB, WIDTH = 96, 160, 64
LENGTHS = (37, 21)  # tokens of two sequences, read in one step or in several
CUTS = (16, 1, 17)  # steps of the longer one; its remaining tokens follow one by one

#: Relative error (root mean square) of rounding the inputs of one product: to eight bits, with the largest of
#: a group or span setting the scale and at worst all others small; to bfloat16 for bf16 weights.
ROUNDING: Mapping[str, float] = {
    "q4": math.sqrt(GROUP * SPAN / 12) / 127,
    "q8": math.sqrt(GROUP / 12) / 127,
    "bf16": 2**-8,
}
PRODUCTS_PER_LAYER = 4  # in sequence: into and out of the mixer, w13, w2
DELTA_AMPLIFICATION = 2.0  # of a relative error by the delta rule, whose small outputs a norm scales up


@dataclass(frozen=True)
class KernelCheck:
    """The result for one weight format.

    Attributes:
        format: of the weights.
        error: relative error of the hidden states. Median over the tokens: rounding may send a token
            to another expert.
        limit: the largest error that rounding explains.
        cut_invariant: whether splitting the sequences into steps leaves the states bit for bit the same.
    """

    format: str
    error: float
    limit: float
    cut_invariant: bool

    @property
    def green(self) -> bool:
        return self.error <= self.limit and self.cut_invariant


def check_kernels(config: ModelConfig, formats: Iterable[str], pack: Pack | None = None) -> list[KernelCheck]:
    """Compare native and plain forward passes of a small random model shaped like ``config``.

    Args:
        config: of the model to be measured.
        formats: of its weights; formats that are not packed are skipped.
        pack: packs a model; tests pass their own.
    """
    present = set(formats)
    packed = [name for name in FORMATS if name in present]
    if packed and pack is None:
        from godwit.models.native import pack_model as pack
    return [_check(small_config(config), name, pack) for name in packed if pack is not None]


def require_parity(checks: Iterable[KernelCheck]) -> None:
    """Raise if a check failed.

    Raises:
        KernelParityError: one did.
    """
    for check in checks:
        if not check.green:
            what = (
                f"are off by {check.error:.1e} where rounding explains {check.limit:.1e}"
                if check.cut_invariant
                else "depend on how a prompt is split into steps"
            )
            raise KernelParityError(
                f"no speeds are reported: with {check.format} weights the native kernels' results {what}; "
                "rebuild Godwit and run the tests in tests/kernels"
            )


def small_config(config: ModelConfig) -> ModelConfig:
    """The same family, features and head widths, with few heads, experts, layers and hidden units."""
    raw = dict(config.raw)
    nested = raw.get("text_config")
    text = dict(nested) if isinstance(nested, Mapping) else raw
    text |= _small_fields(config, text)
    if text is not raw:
        raw["text_config"] = text
    return ModelConfig.from_dict(raw)


def _small_fields(config: ModelConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "intermediate_size": WIDTH,
        "initializer_range": HIDDEN**-0.5,  # layers change their input as much as at full width
    }
    mixers: dict[str, Any] = {layer.mixer.part: layer.mixer for layer in reversed(config.layers)}
    kinds = []
    if delta := mixers.get("delta"):
        kinds.append("linear_attention")
        heads = min(delta.num_k_heads, 2)
        fields["linear_num_key_heads"] = heads
        fields["linear_num_value_heads"] = heads * (delta.num_v_heads // delta.num_k_heads)
    if attention := mixers.get("attention"):
        kinds.append("full_attention")
        heads = min(attention.num_kv_heads, 2)
        fields["num_key_value_heads"] = heads
        fields["num_attention_heads"] = heads * (attention.num_heads // attention.num_kv_heads)
        fields["head_dim"] = attention.head_dim
    if config.family.hybrid:
        fields["layer_types"] = (kinds * 2)[:2]
    return fields | _small_ffn(config, text)


def _small_ffn(config: ModelConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    sparse = [layer.ffn for layer in config.layers if layer.ffn.num_experts]
    if not sparse:
        return {}
    count = "num_local_experts" if text.get("num_local_experts") is not None else "num_experts"
    return {
        count: min(sparse[0].num_experts, 2 * sparse[0].top_k + 3),
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": WIDTH if sparse[0].shared_intermediate else 0,
        "mlp_only_layers": [0] if len(sparse) < len(config.layers) else [],
        "decoder_sparse_step": 1,
    }


def _check(config: ModelConfig, name: str, pack: Pack) -> KernelCheck:
    plain = _random_model(config)
    packed = pack(plain, name)
    parameters = dict(plain.named_parameters())
    for target, weight in packed_weights(packed):
        for suffix, value in _plain_parts(weight):
            parameters[target + suffix].copy_(value)
    ids = torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        found, wanted, pieces = _at_once(packed, ids), _at_once(plain, ids), _in_pieces(packed, ids)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    delta = any(layer.mixer.part == "delta" for layer in config.layers)
    limit = ROUNDING[name] * math.sqrt(PRODUCTS_PER_LAYER * len(config.layers))
    limit *= DELTA_AMPLIFICATION if delta else 1.0
    finite = bool(torch.isfinite(found).all())
    return KernelCheck(name, float(error.median()) if finite else math.inf, limit, torch.equal(found, pieces))


def _random_model(config: ModelConfig) -> CausalLM:
    """Random weights, also for norms and biases, which `init_weights` leaves neutral."""
    generator = torch.Generator().manual_seed(0)
    model = CausalLM(config, 0).requires_grad_(False).eval()
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def _plain_parts(weight: QuantTensor | QuantExperts) -> list[tuple[str, Tensor]]:
    if isinstance(weight, QuantTensor):
        return [("", weight.dequantize())]
    experts = [weight.expert(index) for index in range(weight.num_experts)]
    return [
        (suffix, torch.stack([expert[part].dequantize() for expert in experts]))
        for part, suffix in enumerate((".w13", ".w2"))
    ]


class _TwoSequences:
    """Two sequences in the caches of a model."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        blocks = [-(-length // BLOCK_SIZE) for length in LENGTHS]
        self.caches: Caches = model.allocate_caches(sum(blocks), len(LENGTHS))
        order = list(range(sum(blocks)))[::-1]  # so that blocks are not in the order of the tokens
        self.tables = [order[: blocks[0]], order[blocks[0] :]]
        self.past = [0] * len(LENGTHS)

    def step(self, pieces: Mapping[int, list[int]]) -> dict[int, Tensor]:
        """Read the next tokens of some sequences; their hidden states."""
        rows = list(pieces)
        batch = ForwardBatch.cached(
            list(pieces.values()), [self.past[r] for r in rows], [self.tables[r] for r in rows], rows
        )
        hidden = self.model(batch, self.caches)
        for row, piece in pieces.items():
            self.past[row] += len(piece)
        return dict(zip(rows, hidden.split(batch.lengths), strict=True))


def _at_once(model: CausalLM, ids: list[int]) -> Tensor:
    """Hidden states of both sequences, read in one step."""
    hidden = _TwoSequences(model).step({0: ids[: LENGTHS[0]], 1: ids[LENGTHS[0] :]})
    return torch.cat([hidden[0], hidden[1]]).float()


def _in_pieces(model: CausalLM, ids: list[int]) -> Tensor:
    """The same token by token, the longer sequence after a few uneven pieces."""
    left = {0: ids[: LENGTHS[0]], 1: ids[LENGTHS[0] :]}
    cuts = iter(CUTS)
    run, found = _TwoSequences(model), {0: list[Tensor](), 1: list[Tensor]()}
    while any(left.values()):
        size = next(cuts, 1)
        pieces = {row: rest[: size if row == 0 else 1] for row, rest in left.items() if rest}
        left = {row: rest[len(pieces.get(row, ())) :] for row, rest in left.items()}
        for row, hidden in run.step(pieces).items():
            found[row].append(hidden)
    return torch.cat([*found[0], *found[1]]).float()
