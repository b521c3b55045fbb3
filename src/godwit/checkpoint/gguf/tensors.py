"""The tensors of a GGUF file under their Hugging Face names, with the converter's changes undone.

All rules are in this file:

* rows and columns are permuted back: llama's rotary pairs, tiled value heads of Qwen3.5;
* zero-centred norms lose the 1 that was added, ``ssm_a`` becomes ``A_log`` again;
* in files of Ollama's own converter the MTP module has its published names, and norms without the 1;
* stacks of experts become one tensor per expert, as in most checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from godwit.errors import CheckpointError

Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """A tensor ``name`` of the file, or a part of it, as a checkpoint's tensor.

    ``rows`` and ``columns`` (whole groups of 32 of them where ``blocks``) are taken in this order; ``expert``
    is the index into a stack. ``undo`` changes values: where there is one, the tensor is plain and small.
    """

    name: str
    shape: tuple[int, ...]
    rows: Tensor | slice | None = None
    columns: Tensor | None = None
    expert: int | None = None
    undo: Undo | None = None


@dataclass(frozen=True)
class Heads:
    """Head counts for the permutations. ``tiled``: value heads are not in Hugging Face's order."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    pairs: bool  # rotary pairs side by side, as llama has them
    tiled: bool

    @staticmethod
    def of(config: Mapping[str, Any], *, pairs: bool, tiled: bool) -> Heads:
        """Raises: CheckpointError: numbers of heads that do not fit each other."""

        def size(name: str) -> int:
            return int(config.get(name, 0))

        keys, values = size("linear_num_key_heads"), size("linear_num_value_heads")
        if values and (keys < 1 or values % keys):
            raise CheckpointError(f"{values} value heads are not divided by {keys} key heads")
        if pairs and (size("head_dim") < 2 or size("head_dim") % 2):
            raise CheckpointError(f"heads of {size('head_dim')} have no rotary pairs")
        return Heads(
            size("num_attention_heads"),
            size("num_key_value_heads"),
            size("head_dim"),
            size("linear_num_key_heads"),
            size("linear_num_value_heads"),
            size("linear_key_head_dim"),
            size("linear_value_head_dim"),
            pairs,
            tiled,
        )

    def rotary_rows(self, heads: int) -> Tensor | None:
        """Where each row of a query or key projection lies: row s d/2 + i of a head at 2 i + s."""
        if not self.pairs:
            return None
        half = torch.arange(self.head_dim).view(-1, 2).T.flatten()
        return (torch.arange(heads)[:, None] * self.head_dim + half).flatten()

    def value_rows(self, width: int) -> Tensor | None:
        """Where each row of the value heads, ``width`` rows a head, lies: head h at (h mod r) k + h div r."""
        if not self.tiled or self.value_heads == self.key_heads:
            return None
        tiles = self.value_heads // self.key_heads
        place = torch.arange(self.value_heads).view(tiles, self.key_heads).T.flatten()
        return (place[:, None] * width + torch.arange(width)).flatten()

    def mixed_rows(self) -> Tensor | None:
        """The same for consecutive rows of query, key and value heads."""
        values = self.value_rows(self.value_dim)
        if values is None:
            return None
        first = 2 * self.key_heads * self.key_dim
        return torch.cat((torch.arange(first), values + first))


def minus_one(stored: Tensor) -> Tensor:
    """The weight of a zero-centred norm; exact for factors of 0.5 and more."""
    return stored - 1


def log_decay(stored: Tensor) -> Tensor:
    """``A_log`` of ``ssm_a`` = -exp(A_log): the float near the logarithm that reproduces ``ssm_a``."""
    wanted = -stored
    guess = wanted.double().log().float()
    best = guess.bfloat16().float()  # what most checkpoints held
    missed = (best.exp() - wanted).abs()
    low, high = torch.full_like(guess, -math.inf), torch.full_like(guess, math.inf)
    below, above = guess, torch.nextafter(guess, high)
    for _ in range(4):
        for candidate in (below, above):
            error = (candidate.exp() - wanted).abs()
            best = torch.where(error < missed, candidate, best)
            missed = torch.minimum(error, missed)
        below, above = torch.nextafter(below, low), torch.nextafter(above, high)
    return best


_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_MTP = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_EXPERTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)\.weight", re.ASCII)
#: MTP as Ollama's converter writes it; its layers have the usual names behind "mtp.layers.N.".
_OLLAMA_MTP = {
    **{name: name for name in _MTP.values()},
    "mtp.shared_head.norm.weight": "mtp.norm.weight",
}
_OLLAMA_LAYER = re.compile(r"(mtp\.layers\.\d+\.)(.+)", re.ASCII)
_OLLAMA_EXPERT = re.compile(r"mtp\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", re.ASCII)
#: Tensors for other programs, or of parts other than the language model.
_BESIDE = re.compile(r"rope_freqs\.weight|(v|mm|a)\..*|.*\.(input_scale|scale)", re.ASCII)


@dataclass(frozen=True)
class Names:
    """Maps the tensors of a file, whose ``shapes`` are known, to Hugging Face names."""

    shapes: Mapping[str, tuple[int, ...]]
    num_layers: int
    heads: Heads
    zero_centered: bool
    mixtral: bool

    def sources(self) -> Iterator[tuple[str, Source]]:
        """(Hugging Face name, where it comes from), in the file's order.

        Raises:
            CheckpointError: a tensor that no rule knows.
        """
        for name, shape in self.shapes.items():
            if name.endswith("_exps.weight") and len(shape) != 3:
                raise CheckpointError(f"tensor {name!r:.80} of shape {list(shape)} is no stack of experts")
            if _BESIDE.fullmatch(name):
                continue
            if name in _OLLAMA_MTP or _OLLAMA_EXPERT.fullmatch(name):
                yield _OLLAMA_MTP.get(name, name), Source(name, shape)
                continue
            if (mtp := _OLLAMA_LAYER.fullmatch(name)) is not None:
                yield from self._block(name, mtp[1], mtp[2], shape)
                continue
            block = _BLOCK.fullmatch(name)
            if block is None:
                if name not in _TOP:
                    raise CheckpointError(f"tensor {name!r:.80} is not known for this architecture")
                yield _TOP[name], Source(name, shape, undo=self._norm_undo(name))
                continue
            index, rest = int(block[1]), block[2]
            in_mtp = index >= self.num_layers
            prefix = f"mtp.layers.{index - self.num_layers}." if in_mtp else f"model.layers.{index}."
            yield from self._block(name, prefix, rest, shape)

    def _norm_undo(self, name: str) -> Undo | None:
        is_norm = name.endswith("norm.weight") and not name.endswith("ssm_norm.weight")
        return minus_one if self.zero_centered and is_norm and not name.startswith("mtp.") else None

    def _block(
        self, name: str, prefix: str, rest: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Source]]:
        if rest in _NORMS:
            yield prefix + _NORMS[rest], Source(name, shape, undo=self._norm_undo(name))
        elif rest in _MTP:
            yield _MTP[rest], Source(name, shape, undo=self._norm_undo(name))
        elif rest.startswith("attn_") and f"{name.rsplit('.', 2)[0]}.ssm_a" not in self.shapes:
            yield from self._attention(name, prefix + "self_attn.", rest, shape)
        elif rest.startswith(("attn_", "ssm_")):
            yield from self._delta(name, prefix + "linear_attn.", rest, shape)
        else:
            yield from self._feed_forward(name, prefix, rest, shape)

    def _attention(
        self, name: str, prefix: str, rest: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Source]]:
        kind, _, leaf = rest.partition(".")
        rows = {
            "attn_q": self.heads.rotary_rows(self.heads.num_heads),
            "attn_k": self.heads.rotary_rows(self.heads.num_kv_heads),
            "attn_v": None,
            "attn_output": None,
        }
        if kind == "attn_qkv":  # stacked by an option of the converter: query (with its gates), key, value
            kv = self.heads.num_kv_heads * self.heads.head_dim
            ends = {"q_proj": slice(0, shape[0] - 2 * kv), "k_proj": slice(shape[0] - 2 * kv, shape[0] - kv),
                    "v_proj": slice(shape[0] - kv, shape[0])}  # fmt: skip
            for part, span in ends.items():
                yield (
                    f"{prefix}{part}.{leaf}",
                    Source(name, (span.stop - span.start, *shape[1:]), self._pick(part, span)),
                )
            return
        if kind not in rows:
            raise CheckpointError(f"tensor {name!r:.80} is not known for an attention layer")
        leaf_name = {"attn_output": "o_proj"}.get(kind, f"{kind.removeprefix('attn_')}_proj")
        yield f"{prefix}{leaf_name}.{leaf}", Source(name, shape, rows[kind])

    def _pick(self, part: str, span: slice) -> Tensor | slice:
        heads = {"q_proj": self.heads.num_heads, "k_proj": self.heads.num_kv_heads}.get(part)
        order = self.heads.rotary_rows(heads) if heads is not None else None
        return span if order is None else order + span.start

    def _delta(
        self, name: str, prefix: str, rest: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Source]]:
        heads = self.heads
        per_head, rows = heads.value_rows(1), heads.value_rows(heads.value_dim)
        known: dict[str, tuple[str, Source]] = {
            "attn_qkv.weight": ("in_proj_qkv.weight", Source(name, shape, heads.mixed_rows())),
            "attn_gate.weight": ("in_proj_z.weight", Source(name, shape, rows)),
            "ssm_in.weight": ("in_proj_qkvz.weight", Source(name, shape)),
            "ssm_ba.weight": ("in_proj_ba.weight", Source(name, shape)),
            "ssm_beta.weight": ("in_proj_b.weight", Source(name, shape, per_head)),
            "ssm_alpha.weight": ("in_proj_a.weight", Source(name, shape, per_head)),
            "ssm_conv1d.weight": (
                "conv1d.weight",
                Source(name, (shape[0], 1, shape[-1]), heads.mixed_rows()),
            ),
            "ssm_a": ("A_log", Source(name, shape, per_head, undo=log_decay)),
            "ssm_dt.bias": ("dt_bias", Source(name, shape, per_head)),
            "ssm_dt": ("dt_bias", Source(name, shape, per_head)),
            "ssm_norm.weight": ("norm.weight", Source(name, shape)),
            "ssm_out.weight": ("out_proj.weight", Source(name, shape, columns=rows)),
        }
        if rest not in known:
            raise CheckpointError(f"tensor {name!r:.80} is not known for a delta layer")
        suffix, source = known[rest]
        yield prefix + suffix, source

    def _feed_forward(
        self, name: str, prefix: str, rest: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Source]]:
        mlp = prefix + ("block_sparse_moe." if self.mixtral else "mlp.")
        kind, _, leaf = rest.partition(".")
        single = _ONE_EXPERT.fullmatch(rest)
        if single is not None:
            yield f"{mlp}experts.{single[2]}.{self._expert_name(single[1])}.weight", Source(name, shape)
        elif kind in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps") and leaf == "weight":
            part = self._expert_name(kind.split("_")[1])
            for expert in range(shape[0]):
                yield f"{mlp}experts.{expert}.{part}.weight", Source(name, shape[1:], expert=expert)
        elif kind == "ffn_gate_up_exps" and leaf == "weight":
            width = shape[1] // 2
            for expert in range(shape[0]):
                for part, begin in (("gate", 0), ("up", width)):
                    yield (
                        f"{mlp}experts.{expert}.{self._expert_name(part)}.weight",
                        Source(name, (width, shape[2]), slice(begin, begin + width), expert=expert),
                    )
        elif kind == "ffn_gate_inp":
            yield mlp + "gate.weight", Source(name, shape)
        elif kind == "ffn_gate_inp_shexp":
            yield (
                mlp + "shared_expert_gate.weight",
                Source(name, (1, shape[-1] if shape[-1] > 1 else shape[0])),
            )
        elif kind in ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"):
            yield f"{mlp}shared_expert.{kind.split('_')[1]}_proj.{leaf}", Source(name, shape)
        elif kind in ("ffn_gate", "ffn_up", "ffn_down"):
            yield f"{prefix}mlp.{kind.split('_')[1]}_proj.{leaf}", Source(name, shape)
        else:
            raise CheckpointError(f"tensor {name!r:.80} is not known for this architecture")

    def _expert_name(self, part: str) -> str:
        return _EXPERTS[part][int(self.mixtral)]
