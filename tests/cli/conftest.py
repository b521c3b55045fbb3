"""Models whose answers are known, for driving the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from tests.engine.tiny import CALL, CHAINS, write_chain_model

FOLLOW: Mapping[str, Mapping[str, str]] = {
    **CHAINS,
    "tool": {
        "\n": "<tool_call>",
        "<tool_call>": json.dumps(CALL),
        json.dumps(CALL): "</tool_call>",
        "</tool_call>": "<|im_end|>",
        ":": "Done.",
        "Done.": "<|im_end|>",
    },
    "steering": {"\n": "\x1b[31mred", "\x1b[31mred": "<|im_end|>"},
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The verbs set the number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Models(Protocol):
    def __call__(self, name: str, **kwargs: Any) -> str: ...


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Writes the model of a name in FOLLOW, once for each set of further arguments."""
    made: dict[str, Path] = {}

    def model(name: str, **kwargs: Any) -> str:
        key = f"{name} {sorted(kwargs.items())}"
        if key not in made:
            made[key] = write_chain_model(tmp_path_factory.mktemp("models") / name, FOLLOW[name], **kwargs)
        return str(made[key])

    return model
