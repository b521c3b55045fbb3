"""Train the byte-level BPE of the default model: `python recipes/default/tokenizer.py --data DIR --out DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.default.common import read_jsonl, stable_hash

VOCAB_SIZE = 6144
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ATOMIC = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# The pre-split of the Qwen2 family (transformers, Qwen2TokenizerFast): digits stand alone.
PRE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Share of each file to read, in percent: in full for what the model should express well.
SHARES = {
    "sgd_train-*": 30,
    "tm4_train": 15,
    "stories": 100,
    "dolly_subset": 100,
    "trivia_train": 60,
    "wordnet_chat": 60,
    "factbook_chat": 40,
    "fairytale_qa_train": 15,
    "gutenberg_simple-*": 28,
    "openstax": 35,
    "wikipedia": 25,
}


def texts_of(record: dict[str, Any]) -> Iterator[str]:
    """The texts of a record as the model will see them, with JSON spaced as in the chat template."""
    if "text" in record:
        yield record["text"]
    if "context" in record:
        yield "\n".join((record["context"], record["question"], record["answers"][0]))
    for tool in record.get("tools", ())[:2]:
        yield json.dumps(tool["function"], ensure_ascii=False)
    for message in record.get("messages", ()):
        if message.get("content"):
            yield message["content"]
        for call in message.get("tool_calls") or ():
            yield json.dumps(call, ensure_ascii=False)


def corpus(data: Path, limit: int | None = None) -> Iterator[str]:
    """A representative sample of the training files, in about the proportions of training."""
    for pattern, percent in SHARES.items():
        for path in sorted(data.glob(pattern + ".jsonl.xz")):
            for record in read_jsonl(path, limit):
                if stable_hash("bpe" + record["id"]) % 100 < percent:
                    yield from texts_of(record)


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE with `vocab_size` ids in total; the added tokens have the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(ATOMIC),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ATOMIC])
    return tokenizer


def write(tokenizer: Tokenizer, out: Path) -> None:
    """Write the four tokenizer and generation files of a checkpoint directory."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    template = Path(__file__).with_name("chat_template.jinja")
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in SPECIAL,
        }
        for text in SPECIAL + ATOMIC
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 4096,
    }
    end, turn = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    generation = {
        "do_sample": True,
        "eos_token_id": [turn, end],
        "pad_token_id": end,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
    }
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(template, out / template.name)


def build(data: Path, out: Path, limit: int | None = None) -> None:
    """Train on the files under `data` and write the result to `out`."""
    write(train(corpus(data, limit)), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="read only this many records of each file")
    options = parser.parse_args()
    build(options.data, options.out, options.limit)
