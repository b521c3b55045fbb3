"""The fields of a ``config.json``, each checked; absent fields have the defaults of ``transformers``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from godwit.errors import CheckpointError
from godwit.file_kinds import kind_of, refusal
from godwit.safe_files import check_json, read_bounded

MAX_CONFIG_BYTES = 16 * 2**20

_COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_HYBRID = {
    **_COMMON,
    "num_attention_heads": 16,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_QWEN35 = {
    **_HYBRID,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_QWEN35_MOE = {
    **_HYBRID,
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}

#: ``model_type`` -> the values of absent fields: those of the ``transformers`` configuration classes.
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3_next": {
            **_HYBRID,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
        },
        "qwen3": {
            **_COMMON,
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        "qwen3_moe": {
            **_COMMON,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        "mixtral": {
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        },
        "llama": {
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        "qwen3_5": _QWEN35,
        "qwen3_5_text": _QWEN35,
        "qwen3_5_moe": _QWEN35_MOE,
        "qwen3_5_moe_text": _QWEN35_MOE,
    }
)


def checked_number(name: str, value: object, low: float = 0.0) -> float:
    """``value`` as a float from ``low`` to 1e12. Raises CheckpointError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1e12:
        raise CheckpointError(
            f"config field {name} must be a number from {low:g} to 1e12, found {value!r:.60}"
        )
    return float(value)


class Fields:
    """The text part of a config. A null field is an error, unless the caller gives a value for ``null``."""

    def __init__(self, text: Mapping[str, Any], model_type: str) -> None:
        self.text = text
        self.defaults = DEFAULTS[model_type]

    def get(self, name: str) -> Any:
        """The value of a field, unchecked, or its default."""
        return self.text[name] if name in self.text else self.defaults.get(name)

    def integer(self, name: str, low: int = 1, high: int = 2**31 - 1, *, null: int | None = None) -> int:
        """A whole number from ``low`` to ``high``. Raises CheckpointError."""
        value = self.get(name)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            wanted = f"a whole number from {low} to {high}"
            raise CheckpointError(
                f"config field {name} must be {wanted}, found {value!r:.60}{self._origin(name)}"
            )
        return value

    def stated(self, name: str, value: int) -> str:
        """A field and its value for an error message, which says so where the value is a default."""
        return f"{value} {name}{self._origin(name)}"

    def _origin(self, name: str) -> str:
        return "" if name in self.text else " (the default; the file does not state it)"

    def number(self, name: str, low: float = 0.0) -> float:
        """A number from ``low`` to 1e12. Raises CheckpointError."""
        return checked_number(name, self.get(name), low)

    def flag(self, name: str) -> bool:
        """True or false. Raises CheckpointError."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"config field {name} must be true or false, found {value!r:.60}")
        return value


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Parse a ``config.json`` with a size limit.

    Raises:
        CheckpointError: missing, not a regular file, too large, a link out of its folder, or not a JSON
            object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        data = read_bounded(file, MAX_CONFIG_BYTES, folder=file.parent)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: no such file; give a model directory or its config.json") from None
    check_json(data, file)
    try:
        raw = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        kind = kind_of(data, len(data))
        if kind is not None:
            raise refusal(file, kind) from None
        raise CheckpointError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: a model config must be a JSON object, found {type(raw).__name__}")
    return raw
