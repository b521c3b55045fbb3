"""Real servers on free ports, with the packaged model and with models whose answers are known."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from godwit.cli import common
from godwit.engine import Engine
from godwit.server.app import make_app
from godwit.server.host import EngineHost
from godwit.server.keys import Key
from godwit.server.run import Server, listen, make_server
from godwit.server.service import Service
from godwit.server.settings import Settings
from tests.engine.tiny import CALL, CHAINS, write_chain_model

FOLLOW: Mapping[str, Mapping[str, str]] = {
    **CHAINS,
    "tool": {
        "\n": "<tool_call>",
        "<tool_call>": json.dumps(CALL),
        json.dumps(CALL): "</tool_call>",
        "</tool_call>": "<tool_call>",
        ":": "Done.",
        "Done.": "<|im_end|>",
    },
    "agent": {
        "\n": '<tool_call>{"name": "patch", "arguments": {"input": "a',
        '<tool_call>{"name": "patch", "arguments": {"input": "a': '\\n\\"b\\" \\ud83d',
        '\\n\\"b\\" \\ud83d': '\\ude00"}}</tool_call>',
        '\\ude00"}}</tool_call>': '<tool_call>{"name": "git__log", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "git__log", "arguments": {}}</tool_call>': "<|im_end|>",
        ":": "Done.",
        "Done.": "<|im_end|>",
    },
    "broken": {
        "\n": "<tool_call>",
        "<tool_call>": '{"name": "f", "arguments": {"a": ',
        '{"name": "f", "arguments": {"a": ': "</tool_call>",
        "</tool_call>": "<|im_end|>",
    },
}


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    server: Server
    engine: Engine
    thread: threading.Thread

    def client(self, key: str = "", **kwargs: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **kwargs)


@contextmanager
def running(engine: Engine, **settings: Any) -> Iterator[Running]:
    """A server with an engine, both ended at the end; keys may be given without labels."""
    given = settings.pop("keys", ())
    keys = tuple(Key(one, f"key{n}") if isinstance(one, str) else one for n, one in enumerate(given, 1))
    options = Settings(keys=keys, **settings)
    service = Service(EngineHost(lambda: engine), options)
    listener = listen("127.0.0.1", 0)
    server = make_server(make_app(service), options)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Running(url, service, server, engine, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model in FOLLOW, written once."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = write_chain_model(tmp_path_factory.mktemp("models") / name, FOLLOW[name])
        return made[name]

    return path


Engines = Callable[..., Engine]


@pytest.fixture(scope="session")
def engines(model_dirs: Callable[[str], Path]) -> Engines:
    """Makes an engine of a model in FOLLOW."""

    def make(name: str, **kwargs: Any) -> Engine:
        opened = common.open_model(str(model_dirs(name)))
        options = {"max_context": 1024, "max_bytes": 32 << 20, "max_sequences": 8, "debug": True} | kwargs
        return Engine(common.load_weights(opened.source), opened.tokenizer, **options)

    return make


Servers = Callable[[str], Running]


@pytest.fixture(scope="session")
def servers(engines: Engines) -> Iterator[Servers]:
    """A server of a model in FOLLOW, started once for the whole session."""
    made: dict[str, Running] = {}
    with ExitStack() as stack:

        def server(name: str) -> Running:
            if name not in made:
                made[name] = stack.enter_context(running(engines(name), names=(name, "any-*")))
            return made[name]

        yield server


@pytest.fixture(scope="session")
def real() -> Iterator[Running]:
    """A server with the packaged model."""
    opened = common.open_model(None)
    weights = common.load_weights(opened.source)
    engine = Engine(weights, opened.tokenizer, max_context=2048, max_bytes=256 << 20, max_sequences=8)
    sampling = common.recommended(opened.tokenizer.generation_defaults)
    with running(engine, names=("godwit",), sampling=sampling) as server:
        yield server


@pytest.fixture
def client(real: Running) -> Iterator[OpenAI]:
    """OpenAI's client of that server."""
    with OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
