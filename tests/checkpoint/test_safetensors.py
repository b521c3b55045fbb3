"""The container: every dtype it reads, and a table of hostile files with the sentence each one gets."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from godwit.checkpoint.safetensors import DTYPES, SafetensorsFile
from godwit.errors import CheckpointError, GodwitError, MemoryBudgetError, UnsupportedModelError

Pack = Callable[..., bytes]


def four(begin: int = 0, end: int = 4, shape: object = (4,), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: list[tuple[str, object, bytes, str]] = [
    # name, header, data, part of the sentence
    ("list", [1, 2], b"", "does not start with '{'"),
    ("leading space", b" {}", b"", "does not start with '{'"),
    ("not json", b"{nonsense}", b"", "is not JSON"),
    ("not utf-8", b'{"\xff": 1}', b"", "is not JSON"),
    ("nested", b'{"a":' * 200_000, b"", "nested too deeply"),
    ("huge number", b'{"a":' + b"9" * 5000 + b"}", b"", "is not JSON"),
    ("repeated name", b'{"a":{}, "b":{}, "a":{}}', b"", "has 'a' twice"),
    ("repeated field", b'{"a":{"dtype":"U8","dtype":"F32"}}', b"", "has 'dtype' twice"),
    ("tensor is text", {"a": "x"}, b"", "lacks a dtype, a shape or data_offsets"),
    ("no offsets", {"a": {"dtype": "U8", "shape": [1]}}, b"\0", "lacks a dtype, a shape or data_offsets"),
    ("metadata list", {"__metadata__": []}, b"", "__metadata__"),
    ("metadata number", {"__metadata__": {"format": 1}}, b"", "__metadata__"),
    ("gap at start", {"a": four(4, 8)}, b"\0" * 8, "4 unused bytes before tensor 'a'"),
    ("gap inside", {"a": four(), "b": four(5, 9)}, b"\0" * 9, "1 unused bytes before tensor 'b'"),
    ("bytes at the end", {"a": four()}, b"\0" * 5, "1 bytes after the last tensor"),
    ("no tensors, bytes", {}, b"\0" * 5, "5 bytes after the last tensor"),
    ("overlap", {"a": four(), "b": four(2, 6)}, b"\0" * 6, "'b' overlaps"),
    ("same bytes", {"a": four(), "b": four()}, b"\0" * 4, "'b' overlaps"),
    ("empty inside another", {"a": four(), "b": four(2, 2, [0])}, b"\0" * 4, "overlaps"),
    ("data missing", {"a": four()}, b"\0" * 3, "cut short or damaged: tensor 'a'"),
    ("backwards", {"a": four(4, 0)}, b"\0" * 4, "out of order or range"),
    ("negative offset", {"a": four(-4, 0)}, b"\0" * 4, "out of order or range"),
    ("enormous offset", {"a": four(2**64, 2**64 + 4)}, b"\0" * 4, "out of order or range"),
    ("fractional offset", {"a": four(0.0, 4.0)}, b"\0" * 4, "not two whole numbers"),  # type: ignore[arg-type]
    ("three offsets", {"a": four() | {"data_offsets": [0, 2, 4]}}, b"\0" * 4, "not two whole numbers"),
    ("boolean offsets", {"a": four() | {"data_offsets": [False, True]}}, b"\0", "not two whole numbers"),
    ("size differs", {"a": four(shape=[3])}, b"\0" * 4, "needs 3 bytes, its offsets span 4"),
    ("size differs by dtype", {"a": four(dtype="F32")}, b"\0" * 4, "needs 16 bytes, its offsets span 4"),
    ("negative shape", {"a": four(shape=[-2, -2])}, b"\0" * 4, "impossible shape"),
    ("overflowing shape", {"a": four(shape=[2**32, 2**32, 4])}, b"\0" * 4, "impossible shape"),
    ("overflow to zero", {"a": four(0, 0, [2**62, 4])}, b"", "impossible shape"),
    ("overflow hidden by zero", {"a": four(0, 0, [0, 2**62, 2**62])}, b"", "impossible shape"),
    ("long dimension", {"a": four(shape=[10**400])}, b"\0" * 4, "impossible shape"),
    ("text shape", {"a": four(shape="4")}, b"\0" * 4, "not a list of whole numbers"),
    ("fractional shape", {"a": four(shape=[4.0])}, b"\0" * 4, "not a list of whole numbers"),
    ("boolean shape", {"a": four(0, 1, [True])}, b"\0", "not a list of whole numbers"),
    ("many dimensions", {"a": four(0, 1, [1] * 5000)}, b"\0", "5000 dimensions"),
    ("terminal escapes", {"\x1b[2J": four(shape=[3])}, b"\0" * 4, r"'\x1b[2J'"),
    ("unknown dtype", {"a": four(dtype="F7")}, b"\0" * 4, "has dtype 'F7'; Godwit reads"),
    ("dtype is a list", {"a": four(dtype=["U8"])}, b"\0" * 4, "has dtype ['U8']"),
]


@pytest.mark.parametrize(
    ("header", "data", "sentence"), [row[1:] for row in HEADERS], ids=[r[0] for r in HEADERS]
)
def test_hostile_headers(tmp_path: Path, pack: Pack, header: object, data: bytes, sentence: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, data))
    with pytest.raises(GodwitError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert isinstance(caught.value, UnsupportedModelError if "has dtype" in sentence else CheckpointError)
    assert sentence in message
    assert message.startswith(str(path))
    assert len(message) < 600
    assert "\n" not in message


FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "only 0 bytes long"),
    ("seven bytes", b"\0" * 7, "only 7 bytes long"),
    ("only a length", (2).to_bytes(8, "little"), "cut short: its header should have 2 bytes, 0 are there"),
    ("length beyond the file", (50).to_bytes(8, "little") + b"{}", "cut short"),
    ("length beyond the limit", (2**27).to_bytes(8, "little") + b"{}", "more than the 33554432"),
    ("length of all ones", b"\xff" * 8 + b"{}", "more than the 33554432"),
    ("zero length", b"\0" * 8 + b"{}", "does not start with '{'"),
    ("a pickle", b"\x80\x04\x95" + b"\0" * 40, "cut short"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "run 'git lfs pull'"),
]


@pytest.mark.parametrize(("content", "sentence"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_hostile_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert sentence in str(caught.value)


def test_long_names_and_headers_of_many_parts(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(pack({"x" * 1000: entry}))
    assert len(SafetensorsFile(path).entries) == 1
    path.write_bytes(pack({"x" * 5000: entry}))
    with pytest.raises(CheckpointError, match="has 5000 letters, more than 1000") as caught:
        SafetensorsFile(path)
    assert len(str(caught.value)) < 400
    path.write_bytes(pack(b'{"a":[' + b"[]," * (1 << 20) + b"[]]}"))
    with pytest.raises(CheckpointError, match="lists and objects"):
        SafetensorsFile(path)
    with path.open("wb") as file:  # one of 95 MB is not even read
        file.write((95_000_000).to_bytes(8, "little") + b"{")
        file.truncate(96_000_000)
    with pytest.raises(CheckpointError, match="claims a header of 95000000 bytes"):
        SafetensorsFile(path)


def test_a_named_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_agrees_with_the_reference_writer(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
    expected = bits.view(dtype)
    save_file({"x": expected, "empty": torch.zeros(0, 7, dtype=dtype)}, tmp_path / "a.safetensors")
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    x = opened.tensor("x")
    assert x.dtype == dtype
    assert x.shape == (3, 5)
    assert torch.equal(x.contiguous().view(torch.uint8), bits)
    assert opened.tensor("empty").shape == (0, 7)
    assert opened.entries["x"].dtype == name


def test_scalars_and_an_empty_file(tmp_path: Path, pack: Pack) -> None:
    save_file({"x": torch.tensor(3.5)}, tmp_path / "a.safetensors")
    assert SafetensorsFile(tmp_path / "a.safetensors").tensor("x") == 3.5
    (tmp_path / "b.safetensors").write_bytes(pack({}))
    assert SafetensorsFile(tmp_path / "b.safetensors").entries == {}


def test_misaligned_data_is_read(tmp_path: Path, pack: Pack) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(header, torch.tensor([1.5, -2.0]).numpy().tobytes()))
    x = SafetensorsFile(path).tensor("x")
    assert x.tolist() == [1.5, -2.0]
    assert x.data_ptr() % 4 == 0


def test_bytes_that_are_no_booleans_become_true(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"x": four(dtype="BOOL")}, b"\0\1\2\xff"))
    assert SafetensorsFile(path).tensor("x").view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_views_outlive_the_file_object_and_writes_stay_private(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(10000)}, path)
    before = path.read_bytes()
    x = SafetensorsFile(path).tensor("x")
    x += 1
    assert x[-1] == 10000
    assert path.read_bytes() == before
    assert SafetensorsFile(path).tensor("x")[-1] == 9999


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path, pack: Pack) -> None:
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"x": four(0, size, [size])}))
    header = path.stat().st_size
    try:
        os.truncate(path, header + size)
    except OSError as error:
        pytest.skip(f"the file system holds no sparse file of {size} bytes ({error})")
    x = SafetensorsFile(path).tensor("x")
    assert x[-1] == 0
    x[0] = 1
    assert x[0] == 1


def test_a_released_view_reads_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(10000), "y": torch.arange(3)}, path)
    opened = SafetensorsFile(path)
    x = opened.tensor("x")
    opened.release("x")
    opened.release("y")
    assert torch.equal(x, torch.arange(10000))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOMEM, MemoryBudgetError), (errno.EIO, CheckpointError)]
)
def test_files_that_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[GodwitError]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(kind, match=r"m\.safetensors"):
        SafetensorsFile(tmp_path / "m.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": None}, {"format": "pt", "step": None}])
def test_metadata_may_be_null(pack: Pack, metadata: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    path.write_bytes(pack({"__metadata__": metadata, "a": entry}, b"\7"))
    assert SafetensorsFile(path).tensor("a").tolist() == [7]
