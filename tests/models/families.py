"""Small configurations of every family, with the odd sizes and rare switches that real ones hide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCAB = 131


@dataclass(frozen=True)
class Family:
    """One configuration; ``fields`` are those of the ``transformers`` class for ``model_type``."""

    name: str
    model_type: str
    fields: Mapping[str, Any]

    @property
    def text_fields(self) -> Mapping[str, Any]:
        fields: Mapping[str, Any] = self.fields.get("text_config", self.fields)
        return fields

    @property
    def is_sparse(self) -> bool:
        return "num_experts_per_tok" in self.text_fields


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 54,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
}
_EXPERTS = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "intermediate_size": 44,
    # a thousand times the usual weight, so that a wrong balance loss shows in the gradients
    "router_aux_loss_coef": 1.0,
}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 28}
_DENSE = {**_BASE, "intermediate_size": 76, "num_hidden_layers": 2}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 54,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_WRAPPER = {
    "vision_config": _VISION,
    "image_token_id": 127,
    "video_token_id": 128,
    "vision_start_token_id": 129,
    "vision_end_token_id": 130,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES = (
    Family("qwen3_next", "qwen3_next", {**_BASE, **_DELTA, **_SHARED}),
    Family(
        "qwen3_next ratio 3, conv 3, tied",
        "qwen3_next",
        {
            **_BASE,
            **_DELTA,
            **_SHARED,
            "linear_num_key_heads": 2,
            "linear_conv_kernel_dim": 3,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "qwen3_next ratio 4, one dense layer, raw router weights",
        "qwen3_next",
        {
            **_BASE,
            **_DELTA,
            **_SHARED,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 4,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    Family(
        "qwen3_next every second layer sparse, YaRN",
        "qwen3_next",
        {
            **_BASE,
            **_DELTA,
            **_SHARED,
            "decoder_sparse_step": 2,
            "rope_parameters": {**_YARN, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        },
    ),
    Family(
        "qwen3_next as Coder-Next",
        "qwen3_next",
        {
            **_BASE,
            **_DELTA,
            **_SHARED,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "rope_theta": 5_000_000.0,
        },
    ),
    Family("qwen3 tied", "qwen3", {**_DENSE, "rope_theta": 1e6, "tie_word_embeddings": True}),
    Family("qwen3 YaRN", "qwen3", {**_DENSE, "rope_parameters": {**_YARN, "rope_theta": 1e6}}),
    Family("qwen3_moe", "qwen3_moe", {**_BASE, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    Family("qwen3_moe raw router weights", "qwen3_moe", {**_BASE, **_EXPERTS, "norm_topk_prob": False}),
    Family(
        "mixtral", "mixtral", {**_DENSE, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_theta": 1e6}
    ),
    Family(
        "llama as 3.2, tied",
        "llama",
        {
            **_DENSE,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Family("llama with biases", "llama", {**_DENSE, "attention_bias": True, "mlp_bias": True}),
    Family("qwen3_5_text", "qwen3_5_text", {**_BASE, **_DELTA, "intermediate_size": 76}),
    Family(
        "qwen3_5_moe_text",
        "qwen3_5_moe_text",
        {**_BASE, **_DELTA, **_SHARED, "linear_num_key_heads": 2, "tie_word_embeddings": True},
    ),
    Family(
        "qwen3_5 wrapper",
        "qwen3_5",
        {
            **_WRAPPER,
            "text_config": {
                **_BASE,
                **_DELTA,
                "intermediate_size": 76,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
            },
        },
    ),
    Family(
        "qwen3_5_moe wrapper",
        "qwen3_5_moe",
        {
            **_WRAPPER,
            "text_config": {
                **_BASE,
                **_DELTA,
                **_SHARED,
                "num_hidden_layers": 3,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            },
        },
    ),
)
BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}
