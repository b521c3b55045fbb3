"""Small models and a small tokenizer, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import save_model
from godwit.text.tokenizer import ChatTemplate, Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
VOCAB = 256 + len(SPECIAL) + len(TAGS)
PADDED = 272  # rows of the models: some more than there are tokens
TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": ' }}
        {{- (call.function.arguments | tojson) ~ '}</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant' ~ (':' if messages[-1].role == 'tool' else '\\n') }}
{%- endif %}
"""
_COMMON = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "attention": {**_COMMON, "model_type": "qwen3", "num_hidden_layers": 2},
    "delta": {
        **_COMMON,
        **_DELTA,
        "model_type": "qwen3_next",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention"] * 2,
        "num_experts": 0,
    },
    "hybrid": {
        **_COMMON,
        **_DELTA,
        **_EXPERTS,
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "mtp_num_hidden_layers": 1,
    },
}


CALL = {"name": "get_time", "arguments": {"city": "Oslo"}}
#: Models that always say the same: for each last token the next one.
CHAINS: Mapping[str, Mapping[str, str]] = {
    "hello": {"\n": "Hello", "Hello": " there.", " there.": "<|im_end|>"},
    "endless": {"\n": "la ", "la ": "la "},
    "thinking": {
        "\n": "<think>",
        "<think>": "hm",
        "hm": "</think>",
        "</think>": "Yes.",
        "Yes.": "<|im_end|>",
    },
}


def tiny_model(kind: str, seed: int = 0) -> CausalLM:
    """A model of one of the kinds in CONFIGS with random weights, float32."""
    model = CausalLM(ModelConfig.from_dict(CONFIGS[kind]))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False).eval()


def masked_argmax(logits: Tensor) -> int:
    """The likeliest token that exists."""
    return int(logits[:VOCAB].argmax())


def tokenizer_json(words: Sequence[str] = ()) -> dict[str, Any]:
    """A byte-level vocabulary without merges; `words` are tokens of their own, in addition."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    added = [
        {"id": 256 + i, "content": text, "special": text in (*SPECIAL, "[TOOL_CALLS]")}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate([*SPECIAL, *TAGS, *words])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []},
    }


def tiny_tokenizer(stop_tokens: Sequence[str] = ("<|im_end|>",)) -> Tokenizer:
    """The tokenizer of the tiny models."""
    return Tokenizer(tokenizer_json(), chat_template=ChatTemplate(TEMPLATE), stop_tokens=stop_tokens)


def write_chain_model(
    path: Path,
    follow: Mapping[str, str],
    *,
    template: str | None = TEMPLATE,
    generation: Mapping[str, Any] | None = None,
    max_position: int = 4096,
) -> Path:
    """A model directory whose answers are known: after the token `a` always comes `follow[a]`.

    Texts in `follow` that are no tokens yet become tokens. The layers add nothing, so the head sees the last
    token only.
    """
    known = {*SPECIAL, *TAGS, "\n", ":"}
    words = [text for text in dict.fromkeys([*follow, *follow.values()]) if text not in known]
    raw = tokenizer_json(words)
    tokenizer = Tokenizer(raw)
    size = -(-tokenizer.vocab_size // 16) * 16
    config = {
        **CONFIGS["hybrid"],
        "vocab_size": size,
        "hidden_size": size,
        "max_position_embeddings": max_position,
    }
    model = CausalLM(ModelConfig.from_dict(config)).requires_grad_(False)
    model.init_weights()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    model.embedding.weight.copy_(torch.eye(size))
    for last, following in follow.items():
        model.head_weight[_id(tokenizer, following), _id(tokenizer, last)] = 10.0
    files = {
        "tokenizer.json": raw,
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "generation_config.json": dict(generation or {}),
    }
    extra = {name: json.dumps(content).encode() for name, content in files.items()}
    if template is not None:
        extra["chat_template.jinja"] = template.encode()
    save_model(model, path, extra_files=extra)
    return path


def write_random_model(path: Path, kind: str = "hybrid", seed: int = 0) -> Path:
    """A model directory with random weights and the tiny tokenizer."""
    files = {
        "tokenizer.json": json.dumps(tokenizer_json()),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}),
        "chat_template.jinja": TEMPLATE,
    }
    save_model(
        tiny_model(kind, seed), path, extra_files={name: text.encode() for name, text in files.items()}
    )
    return path


def _id(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, allow_special=True)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is not one token")
    return ids[0]
