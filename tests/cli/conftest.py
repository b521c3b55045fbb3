"""Models whose answers are known, for driving the command line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from tests.engine.tiny import CALL, CHAINS, write_chain_model

#: For each dialect: how a template shows tools, how it writes the call `f` of a message, and the call itself.
CALLS: Mapping[str, tuple[str, str, str]] = {
    "hermes": (
        """<tool_call>{{ tools | tojson }}""",
        """<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>""",
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
    ),
    "xml": (
        """<tool_call>{{ tools | tojson }}""",
        """<tool_call><function={{ f.name }}></function></tool_call>""",
        "<tool_call>\n<function=get_time>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    ),
    "llama": (
        """{{ tools | tojson }}""",
        """{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}""",
        json.dumps({"name": CALL["name"], "parameters": CALL["arguments"]}),
    ),
    "mistral": (
        """{{ tools | tojson }}""",
        """[TOOL_CALLS] [{"name": "{{ f.name }}", "id": "{{ call.id }}"}]
        {%- if call.id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}""",
        f"[TOOL_CALLS] [{json.dumps(CALL)}]",
    ),
    "mistral_args": (
        """{{ tools | tojson }}""",
        """[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}""",
        '[TOOL_CALLS]get_time[ARGS]{"city": "Oslo"}',
    ),
}


def _calling(*words: str) -> dict[str, str]:
    """Answers a message with these words, and a result with one."""
    said = ["\n", *words, "<|im_end|>"]
    return {**dict(itertools.pairwise(said)), ":": "Done.", "Done.": "<|im_end|>"}


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
    "thinking_aloud": {
        "\n": "hm",
        "hm": "</think>",
        "</think>": "Yes.",
        "Yes.": "<|im_end|>",
    },
    **{name: _calling(call) for name, (_, _, call) in CALLS.items()},
    "mistral": _calling("[TOOL_CALLS]", CALLS["mistral"][2].removeprefix("[TOOL_CALLS]")),
    "calls": _calling(CALLS["hermes"][2], " and ", CALLS["hermes"][2] + "\n"),
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
