"""Forms, tools, and how far a form lets a text through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import godwit
from godwit.dialect.lark import ThinkingBefore
from godwit.engine.constraint.constraints import Constraints, FormKind, GrammarConstraint
from godwit.text.tokenizer import Tokenizer

FOLDER = Path(godwit.__file__).parent / "default_model"
FLAG = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"name": "now", "parameters": NOTHING},
]


def held(
    forms: Constraints, kind: FormKind, value: Any = None, thinking: ThinkingBefore = "none"
) -> GrammarConstraint:
    return forms.held_to(forms.rule(kind, value), thinking)


def walk(tokenizer: Tokenizer, form: GrammarConstraint, text: str) -> str:
    """How far a form lets a text through: "complete", "open", or what is left when it is refused."""
    ids = tokenizer.encode(text, allow_special=True, add_special_tokens=False)
    for place, id in enumerate(ids):
        mask = form.allowed()
        assert mask is not None and mask.dtype == torch.bool and mask.shape == (tokenizer.vocab_size,)
        specials = tokenizer.special_ids - tokenizer.stop_ids
        assert not mask[sorted(specials)].any()
        assert mask[sorted(tokenizer.stop_ids)].tolist() == [form.complete] * len(tokenizer.stop_ids)
        if not mask[id]:
            return tokenizer.decode(ids[place:])
        form.accept(id)
    return "complete" if form.complete else "open"
