"""Convert a GGUF file's keys to the ``config.json`` of the same model.

The architecture determines what the file does not state: output gates, norms, the kind of router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from godwit.checkpoint.safetensors import shown
from godwit.errors import CheckpointError, UnsupportedModelError

#: ``general.architecture`` -> ``model_type``; "llama" with experts is Mixtral.
ARCHITECTURES: Mapping[str, str] = {
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "llama": "llama",
}
_HYBRID = ("qwen3next", "qwen35", "qwen35moe")
_SOFTMAX = 1  # expert_gating_func


@dataclass(frozen=True)
class Metadata:
    """Typed access to the keys of one file."""

    path: Path
    keys: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """Raises: UnsupportedModelError: not one of :data:`ARCHITECTURES`, or no model at all."""
        found = self.keys.get("general.architecture")
        kind = self.keys.get("general.type", "model")
        if kind != "model" or found == "clip":
            what = "a LoRA adapter" if kind == "adapter" else f"no language model but {shown(kind)}"
            raise UnsupportedModelError(f"{self.path}: {what}; give the GGUF file of the model itself")
        if found not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedModelError(
                f"{self.path}: architecture {shown(found)} is not supported; Godwit runs: {known}"
            )
        return str(found)

    def get(self, name: str) -> Any:
        """The key ``name`` of this architecture, or None."""
        return self.keys.get(f"{self.architecture}.{name}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; of a list by layers the largest (0 stands for layers without attention)."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
            value = int(value.max())
        return int(self._checked(name, default if value is None else value, int))

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        return float(self._checked(name, default if value is None else value, (int, float)))

    def _checked(self, name: str, value: Any, kind: Any) -> Any:
        key = f"{self.architecture}.{name}"
        if value is None:
            raise CheckpointError(f"{self.path}: has no key {key}; fetch the file again")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: its key {key} is {shown(value)}, not a number")
        return value


def read_config(found: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of a file whose tensors have these ``shapes``.

    Raises:
        UnsupportedModelError: another architecture, or a feature that is not supported.
        CheckpointError: a key is missing or is no number.
    """
    arch = found.architecture
    model_type = ARCHITECTURES[arch]
    num_experts = found.integer("expert_count", 0)
    if arch == "llama" and num_experts:
        model_type = "mixtral"
    heads = found.integer("attention.head_count")
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": shapes.get("token_embd.weight", (found.integer("vocab_size", 0),))[0],
        "hidden_size": found.integer("embedding_length"),
        "num_hidden_layers": num_trunk_layers(found, shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": found.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(found, heads),
        "rms_norm_eps": _decimal(found.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": found.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rotary(found),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "sliding_window": found.get("attention.sliding_window") or None,
        **_feed_forward(found, num_experts),
    }
    if arch in _HYBRID:
        config.update(_delta(found, config["num_hidden_layers"]))
        config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"]
    if num_mtp_layers(found):
        config["mtp_num_hidden_layers"] = num_mtp_layers(found)
    return config


def num_mtp_layers(found: Metadata) -> int:
    """Layers of the multi-token-prediction module, which come after those of the trunk."""
    return found.integer("nextn_predict_layers", 0)


def num_trunk_layers(found: Metadata, names: Iterable[str]) -> int:
    """Decoder layers of a file with tensors of these names.

    ``block_count`` counts the layers of MTP too, but not in files of Ollama's own converter.
    """
    beside = is_from_ollama(found.keys, found.architecture) or any(name.startswith("mtp.") for name in names)
    inside = any(".nextn." in name for name in names)
    return found.integer("block_count") - (num_mtp_layers(found) if inside or not beside else 0)


def is_from_ollama(keys: Mapping[str, Any], arch: str) -> bool:
    """Whether Ollama's own converter wrote the file, whose MTP block and head order differ."""
    marks = ("vision.block_count", "image_token_id", "ssm.v_head_reordered", "rope.mrope_interleaved")
    return any(f"{arch}.{mark}" in keys for mark in marks) or "qwen35moe.feed_forward_length" in keys


def _head_dim(found: Metadata, heads: int) -> int:
    dim = found.integer("attention.key_length", found.integer("embedding_length") // max(1, heads))
    if found.integer("attention.value_length", dim) != dim:
        raise UnsupportedModelError(f"{found.path}: keys and values of different widths are not supported")
    return dim


def _feed_forward(found: Metadata, num_experts: int) -> dict[str, Any]:
    if not num_experts:
        return {"intermediate_size": found.integer("feed_forward_length")}
    if found.integer("expert_gating_func", _SOFTMAX) != _SOFTMAX:
        raise UnsupportedModelError(f"{found.path}: only routers with a softmax are supported")
    if found.architecture == "llama":
        return {
            "num_local_experts": num_experts,
            "num_experts_per_tok": found.integer("expert_used_count"),
            "intermediate_size": found.integer("feed_forward_length"),
        }
    width = found.integer("expert_feed_forward_length")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": found.integer("expert_used_count"),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": found.integer("expert_shared_feed_forward_length", width),
        "intermediate_size": found.integer("feed_forward_length", width),
        "norm_topk_prob": True,  # llama.cpp renormalises for all of these architectures
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _delta(found: Metadata, count: int) -> dict[str, Any]:
    heads, inner = found.integer("ssm.time_step_rank"), found.integer("ssm.inner_size")
    if heads < 1 or inner % heads:
        raise CheckpointError(f"{found.path}: ssm.inner_size {inner} is not divided by {heads} heads")
    return {
        "linear_num_key_heads": found.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": found.integer("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": found.integer("ssm.conv_kernel"),
        "layer_types": _layer_types(found, count),
    }


def _layer_types(found: Metadata, count: int) -> list[str]:
    recurrent = found.get("attention.recurrent_layers")
    if isinstance(recurrent, np.ndarray) and recurrent.size >= count:
        linear = [bool(value) for value in recurrent[:count]]
    else:
        interval = max(1, found.integer("full_attention_interval", 4))
        linear = [bool((index + 1) % interval) for index in range(count)]
    return ["linear_attention" if is_linear else "full_attention" for is_linear in linear]


def _rotary(found: Metadata) -> dict[str, Any]:
    """The rotary embedding as ``rope_parameters``."""
    heads = found.integer("attention.head_count")
    dim = _head_dim(found, heads)
    params: dict[str, Any] = {"rope_type": "default", "rope_theta": found.number("rope.freq_base", 10000.0)}
    if found.architecture in _HYBRID:
        params["partial_rotary_factor"] = found.integer("rope.dimension_count", dim // 4) / dim
    elif found.integer("rope.dimension_count", dim) != dim:
        raise UnsupportedModelError(f"{found.path}: rotating a part of each head is not supported here")
    kind = found.get("rope.scaling.type") or "none"
    if kind == "none":
        return params
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{found.path}: rope scaling {shown(kind)} is not supported")
    params |= {"rope_type": kind, "factor": found.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        params["original_max_position_embeddings"] = found.integer("rope.scaling.original_context_length")
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if found.get(f"rope.scaling.{theirs}") is not None:
                params[ours] = found.number(f"rope.scaling.{theirs}")
        if found.get("rope.scaling.yarn_attn_factor") is not None:
            params["attention_factor"] = found.number("rope.scaling.yarn_attn_factor")
    return params


def llama3_rotary(divisors: np.ndarray[Any, Any], theta: float) -> dict[str, Any] | None:
    """The ``rope_parameters`` that give these divisors of the frequencies (``rope_freqs.weight [dim / 2]``).

    Llama 3.1 divides low frequencies by a factor, leaves high ones, and blends between. None where the
    divisors are not of this form.
    """
    factor, low, high = float(divisors.max()), 1.0, 4.0
    if factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    between = (divisors > 1.0) & (divisors < factor)
    if between.any():
        blend = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        original = round(float(np.mean(wavelengths[between] * (blend * (high - low) + low))))
    else:  # any length between the last high and the first low frequency does
        original = round(float(wavelengths[divisors == factor].min()) * low) - 1
    blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original,
    }  # fmt: skip


def _decimal(value: float) -> float:
    """1e-6 for the float32 next to it: configs hold the decimal number that was rounded."""
    return float(f"{value:.7g}") if np.float32(f"{value:.7g}") == np.float32(value) else value
