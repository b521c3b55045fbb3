from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

CONFIG: dict[str, Any] = {"model_type": "qwen3_next"}

Pack = Callable[..., bytes]
MakeModel = Callable[..., Path]


@pytest.fixture
def pack() -> Pack:
    """(header as an object or raw text, data) -> the bytes of a safetensors file, however wrong."""

    def build(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    return build


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model directory from {file name: tensors, or bytes, or a JSON object}."""

    def build(files: Mapping[str, object], config: object = CONFIG, *, name: str = "model") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file, content in {"config.json": config, **files}.items():
            (directory / file).write_bytes(_content(file, content))
        return directory

    def _content(file: str, content: object) -> bytes:
        if isinstance(content, bytes):
            return content
        if file.endswith(".safetensors") and isinstance(content, dict):
            tensors: dict[str, torch.Tensor] = content
            return save(tensors, metadata={"format": "pt"})
        return json.dumps(content).encode()

    return build
