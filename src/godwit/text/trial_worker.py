"""Reads an untrusted tokenizer and uses it a little, in a limited process; see :mod:`godwit.text.trial`.

It is the script of a :class:`godwit.worker.Worker`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
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
    """Encode and decode some texts; it does no harm that a vocabulary cannot write one of them."""
    from godwit.errors import GodwitError

    for text in TEXTS:
        with contextlib.suppress(GodwitError):
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=False)


def start(setup: Mapping[str, Any]) -> Callable[..., dict[str, str]]:
    """Answers `{"where": ..., "names": [...]}` and the files of these names.

    The answer is `{}` if all is well, or `{"kind": class of godwit.errors, "error": text}`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from godwit.errors import GodwitError
    from godwit.text.tokenizer import Tokenizer

    def answer(request: Mapping[str, Any], *contents: bytes) -> dict[str, str]:
        files = dict(zip(request["names"], contents, strict=True))
        try:
            use(Tokenizer.from_files(files, request["where"], trusted=True))
        except GodwitError as error:
            return {"kind": type(error).__name__, "error": str(error)}
        return {}

    return answer
