"""The worker's protocol, and what it asks of llama.cpp, on a stand-in for its library."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peer_worker
from benchmarks.peer_worker import Case, LlamaCpp, answer

VOCAB = 50
CASES = [Case("prefill", 40), Case("decode", 3, 20, 2), Case("decode", 2, 0, 1)]


class Library:
    """Notes every step: (token, position, sequence, wants logits) of each row."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int, int, bool]]] = []
        self.calls: list[str] = []
        self.status = 0
        self.context = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_default_params"):
            return SimpleNamespace

        def call(*args: Any) -> int:
            self.calls.append(name)
            return 1

        return call

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_init_from_model(self, model: Any, context: Any) -> Any:
        self.context = context
        return 1

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embd: int, sequences: int) -> Any:
        rows = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **rows)

    def llama_decode(self, context: Any, batch: Any) -> int:
        rows = [
            (batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i]))
            for i in range(batch.n_tokens)
        ]
        self.steps.append(rows)
        return self.status

    def llama_get_logits_ith(self, context: Any, row: int) -> Any:
        return (ctypes.c_float * VOCAB)(*range(VOCAB))

    def llama_state_seq_get_size(self, context: Any, seq: int) -> int:
        return 8

    def llama_state_seq_set_data(self, context: Any, data: Any, size: int, seq: int) -> int:
        self.calls.append(f"restore {seq}")
        return size


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "llama_cpp", made)
    return made


def test_llama_cpp_gets_room_for_the_longest_and_the_widest(library: Library) -> None:
    LlamaCpp("x.gguf", CASES, 3, 16)
    context = library.context
    assert (context.n_ctx, context.n_seq_max, context.n_batch, context.n_ubatch) == (512, 2, 16, 16)
    assert context.n_threads == context.n_threads_batch == 3


def test_llama_cpp_reads_a_prompt_in_pieces(library: Library) -> None:
    engine = LlamaCpp("x.gguf", CASES, 1, 16)
    assert engine.seconds(CASES[0]) > 0
    assert [len(step) for step in library.steps] == [16, 16, 8]
    rows = [row for step in library.steps for row in step]
    assert [place for _, place, _, _ in rows] == list(range(40))
    assert [wanted for *_, wanted in rows] == [False] * 39 + [True]
    assert len({token for token, *_ in rows}) > 10


def test_llama_cpp_decodes_from_a_restored_depth(library: Library) -> None:
    engine = LlamaCpp("x.gguf", CASES, 1, 16)
    engine.seconds(CASES[1])
    assert [len(step) for step in library.steps] == [16, 4, 2, 2, 2]  # the depth, then three steps
    assert [[row[1:] for row in step] for step in library.steps[2:]] == [
        [(20 + i, 0, True), (20 + i, 1, True)] for i in range(3)
    ]
    assert [call for call in library.calls if call.startswith("restore")] == ["restore 0", "restore 1"]
    engine.seconds(CASES[1])
    assert len(library.steps) == 5 + 3  # read once, restored ever after
    engine.seconds(CASES[2])
    assert [row[1] for step in library.steps[8:] for row in step] == [0, 1]


def test_a_step_that_fails_is_an_error(library: Library) -> None:
    engine = LlamaCpp("x.gguf", CASES, 1, 16)
    library.status = -3
    with pytest.raises(RuntimeError, match="could not run a step \\(-3\\)"):
        engine.seconds(CASES[0])


def test_the_likeliest_token_is_chosen(library: Library) -> None:
    assert LlamaCpp("x.gguf", CASES, 1, 16)._choose(0) == VOCAB - 1


class Half:
    """Takes half a second a token."""

    def describe(self) -> dict[str, Any]:
        return {}

    def seconds(self, case: Case) -> float:
        return case.tokens * case.batch / 2


def test_requests() -> None:
    assert answer(Half(), {"kind": "decode", "tokens": 4, "depth": 7, "batch": 3}) == {"seconds": 6.0}
    assert answer(Half(), {"kind": "prefill", "tokens": 4}) == {"seconds": 2.0}
    use = answer(Half(), {"kind": "memory"})
    assert use["peak"] is None or use["peak"] > 1 << 20
    with pytest.raises(TypeError):
        answer(Half(), {"kind": "decode", "tokens": 1, "speed": 3})


def test_it_starts_on_the_standard_library_alone() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({peer_worker.__file__!r})\n"
        "print([name for name in ('torch', 'numpy', 'godwit', 'llama_cpp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_engine_is_refused() -> None:
    line = [sys.executable, peer_worker.__file__, "vllm", "x", "--cases", json.dumps([])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'vllm'" in done.stderr
