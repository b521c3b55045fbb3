"""A worker process with one engine, which runs the measurements that peers.py requests.

Only the standard library is imported at the top: the process runs in the environment of its engine. Requests
and replies are JSON objects, one per line, on stdin and stdout:

    {"kind": "prefill", "tokens": 512}                          -> {"seconds": 4.1}
    {"kind": "decode", "tokens": 32, "depth": 4096, "batch": 1} -> {"seconds": 1.2}
    {"kind": "memory"}                                          -> {"peak": 1234, "proportional": 1200}

All engines read random tokens, different ones for every sequence and step, and compute the likeliest next
token of every row. The first line, before any request, describes the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol


@dataclass(frozen=True)
class Case:
    """As in godwit.measure.bench."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def length(self) -> int:
        """Tokens of each sequence at the end."""
        return self.depth + self.tokens


class Engine(Protocol):
    """The interface of an engine."""

    def describe(self) -> dict[str, Any]: ...

    def seconds(self, case: Case) -> float: ...


class Godwit:
    """A packed file on godwit's native kernels."""

    def __init__(self, path: str, cases: Sequence[Case], threads: int, chunk: int) -> None:
        import torch

        from godwit import _native
        from godwit.measure import bench_cases, costs
        from godwit.measure.parity import check_kernels, require_parity
        from godwit.models.native import load_packed

        torch.set_num_threads(threads)
        _native.set_num_threads(threads)
        self.module = bench_cases
        self.model = load_packed(path)
        self.formats = costs.formats_of(self.model)
        self.costs = costs.costs_of(self.model.config, self.formats, costs.trunk_caches(self.model))
        require_parity(check_kernels(self.model.config, self.formats.values()))
        self.runner = bench_cases.CaseRunner(self.model, [self._case(case) for case in cases], chunk)

    def describe(self) -> dict[str, Any]:
        import godwit

        packed = sorted(name for name in set(self.formats.values()) if name != "float32")
        return {
            "version": f"godwit {godwit.__version__}",
            "weights": "/".join(packed),
            "weight_bytes_per_token": self.costs.step_bytes(1, -1) - 2 * self.costs.state,
        }

    def seconds(self, case: Case) -> float:
        return self.runner.seconds(self._case(case))

    def _case(self, case: Case) -> Any:
        return self.module.Case(
            "prefill" if case.kind == "prefill" else "decode", case.tokens, case.depth, case.batch
        )


class Transformers:
    """A random bfloat16 model with the architecture of a config.json; caches are filled by a real prefill."""

    def __init__(self, path: str, cases: Sequence[Case], threads: int, chunk: int) -> None:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        torch.set_num_threads(threads)
        self.torch, self.chunk = torch, chunk
        config = transformers.AutoConfig.from_pretrained(path)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        kind._init_weights = lambda self, module: None  # its own initialisation takes minutes; done below
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            pattern = torch.randn(1 << 20).to(torch.bfloat16) * 0.02
            for parameter in self.model.parameters():
                flat = parameter.view(-1)
                for start in range(0, len(flat), len(pattern)):
                    part = flat[start : start + len(pattern)]
                    part.copy_(pattern[: len(part)])
        self.vocab = config.vocab_size
        self.caches: dict[tuple[int, int], Any] = {}

    def describe(self) -> dict[str, Any]:
        return {"version": f"transformers {metadata.version('transformers')}", "weights": "bf16"}

    def seconds(self, case: Case) -> float:
        with self.torch.inference_mode():
            return self._prefill(case) if case.kind == "prefill" else self._decode(case)

    def _ids(self, batch: int, count: int) -> Any:
        return self.torch.randint(self.vocab, (batch, count))

    def _read(self, batch: int, count: int) -> Any:
        """Read a prompt in pieces; return the last output."""
        ids, output = self._ids(batch, count), None
        for start in range(0, count, self.chunk):
            piece = ids[:, start : start + self.chunk]
            past = None if output is None else output.past_key_values
            output = self.model(piece, past_key_values=past, use_cache=True, logits_to_keep=1)
        return output

    def _prefill(self, case: Case) -> float:
        began = perf_counter()
        self._read(1, case.tokens).logits[:, -1].argmax(-1).tolist()
        return perf_counter() - began

    def _decode(self, case: Case) -> float:
        copy = importlib.import_module("copy").deepcopy
        key = (case.batch, case.depth)
        if case.depth and key not in self.caches:
            self.caches[key] = self._read(*key).past_key_values
        past = copy(self.caches[key]) if case.depth else None
        steps = [self._ids(case.batch, 1) for _ in range(case.tokens)]
        began = perf_counter()
        for ids in steps:
            output = self.model(ids, past_key_values=past, use_cache=True)
            past = output.past_key_values
            output.logits[:, -1].argmax(-1).tolist()
        return perf_counter() - began


class LlamaCpp:
    """A GGUF file in llama.cpp; caches are restored from a copy made by one real prefill."""

    def __init__(self, path: str, cases: Sequence[Case], threads: int, chunk: int) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self.numpy: Any = importlib.import_module("numpy")
        self.chunk = chunk
        self.log = self.lib.llama_log_callback(lambda level, text, data: None)
        self.lib.llama_log_set(self.log, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        model = self.lib.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        sequences = max(case.batch for case in cases)
        context = self.lib.llama_context_default_params()
        context.n_ctx = sequences * -(-max(case.length for case in cases) // 256) * 256
        context.n_batch = context.n_ubatch = max(chunk, sequences)
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot create a context for {path}")
        self.memory = self.lib.llama_get_memory(self.context)
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.batch = self.lib.llama_batch_init(max(chunk, sequences), 0, 1)
        self.saved: dict[int, Any] = {}

    def describe(self) -> dict[str, Any]:
        return {"version": f"llama-cpp-python {self.lib.__version__}"}

    def seconds(self, case: Case) -> float:
        self.lib.llama_memory_clear(self.memory, True)
        if case.kind == "prefill":
            ids = self._ids(case.tokens)
            began = perf_counter()
            self._read(ids)
            return perf_counter() - began
        self._restore(case)
        steps = [self._ids(case.batch) for _ in range(case.tokens)]
        began = perf_counter()
        for number, ids in enumerate(steps):
            self._step([(token, case.depth + number, seq, True) for seq, token in enumerate(ids)])
            for row in range(case.batch):
                self._choose(row)
        return perf_counter() - began

    def _ids(self, count: int) -> list[int]:
        return [random.randrange(self.vocab) for _ in range(count)]

    def _read(self, ids: Sequence[int]) -> int:
        last = len(ids) - 1
        for start in range(0, len(ids), self.chunk):
            piece = enumerate(ids[start : start + self.chunk], start)
            self._step([(token, place, 0, place == last) for place, token in piece])
        return self._choose(-1)

    def _restore(self, case: Case) -> None:
        if not case.depth:
            return
        if case.depth not in self.saved:
            self._read(self._ids(case.depth))
            size = self.lib.llama_state_seq_get_size(self.context, 0)
            self.saved[case.depth] = (ctypes.c_uint8 * size)()
            self.lib.llama_state_seq_get_data(self.context, self.saved[case.depth], size, 0)
            self.lib.llama_memory_clear(self.memory, True)
        data = self.saved[case.depth]
        for seq in range(case.batch):
            if not self.lib.llama_state_seq_set_data(self.context, data, len(data), seq):
                raise RuntimeError("llama.cpp cannot restore a sequence")

    def _step(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, place, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, place
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq, wanted
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp could not run a step ({status})")
        self.lib.llama_synchronize(self.context)

    def _choose(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab,)).argmax())


ENGINES: Mapping[str, Callable[[str, Sequence[Case], int, int], Engine]] = {
    "godwit": Godwit,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def memory() -> dict[str, int | None]:
    """Bytes of this process: peak resident memory, and current resident memory with shared pages divided."""

    def kib(file: str, name: str) -> int | None:
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)

    return {
        "peak": kib("/proc/self/status", "VmHWM"),
        "proportional": kib("/proc/self/smaps_rollup", "Pss"),
    }


def answer(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one request."""
    if request["kind"] == "memory":
        return memory()
    return {"seconds": engine.seconds(Case(**request))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--cases", required=True, help="JSON list of all cases that will be requested")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print, but not between the replies
    cases = [Case(**case) for case in json.loads(args.cases)]
    engine = ENGINES[args.engine](args.model, cases, args.threads, args.chunk)
    print(json.dumps(engine.describe()), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
