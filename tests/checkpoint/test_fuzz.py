"""Random damage: a file either opens, with every tensor inside it, or gets a CheckpointError."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.safetensors import SafetensorsFile
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError

SAMPLE = save(
    {
        "model.embed.weight": torch.arange(24, dtype=torch.bfloat16).reshape(4, 6),
        "mtp.norm.weight": torch.ones(5),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    },
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(SAMPLE[:8], "little")

quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(content)
        try:
            opened = SafetensorsFile(path)
        except (CheckpointError, UnsupportedModelError) as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
            return
        total = 0
        for name, entry in opened.entries.items():
            assert 0 < entry.begin <= entry.end <= len(content)
            x = opened.tensor(name)
            assert x.nbytes == entry.nbytes
            assert tuple(x.shape) == entry.shape
            assert x.clone().shape == x.shape
            total += x.nbytes
        assert total == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_the_sample_itself_opens() -> None:
    check(SAMPLE)


@quick
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_header_bytes(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for at, value in changes:
        content[at] = value
    check(bytes(content))


@quick
@given(
    st.lists(st.tuples(st.integers(8, HEADER_END - 1), st.sampled_from(b'0123456789-.,:[]{}"eE')), max_size=3)
)
def test_changed_header_syntax(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for at, value in changes:
        content[at] = value
    check(bytes(content))


@quick
@given(st.integers(0, len(SAMPLE) - 1))
def test_truncation(length: int) -> None:
    check(SAMPLE[:length])


@quick
@given(st.integers(0, len(SAMPLE)), st.binary(min_size=1, max_size=20))
def test_inserted_bytes(at: int, extra: bytes) -> None:
    check(SAMPLE[:at] + extra + SAMPLE[at:])


@quick
@given(st.binary(max_size=200))
def test_noise(content: bytes) -> None:
    check(content)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["U8", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@quick
@given(
    st.dictionaries(st.sampled_from(["__metadata__", "a", "b", "weight_map"]), values, max_size=3),
    st.binary(max_size=8),
)
def test_any_json_as_header(header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    check(len(text).to_bytes(8, "little") + text + data)


@quick
@given(values, values)
def test_any_json_as_config_and_index(config: object, index: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "a.safetensors").write_bytes(SAMPLE)
        wrapped = {"model_type": "qwen3_next", "quantization_config": config}
        (path / "config.json").write_text(json.dumps(wrapped))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"count": index}}))
        try:
            assert open_checkpoint(path).names()
        except GodwitError as error:
            assert "\n" not in str(error)
