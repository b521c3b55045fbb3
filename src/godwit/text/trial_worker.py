"""A separate process that reads a tokenizer and uses it a little, within limits of time and memory.

It is started by path. On stdin it gets a line of JSON (`sys_path`, `where`, `sizes` of the files by their
names, `seconds`, `memory_bytes`) and then the files' bytes one after the other. On stdout it writes `{}`, or
`{"kind": class of godwit.errors, "error": text}`. A process that ends without an answer has run into a limit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

#: Words, numbers, code, white space, other scripts, marks that combine, and runs of one letter.
TEXTS = (
    "",
    "a",
    "The quick brown fox's 1,234 dogs didn't mind:\n\n\tdef f(x): return {'a': [x ** 2]}  # ...\r\n",
    "Größe é e\u0301 \u4f60\u597d \u0417\u0434\u0440\u0430 \u0645\u0631\u062d\u0628\u0627 \ufdfa \u00a0",
    "\U0001f469\u200d\U0001f4bb <|im_start|><s>[INST]",
    "".join(map(chr, range(1, 256))),
    "a" * 2000 + " " * 2000 + "\n" * 500 + "1" * 500 + "!?" * 500,
)


def use(tokenizer: Any) -> None:
    """What is later done with texts of users; that a vocabulary cannot write one of them does no harm."""
    from godwit.errors import GodwitError

    for text in TEXTS:
        with contextlib.suppress(GodwitError):
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=False)


def limit(seconds: float, memory_bytes: int) -> None:
    """Let the system end this process at the limits, where it can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        cpu = math.ceil(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer(setup: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
    """What to say of a tokenizer: nothing where all is well."""
    from godwit.errors import GodwitError
    from godwit.text.tokenizer import Tokenizer

    limit(setup["seconds"], setup["memory_bytes"])
    try:
        use(Tokenizer.from_files(files, setup["where"], trusted=True))
    except GodwitError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {}


def main() -> None:
    """Read, try, answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    setup = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = setup["sys_path"]
    files = {name: sys.stdin.buffer.read(size) for name, size in setup["sizes"].items()}
    print(json.dumps(answer(setup, files)), flush=True)


if __name__ == "__main__":
    main()
