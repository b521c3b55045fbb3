"""Random damage to files of the disk cache: they are read whole, or there is a fault that drops them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.engine.cache import disk_file
from godwit.engine.cache.disk_file import SegmentHeader, read_header, read_segment, write_segment
from godwit.errors import CheckpointError
from tests.engine.cache.test_disk import write_signed

KEY = bytes(range(32))
TENSORS = [torch.arange(6.0).reshape(1, 6), torch.ones(1, 3, dtype=torch.bfloat16), torch.zeros(0)]
HEADER = SegmentHeader(b"r" * 16, b"p" * 16, [b"k" * 16], [(1, 2, 3)], num_state=1, pending=2, state_bytes=6)
RAW = HEADER.encode()


def written() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.kv"
        write_segment(path, HEADER, TENSORS, KEY)
        return path.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """Nothing here has to survive a loss of power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


SAMPLE = written()

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["00", "x", "float32", "load"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a"]), inner, max_size=1),
    max_leaves=6,
)


def read(content: bytes, key: bytes = KEY) -> SegmentHeader | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.kv"
        path.write_bytes(content)
        return read_file(path, key)


def read_file(path: Path, key: bytes = KEY) -> SegmentHeader | None:
    try:
        header, tensors = read_segment(path, key)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None
    assert read_header(path, key) == (header, [])
    assert all(torch.equal(one, other) for one, other in zip(tensors, TENSORS, strict=True))
    return header


def read_signed(header: bytes, tensors: list[torch.Tensor] = TENSORS) -> SegmentHeader | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.kv"
        write_signed(path, header, tensors, KEY)
        return read_file(path)


def test_the_sample_itself_is_read() -> None:
    assert read(SAMPLE) == HEADER
    assert read_signed(RAW) == HEADER
    assert read(SAMPLE, bytes(32)) is None


def test_no_bit_can_change() -> None:
    for at in range(0, len(SAMPLE), 3):
        content = bytearray(SAMPLE)
        content[at] ^= 1 << at % 8
        assert read(bytes(content)) in (None, HEADER)  # the format has spaces and names that say nothing
        assert read(SAMPLE[:at]) is None


@pytest.mark.parametrize("other", [TENSORS[0].reshape(6, 1), TENSORS[0].view(torch.int32)])
def test_the_same_bytes_with_another_shape_or_type_have_another_checksum(other: torch.Tensor) -> None:
    assert disk_file._mac(KEY, RAW, [other]) != disk_file._mac(KEY, RAW, TENSORS[:1])


@quick
@given(st.sampled_from(sorted(json.loads(RAW))), values)
def test_any_values_in_a_header_with_the_right_key(name: str, value: Any) -> None:
    read_signed(json.dumps(json.loads(RAW) | {name: value}).encode())


@quick
@given(st.binary(max_size=100))
def test_noise_with_the_right_key(header: bytes) -> None:
    assert read_signed(header) is None


@quick
@given(st.integers(0, len(RAW) - 1), st.sampled_from(b'0123456789-.,:[]{}"eE'))
def test_changed_syntax_with_the_right_key(at: int, value: int) -> None:
    header = bytearray(RAW)
    header[at] = value
    read_signed(bytes(header))


@pytest.mark.parametrize("size", [2**26 + 1, 2**63, 2**64 - 1])
def test_huge_headers_are_not_read(size: int) -> None:
    assert read(size.to_bytes(8, "little") + b"{}") is None


def test_a_huge_segment_header_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_file, "_MAX_HEADER", len(RAW) - 1)
    assert read(SAMPLE) is None
