"""Measure the default model on held-out data, and write one result row.

    python -m recipes.default.evaluate --data build/default/data --out benchmarks/results/default-model.json

Bits per byte of held-out text, dialogues and reading answers; whether the model calls the right tool with the right
arguments where held-out dialogues call one; how often the MTP layer's guess is the trunk's choice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from godwit.cli.reply import ToolCall, parse_reply
from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.kernels.training import LinearCrossEntropy
from godwit.measure.report import result_row, write_json
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.text.tokenizer import Tokenizer
from godwit.train.data import TokenSource, learned
from godwit.train.evaluate import HeldOut

HELD_OUT = ("heldout_text", "heldout_dialogues", "heldout_reading")
CALL, END = "<tool_call>", "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="src/godwit/default_model")
    parser.add_argument("--data", required=True, help="output directory of recipes.default.prepare")
    parser.add_argument("--out", default="benchmarks/results/default-model.json")
    parser.add_argument(
        "--dialogues", type=int, default=60, help="held-out dialogues whose calls are compared"
    )
    options = parser.parse_args()
    model = load_model(options.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_dir(options.model)
    figures: dict[str, Any] = {
        "bits_per_byte": {name: round(bits_per_byte(model, options.data, name), 4) for name in HELD_OUT},
        "mtp_agreement": round(mtp_agreement(model, options.data), 4),
        "tool_calls": tool_calls(model, tokenizer, options.data, options.dialogues),
    }
    command = f"python -m recipes.default.evaluate --data DATA --dialogues {options.dialogues}"
    write_json(options.out, result_row(command, ("torch",), **figures))
    print(json.dumps(figures, indent=2))


def bits_per_byte(model: CausalLM, data: str, name: str) -> float:
    """Over the whole held-out source, in float32."""
    held_out = HeldOut(data, name, row_length=2048, rows=2, max_batches=10**6)
    return held_out.bits_per_byte(model, LinearCrossEntropy(compile_parts=False))


@torch.no_grad()
def mtp_agreement(model: CausalLM, data: str, documents: int = 60) -> float:
    """Share of learned positions in held-out dialogues where the MTP guess equals the trunk's likeliest token."""
    source = TokenSource.open(data, "heldout_dialogues")
    same = total = 0
    for index in range(min(documents, source.num_docs)):
        tokens, roles = source.document(index)
        ids = torch.from_numpy(tokens[:2048].astype(np.int64))
        batch = ForwardBatch.packed(ids, [len(ids)])
        hidden = model(batch)
        chosen = model.compute_logits(hidden).argmax(-1)
        guessed = model.compute_logits(model.forward_mtp(hidden, ids.roll(-1), batch)).argmax(-1)
        # slot p guesses token p + 2 when token p + 1 is the one that came; the trunk chooses it at p + 1
        spoken = torch.from_numpy(np.flatnonzero(learned(roles[2 : len(ids)])))
        same += int((guessed[spoken] == chosen[spoken + 1]).sum())
        total += len(spoken)
    return same / max(total, 1)


def tool_calls(model: CausalLM, tokenizer: Tokenizer, data: str, documents: int) -> dict[str, Any]:
    """Where held-out dialogues call a tool: how often the model does, with the right name, and exactly."""
    counts = {"places": 0, "called": 0, "right_tool": 0, "exact": 0}
    source = TokenSource.open(data, "heldout_dialogues")
    params = SamplingParams(temperature=0.0, max_tokens=200)
    with Engine(model, tokenizer, max_context=4096, max_sequences=1) as engine:
        for index in range(min(documents, source.num_docs)):
            for prompt, wanted in call_places(source.document(index)[0].tolist(), tokenizer):
                answer, _ = engine.submit(GenerationRequest(tuple(prompt), params)).result()
                counts["places"] += 1
                if calls := parse_reply(answer).calls:
                    counts["called"] += 1
                    counts["right_tool"] += calls[0].name == wanted.name
                    counts["exact"] += calls[0] == wanted
    return counts


def call_places(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[list[int], ToolCall]]:
    """The prompts before each call of a tokenised dialogue, with that call."""
    call, end = tokenizer.token_to_id(CALL), tokenizer.token_to_id(END)
    header = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
    for place, token in enumerate(ids):
        if token == call and ids[place - len(header) : place] == header and end in ids[place:]:
            answer = ids[place : ids.index(end, place)]
            said = parse_reply(tokenizer.decode(answer, skip_special=False))
            if said.calls:
                yield ids[:place], said.calls[0]


if __name__ == "__main__":
    main()
