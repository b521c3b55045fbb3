"""Random damage to files of the disk cache: they are read whole, or there is a fault that drops them."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.engine.cache.disk_file import FAULTS, MAGIC, Header, read_stretch, write_stretch
from tests.engine.cache.test_disk import signed

KEY = bytes(range(32))
TENSORS = [torch.arange(6.0).reshape(1, 6), torch.ones(1, 3, dtype=torch.bfloat16), torch.zeros(0)]
HEADER = Header(
    b"r" * 16,
    b"p" * 16,
    [b"k" * 16],
    [(1, 2, 3)],
    [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in TENSORS],
    num_state=1,
    pending=2,
)


def written() -> bytes:
    file = io.BytesIO()
    write_stretch(file, HEADER, TENSORS, KEY)
    return file.getvalue()


SAMPLE = written()
START = len(MAGIC) + 8
SIZE = int.from_bytes(SAMPLE[START - 8 : START], "little")
BEHIND = SAMPLE[START + SIZE + 32 : -32]

quick = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["00", "x", "float32", "load"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a"]), inner, max_size=1),
    max_leaves=6,
)


def read(content: bytes, key: bytes = KEY) -> Header | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.kv"
        path.write_bytes(content)
        with path.open("rb") as file:
            try:
                header, tensors = read_stretch(file, key)
            except FAULTS:
                return None
    sizes = [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors]
    assert sizes == header.tensors
    return header


def test_the_sample_itself_is_read() -> None:
    assert read(SAMPLE) == HEADER
    assert read(signed(SAMPLE[START : START + SIZE], BEHIND, KEY)) == HEADER
    assert read(SAMPLE, bytes(32)) is None


def test_no_bit_can_change() -> None:
    for at in range(len(SAMPLE)):
        content = bytearray(SAMPLE)
        content[at] ^= 1 << at % 8
        assert read(bytes(content)) is None
        assert read(SAMPLE[:at]) is None


@quick
@given(st.sampled_from(sorted(json.loads(SAMPLE[START : START + SIZE]))), values)
def test_any_values_in_a_header_with_the_right_key(name: str, value: Any) -> None:
    raw = json.loads(SAMPLE[START : START + SIZE]) | {name: value}
    read(signed(json.dumps(raw).encode(), BEHIND, KEY))


@quick
@given(st.binary(max_size=100), st.binary(max_size=40))
def test_noise_with_the_right_key(header: bytes, tensors: bytes) -> None:
    assert read(signed(header, tensors, KEY)) is None


@quick
@given(st.integers(0, SIZE - 1), st.sampled_from(b'0123456789-.,:[]{}"eE'), st.integers(0, 64))
def test_changed_syntax_with_the_right_key(at: int, value: int, more: int) -> None:
    header = bytearray(SAMPLE[START : START + SIZE])
    header[at] = value
    read(signed(bytes(header), BEHIND + bytes(more), KEY))


@pytest.mark.parametrize("size", [2**26 + 1, 2**63, 2**64 - 1])
def test_huge_headers_are_not_read(size: int) -> None:
    assert read(MAGIC + size.to_bytes(8, "little") + b"{}") is None
