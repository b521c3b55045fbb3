"""Configs that contradict themselves or leave fields out mean what ``transformers`` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from godwit.errors import GodwitError
from godwit.models.loader import load_model
from tests.models.families import BY_NAME, VOCAB
from tests.models.harness import (
    build_reference,
    error,
    packed_logits,
    randomize,
    reference_logits,
    tokens,
    transformers,
)

pytest.importorskip("transformers", reason="the reference implementation is not installed")

GONE = object()  # as the value of a field: take it out
IDS = tokens(12)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "factor": 3.0}
NEXT, DENSE, MOE, MIXTRAL, LLAMA = "qwen3_next", "qwen3 YaRN", "qwen3_moe", "mixtral", "llama with biases"
TIED, WRAPPED = "qwen3 tied", "qwen3_5 wrapper"
TEXT35, MOE35 = "qwen3_5_text", "qwen3_5_moe_text"


@dataclass(frozen=True)
class Case:
    """Edits of the top level and of the text part of a wrapper.

    ``refused``: weights and config disagree, and ``transformers`` makes up or drops weights where we refuse.
    """

    family: str
    edits: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    refused: bool = False


CASES = (
    *(
        Case(family, edits)
        for family in (NEXT, DENSE)
        for edits in (
            {"rope_scaling": YARN},
            {"rope_scaling": YARN, "rope_theta": 500.0},
            {"rope_scaling": {}, "rope_theta": 500.0},
            {"rope_theta": 500.0, "rope_parameters": GONE},
            {"rope_theta": 500.0, "rope_parameters": LINEAR},
            {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 60.0, "rope_type": "default"}},
            {"rope_parameters": {"type": "linear", "factor": 3.0}, "rope_scaling": None},
            {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 3.0}},
            {"rope_parameters": {"factor": 3.0}},
            {"rope_parameters": {"rope_type": "linear"}},
            {"rope_parameters": None},
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            {"partial_rotary_factor": 0.5, "rope_parameters": GONE},
        )
    ),
    *(
        Case(family, edits)
        for family in (MIXTRAL, LLAMA)
        for edits in (
            {"rope_scaling": YARN},
            {"rope_theta": 500.0, "rope_parameters": LINEAR},
            {"rope_parameters": {"type": "linear", "factor": 3.0}},
            {"rope_parameters": None},
            {"partial_rotary_factor": 0.5, "rope_parameters": GONE},
        )
    ),
    *(
        Case(family, edits)
        for family in (MOE, TEXT35, MOE35)
        for edits in ({"rope_scaling": {**YARN, "rope_theta": 70.0}}, {"rope_parameters": GONE})
    ),
    *(
        Case(family, edits)
        for family in (DENSE, LLAMA, MIXTRAL)
        for edits in (
            {"attention_bias": None},
            {"rms_norm_eps": None},
            {"rms_norm_eps": GONE, "torch_dtype": "float16", "dtype": "bfloat16"},
            {"quantization_config": None, "eos_token_id": [7, 9]},
            {"num_key_value_heads": None},
        )
    ),
    Case(NEXT, {"layer_types": None, "full_attention_interval": 4}),
    Case(NEXT, {"full_attention_interval": 2}),
    Case(NEXT, {"full_attention_interval": 2, "layer_types": GONE}, refused=True),
    Case(NEXT, {"full_attention_interval": None, "layer_types": GONE}),
    Case(NEXT, {"layer_types": ["full_attention"]}),
    Case(NEXT, {"partial_rotary_factor": None, "rope_parameters": GONE}),
    Case(NEXT, {"mlp_only_layers": [0]}, refused=True),
    Case(NEXT, {"decoder_sparse_step": 2}, refused=True),
    Case(NEXT, {"norm_topk_prob": False}),
    Case(NEXT, {"mlp_bias": True}),
    Case(MOE35, {"mlp_only_layers": [0], "decoder_sparse_step": 2, "norm_topk_prob": False}),
    Case(MOE35, {"num_local_experts": 3}),
    Case(TEXT35, {"attention_bias": None}),
    Case(NEXT, {"num_local_experts": 3}),
    Case(NEXT, {"norm_topk_prob": None}),
    Case(NEXT, {"norm_topk_prob": GONE}),
    Case(MOE, {"norm_topk_prob": GONE}),
    Case(MOE, {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
    Case(MOE, {"num_experts": 5}),
    Case(MOE, {"num_experts": 7, "num_local_experts": GONE}),
    Case(MOE, {"head_dim": None, "num_attention_heads": 6}, refused=True),
    Case(MIXTRAL, {"num_experts": 5, "num_local_experts": 3}),
    Case(MIXTRAL, {"attention_bias": True}),
    Case(MIXTRAL, {"mlp_bias": True}),
    Case(LLAMA, {"num_key_value_heads": 2, "sliding_window": 4, "use_sliding_window": True}),
    Case(LLAMA, {"num_attention_heads": 4}),
    Case(DENSE, {"head_dim": None}),
    Case(DENSE, {"mlp_bias": True}),
    Case(DENSE, {"use_sliding_window": True, "sliding_window": 4, "layer_types": GONE}),
    Case(DENSE, {"use_sliding_window": True, "sliding_window": None, "layer_types": GONE}),
    Case(TIED, {"rope_scaling": {**YARN, "rope_theta": 70.0}}),
    Case(WRAPPED, {"rope_theta": 500.0, "hidden_size": 7, "num_hidden_layers": 1}),
    Case(WRAPPED, {}, {"rope_scaling": YARN}),
    Case(WRAPPED, {}, {"rms_norm_eps": GONE, "model_type": GONE}),
    Case(WRAPPED, {"rope_scaling": YARN}, {"head_dim": None}),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family with random weights, made once."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            reference = build_reference(BY_NAME[name])
            randomize(reference)
            made[name] = tmp_path_factory.mktemp("family")
            reference.save_pretrained(made[name])
        return made[name]

    return directory


def edited(source: Path, target: Path, top: Mapping[str, Any], text: Mapping[str, Any]) -> Path:
    """The same weights with another config."""
    raw = json.loads((source / "config.json").read_text())
    for part, edits in ((raw, top), (raw.get("text_config", {}), text)):
        part.update(edits)
        for name in [name for name, value in part.items() if value is GONE]:
            del part[name]
    (target / "config.json").write_text(json.dumps(raw))
    (target / "model.safetensors").hardlink_to(source / "model.safetensors")
    return target


def theirs(directory: Path) -> Tensor | None:
    """Logits of ``transformers``; None where it refuses the directory or breaks on it."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    try:
        model = transformers().AutoModelForCausalLM.from_pretrained(directory, **options)
        return reference_logits(model.eval(), IDS)
    except Exception:  # its strict fields, its validators and PyTorch all have exceptions of their own
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_a_tied_checkpoint(same: bool, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """It is used where it differs from the embedding."""
    directory = edited(saved(TIED), tmp_path, {}, {})
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone() if same else torch.randn(VOCAB, 54)
    (directory / "model.safetensors").unlink()
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", {"format": "pt"})
    wanted = theirs(directory)
    with torch.no_grad():
        found = packed_logits(load_model(directory, dtype=torch.float32), [IDS])
    assert wanted is not None and error(found, wanted) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.edits}{case.text or ''}"[:90])
def test_as_transformers(case: Case, saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = edited(saved(case.family), tmp_path, case.edits, case.text)
    wanted = theirs(directory)
    if wanted is None or case.refused:
        with pytest.raises(GodwitError) as caught:
            load_model(directory, dtype=torch.float32)
        assert "\n" not in str(caught.value)
        return
    with torch.no_grad():
        found = packed_logits(load_model(directory, dtype=torch.float32), [IDS])
    assert error(found, wanted) < 1e-4
