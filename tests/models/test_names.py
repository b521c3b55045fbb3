"""Packed and interleaved layouts are undone row by row: every row carries its own number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from godwit.config import ModelConfig
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import _part, export_tensors
from godwit.models.names import Alternatives, Placement, canonical_name, name_map

NEXT: Mapping[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 11,
    "hidden_size": 1,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "intermediate_size": 3,
}


def loaded(model: CausalLM, source: str) -> tuple[Placement, Tensor]:
    """The target parameter after loading ``source`` with row r holding the number r."""
    entries = name_map(model.config, 0)
    placements = (one for e in entries for one in (e.options[0] if isinstance(e, Alternatives) else (e,)))
    for entry in placements:
        if entry.source == source:
            parameter = dict(model.named_parameters())[entry.target]
            rows = torch.arange(entry.shape[0], dtype=torch.float32)
            _part(parameter, entry).copy_from(
                rows.view(-1, *[1] * (len(entry.shape) - 1)).expand(entry.shape)
            )
            return entry, parameter.detach()
    raise AssertionError(source)


def model(raw: Mapping[str, Any] = NEXT) -> CausalLM:
    return CausalLM(ModelConfig.from_dict(raw))


def test_qkvz_rows() -> None:
    """A key head's group holds its q[4], k[4], v of its 3 value heads [5] each, then their z."""
    _, parameter = loaded(model(), "model.layers.0.linear_attn.in_proj_qkvz.weight")
    group = 4 + 4 + 3 * 5 + 3 * 5
    expected = [group * j + c for j in range(2) for c in range(4)]
    expected += [group * j + 4 + c for j in range(2) for c in range(4)]
    expected += [group * (h // 3) + 8 + 5 * (h % 3) + c for h in range(6) for c in range(5)]
    expected += [group * (h // 3) + 8 + 15 + 5 * (h % 3) + c for h in range(6) for c in range(5)]
    assert parameter[:, 0].tolist() == expected


def test_ba_rows() -> None:
    """A key head's group holds b of its 3 value heads, then their a."""
    _, parameter = loaded(model(), "model.layers.0.linear_attn.in_proj_ba.weight")
    b, a = [0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]
    assert parameter[:, 0].tolist() == b + a


def test_query_and_gate_rows() -> None:
    """q_proj holds, head by head, 8 rows of query and 8 rows of gate."""
    _, parameter = loaded(model(), "model.layers.1.self_attn.q_proj.weight")
    query = [16 * head + c for head in range(3) for c in range(8)]
    assert parameter[:48, 0].tolist() == query + [row + 8 for row in query]


def test_split_projections() -> None:
    raw = {**NEXT, "model_type": "qwen3_5_text"}
    made = model(raw)
    conv, value = 2 * 8 + 30, 30
    for source, rows in (("qkv", slice(0, conv)), ("z", slice(conv, conv + value))):
        _, parameter = loaded(made, f"model.layers.0.linear_attn.in_proj_{source}.weight")
        assert parameter[rows, 0].tolist() == list(range(rows.stop - rows.start))
    for source, rows in (("b", slice(0, 6)), ("a", slice(6, 12))):
        _, parameter = loaded(made, f"model.layers.0.linear_attn.in_proj_{source}.weight")
        assert parameter[rows, 0].tolist() == list(range(6))


def test_convolution_channels_are_already_in_order() -> None:
    _, parameter = loaded(model(), "model.layers.0.linear_attn.conv1d.weight")
    assert parameter.shape == (46, 4)
    assert parameter[:, 0].tolist() == list(range(46))


def test_every_element_is_mapped_once() -> None:
    """Export of a model whose elements are all different holds each exactly once."""
    made = CausalLM(ModelConfig.from_dict({**NEXT, "num_experts": 0}), num_mtp=1).requires_grad_(False)
    count = 0
    for parameter in made.parameters():
        size = parameter.numel()
        parameter.copy_(torch.arange(count, count + size, dtype=torch.float32).view_as(parameter))
        count += size
    exported = torch.cat([tensor.flatten() for _, tensor in export_tensors(made)])
    assert torch.equal(exported.sort().values, torch.arange(count, dtype=torch.float32))


def test_spellings() -> None:
    assert canonical_name("model.language_model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert canonical_name("language_model.model.norm.weight") == "model.norm.weight"
    assert canonical_name("model.mtp.fc.weight") == "mtp.fc.weight"
    assert canonical_name("lm_head.weight") == "lm_head.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("language_model.mtp.fc.weight") == "mtp.fc.weight"
    assert canonical_name("layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert canonical_name("embed_tokens.weight") == "model.embed_tokens.weight"
    assert canonical_name("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    for tower in ("visual", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower"):
        assert canonical_name(f"{tower}.blocks.0.attn.proj.weight") is None
        assert canonical_name(f"model.{tower}.blocks.0.attn.proj.weight") is None
    assert canonical_name("model.visual.blocks.0.norm1.weight") is None
    assert canonical_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
