"""A converter for tests: Hugging Face checkpoints as GGUF files, as llama.cpp's converter writes them.

It shares nothing with the reader: each transformation is written here a second time, forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import export_tensors

TYPES: Mapping[str, str] = {
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "llama": "llama",
    "mixtral": "mixtral",
}
_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
}
_HYBRID = ("qwen3next", "qwen35", "qwen35moe")
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FIELDS: Mapping[str, dict[str, Any]] = {
    "qwen3next": {**_BASE, **_DELTA, **_EXPERTS},
    "qwen35": {**_BASE, **_DELTA},
    "qwen35moe": {**_BASE, **_DELTA, **_EXPERTS},
    "qwen3": {**_BASE, "rope_theta": 1e6},
    "qwen3moe": {**_BASE, **_EXPERTS, "rope_theta": 1e6},
    "llama": {**_BASE, "rope_parameters": _LLAMA3},
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6},
}
Encode = Callable[[np.ndarray[Any, Any], str], tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]


def make_model(arch: str, *, seed: int = 0, num_mtp: int = 0, **changed: Any) -> CausalLM:
    """A random model of one of the architectures; norms and decays are random too, weights bf16's."""
    fields = {**FIELDS[arch], **changed, "model_type": TYPES[arch]}
    fields |= {"mtp_num_hidden_layers": num_mtp} if num_mtp else {}
    model = CausalLM(ModelConfig.from_dict(fields), num_mtp).requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    model.init_weights(random)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand(parameter.shape, generator=random) / 4)
        parameter.copy_(parameter.bfloat16())
    return model.eval()


def published(model: CausalLM) -> dict[str, Tensor]:
    """The tensors of a model under their Hugging Face names, experts one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in export_tensors(model):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor.clone()
            continue
        stem, part = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for expert, matrix in enumerate(tensor):
            for each, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                found[f"{stem}.{expert}.{each}.weight"] = rows.clone()
    return found


def as_bf16_or_f32(values: np.ndarray[Any, Any], name: str) -> tuple[np.ndarray[Any, Any], Any]:
    """Matrices in bf16, the rest in f32."""
    if values.ndim > 1 and not name.endswith(("norm.weight", "gate_inp.weight", "conv1d.weight")):
        kind = gguf.GGMLQuantizationType.BF16
        return gguf.quants.quantize(values, kind), kind
    return values, gguf.GGMLQuantizationType.F32


@dataclass
class Converter:
    """Writes a model as a GGUF file.

    ``fuse``: gates and ups of experts, and query, key, value of attention layers in one tensor each.
    ``legacy``: delta projections as they are in the checkpoint; ``single``: experts one by one.
    ``ollama``: MTP as Ollama's converter has it. ``split``: into files of so many tensors.
    ``keys``: further keys.
    """

    arch: str
    model: CausalLM
    fuse: bool = False
    legacy: bool = False
    single: bool = False
    ollama: bool = False
    encode: Encode = as_bf16_or_f32
    split: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        arch = "llama" if self.arch == "mixtral" else self.arch
        writer = gguf.GGUFWriter(path, arch, split_max_tensors=self.split, small_first_shard=bool(self.split))
        for key, value in {**self._keys(), **self.keys}.items():
            _add(writer, key, value)
        for name, tensor in self.tensors().items():
            values, kind = self.encode(np.ascontiguousarray(tensor.float().numpy()), name)
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) if self.split else [path]
        return parts[0]

    # ---- Keys ------------------------------------------------------------------------------------------

    def _keys(self) -> dict[str, Any]:
        raw = self.model.config.raw
        mtp = int(raw.get("mtp_num_hidden_layers", 0))
        arch = "llama" if self.arch == "mixtral" else self.arch
        blocks = raw["num_hidden_layers"] + (0 if self.ollama else mtp)
        kv: Any = raw["num_key_value_heads"]
        if self.ollama:
            kinds = self.model.config.layers
            kv = [kv if layer.mixer.part == "attention" else 0 for layer in kinds]
        found: dict[str, Any] = {
            "general.type": "model",
            "block_count": blocks,
            "context_length": raw["max_position_embeddings"],
            "embedding_length": raw["hidden_size"],
            "feed_forward_length": raw["intermediate_size"],
            "attention.head_count": raw["num_attention_heads"],
            "attention.head_count_kv": kv,
            "attention.key_length": raw["head_dim"],
            "attention.value_length": raw["head_dim"],
            "attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
            "rope.freq_base": float((raw.get("rope_parameters") or raw)["rope_theta"]),
            "vocab_size": raw["vocab_size"],
            **({"nextn_predict_layers": mtp} if mtp else {}),
            **self._expert_keys(raw),
            **self._delta_keys(raw),
        }
        return {key if "." in key and key.startswith("general") else f"{arch}.{key}": value
                for key, value in found.items()}  # fmt: skip

    def _expert_keys(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        experts = raw.get("num_experts") or raw.get("num_local_experts")
        if not experts:
            return {}
        keys = {"expert_count": experts, "expert_used_count": raw["num_experts_per_tok"]}
        if self.arch != "mixtral":
            keys["expert_feed_forward_length"] = raw["moe_intermediate_size"]
            keys["expert_shared_feed_forward_length"] = raw["shared_expert_intermediate_size"]
        return keys

    def _delta_keys(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if "linear_num_key_heads" not in raw:
            return {}
        return {
            "ssm.conv_kernel": raw["linear_conv_kernel_dim"],
            "ssm.state_size": raw["linear_key_head_dim"],
            "ssm.group_count": raw["linear_num_key_heads"],
            "ssm.time_step_rank": raw["linear_num_value_heads"],
            "ssm.inner_size": raw["linear_num_value_heads"] * raw["linear_value_head_dim"],
            "full_attention_interval": 4,
            "rope.dimension_count": raw["head_dim"] // 4,
            "rope.dimension_sections": [11, 11, 10],
        }

    # ---- Tensors ---------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        found = published(self.model)
        experts: dict[str, list[Tensor]] = {}
        for name, tensor in found.items():
            plus = 1.0 if self._zero_centered(name) else 0.0
            if ".experts." in name:
                self._expert(name, tensor, out, experts)
            elif self.ollama and name.startswith("mtp.") and not name.startswith("mtp.layers."):
                out[name] = tensor
            elif not self._delta(name, tensor, out):
                out[self._name(name)] = self._attention(name, tensor.float() + plus if plus else tensor)
        for name, stack in experts.items():
            out[name] = torch.stack(stack)
        if self.arch == "llama":
            out["rope_freqs.weight"] = self._divisors()
        return self._fused(out) if self.fuse else out

    def _zero_centered(self, name: str) -> bool:
        if self.arch not in _HYBRID or (self.ollama and name.startswith("mtp.")):
            return False
        return "norm" in name and not name.endswith("linear_attn.norm.weight")

    def _name(self, name: str) -> str:
        top = {
            "model.embed_tokens.weight": "token_embd.weight",
            "lm_head.weight": "output.weight",
            "model.norm.weight": "output_norm.weight",
            "mtp.fc.weight": f"blk.{self._trunk}.nextn.eh_proj.weight",
            "mtp.pre_fc_norm_embedding.weight": f"blk.{self._trunk}.nextn.enorm.weight",
            "mtp.pre_fc_norm_hidden.weight": f"blk.{self._trunk}.nextn.hnorm.weight",
            "mtp.norm.weight": f"blk.{self._trunk}.nextn.shared_head_norm.weight",
        }
        return top.get(name) or self._block(name) + self._rest(name.split(".", 3)[3])

    def _block(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "mtp":
            return f"mtp.layers.{parts[2]}." if self.ollama else f"blk.{self._trunk + int(parts[2])}."
        return f"blk.{parts[2]}."

    def _rest(self, rest: str) -> str:
        names = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm" if self.arch in _HYBRID else "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "mlp.gate": "ffn_gate_inp",
            "block_sparse_moe.gate": "ffn_gate_inp",
            "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
            "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        stem, leaf = rest.rsplit(".", 1)
        return f"{names[stem]}.{leaf}"

    @property
    def _trunk(self) -> int:
        return int(self.model.config.raw["num_hidden_layers"])

    def _attention(self, name: str, tensor: Tensor) -> Tensor:
        """Llama's rotary pairs side by side."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None or self.arch not in ("llama", "mixtral"):
            return tensor
        count = self.model.config.raw[heads]
        return tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def _expert(
        self, name: str, tensor: Tensor, out: dict[str, Tensor], experts: dict[str, list[Tensor]]
    ) -> None:
        part = name.split(".")[-2]
        index = name.split(".experts.")[1].split(".")[0]
        if self.ollama and name.startswith("mtp."):
            out[name] = tensor
        elif self.single:
            out[f"{self._block(name)}ffn_{_PARTS[part]}.{index}.weight"] = tensor
        else:
            experts.setdefault(f"{self._block(name)}ffn_{_PARTS[part]}_exps.weight", []).append(tensor)

    def _delta(self, name: str, tensor: Tensor, out: dict[str, Tensor]) -> bool:
        if ".linear_attn." not in name:
            return False
        raw, block, rest = self.model.config.raw, self._block(name), name.split(".linear_attn.")[1]
        keys, values = raw["linear_num_key_heads"], raw["linear_num_value_heads"]
        key_dim, value_dim, ratio = raw["linear_key_head_dim"], raw["linear_value_head_dim"], values // keys
        first = 2 * keys * key_dim

        def tiled(rows: Tensor, width: int) -> Tensor:
            if self.arch == "qwen3next":
                return rows
            return rows.reshape(keys, ratio, width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

        if rest == "in_proj_qkvz.weight" and not self.legacy:
            grouped = tensor.view(keys, -1, tensor.shape[1])
            sizes = [key_dim, key_dim, ratio * value_dim, ratio * value_dim]
            pieces = torch.split_with_sizes(grouped, sizes, 1)
            query, key, value, gate = (piece.reshape(-1, tensor.shape[1]) for piece in pieces)
            out[block + "attn_qkv.weight"] = torch.cat((query, key, value))
            out[block + "attn_gate.weight"] = gate
        elif rest == "in_proj_qkv.weight" or rest == "conv1d.weight":
            rows = tensor.squeeze(1) if tensor.dim() == 3 else tensor
            stacked = "attn_qkv.weight" if tensor.dim() == 2 else "ssm_conv1d.weight"
            out[block + stacked] = torch.cat((rows[:first], tiled(rows[first:], value_dim)))
        else:
            plain: dict[str, tuple[str, Callable[[], Tensor]]] = {
                "in_proj_qkvz.weight": ("ssm_in.weight", lambda: tensor),
                "in_proj_ba.weight": ("ssm_ba.weight", lambda: tensor),
                "in_proj_z.weight": ("attn_gate.weight", lambda: tiled(tensor, value_dim)),
                "in_proj_b.weight": ("ssm_beta.weight", lambda: tiled(tensor, 1)),
                "in_proj_a.weight": ("ssm_alpha.weight", lambda: tiled(tensor, 1)),
                "A_log": ("ssm_a", lambda: tiled(-tensor.float().exp(), 1)),
                "dt_bias": ("ssm_dt" if self.ollama else "ssm_dt.bias", lambda: tiled(tensor, 1)),
                "norm.weight": ("ssm_norm.weight", lambda: tensor),
                "out_proj.weight": ("ssm_out.weight", lambda: tiled(tensor.T.contiguous(), value_dim).T),
            }
            new, rows_of = plain[rest]
            out[block + new] = rows_of()
        return True

    def _fused(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            block = name.rsplit(".", 2)[0]
            if name.endswith("ffn_gate_exps.weight"):
                both = (tensor, tensors[f"{block}.ffn_up_exps.weight"])
                out[f"{block}.ffn_gate_up_exps.weight"] = torch.cat(both, 1)
            elif name.endswith("attn_q.weight"):
                parts = [tensors[f"{block}.attn_{part}.weight"] for part in "qkv"]
                out[f"{block}.attn_qkv.weight"] = torch.cat(parts)
            elif not name.endswith(("ffn_up_exps.weight", "attn_k.weight", "attn_v.weight")):
                out[name] = tensor
        return out

    def _divisors(self) -> Tensor:
        """How much slower each pair turns than without Llama 3's scaling."""
        dim, rope = self.model.config.raw["head_dim"], _LLAMA3
        speeds = torch.pow(float(rope["rope_theta"]), -torch.arange(0, dim, 2).double() / dim)
        original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
        lengths = 2 * torch.pi / speeds
        smooth = (original / lengths - 1.0) / 3.0
        blended = 1 / ((1 - smooth) / factor + smooth)
        blended[lengths > original] = factor
        blended[lengths < original / 4] = 1.0
        return blended.float()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    else:
        writer.add_array(key, value)
