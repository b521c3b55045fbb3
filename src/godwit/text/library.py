"""Loading tokenizers of the `tokenizers` library, which raises errors of its own kind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from godwit.errors import CheckpointError

from .trial import check_growth


def load(raw: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer without added tokens, and without what only training needs."""
    model = dict(raw["model"])
    if model.get("dropout"):
        model["dropout"] = None
    if model.get("continuing_subword_prefix") and model.get("type") != "WordPiece":
        # No language model has one, and a wrong one makes the library abort the program.
        raise CheckpointError("its continuing_subword_prefix is not supported")
    plain = {**raw, "model": model, "added_tokens": [], "truncation": None, "padding": None}
    check_growth(plain)
    with library_errors():
        return tokenizers.Tokenizer.from_str(json.dumps(plain))


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Makes CheckpointErrors of the bare Exceptions of the library, and of the panics of its Rust code."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"it is not a valid tokenizer ({error})") from None


def without_prefix(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer without the space that it prepends to a text."""
    return {**raw, **{key: _strip_prefix(raw.get(key)) for key in ("normalizer", "pre_tokenizer")}}


def _strip_prefix(step: Any) -> Any:
    if not isinstance(step, Mapping):
        return step
    if step.get("type") == "Prepend":
        return None
    result = {**step}
    if "prepend_scheme" in step:
        result["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        result["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            result[key] = [inner for inner in map(_strip_prefix, step[key]) if inner is not None]
    return result
