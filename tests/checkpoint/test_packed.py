"""The packed file: what is written comes back, byte for byte as specified; what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.checkpoint import packed_writer
from godwit.checkpoint.packed import PackedFile, is_packed
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.checkpoint.packed_writer import PackedWriter
from godwit.errors import CheckpointError
from godwit.qtensor import QuantExperts, QuantTensor, join_expert, quantize

CONFIG = {"model_type": "qwen3_next", "hidden_size": 64}
FILES = {"tokenizer.json": b'{"version": "1.0"}', "empty.txt": b""}
BLOBS: Mapping[str, TensorBlob] = {
    "norm.weight": Plain("F32", (5,)),
    "router.weight": Matrix("bf16", (7, 64)),
    "layers.0.ffn.experts": ExpertStack("q4", "q8", 3, 64, 32),
    "head.weight": Matrix("q4", (33, 64)),
    "half": Plain("BF16", (2, 3)),
}


def parts_of(blobs: Mapping[str, TensorBlob]) -> dict[str, list[torch.Tensor]]:
    """Bytes for every blob."""
    random = torch.Generator().manual_seed(1)
    made: dict[str, list[torch.Tensor]] = {}
    for name, blob in blobs.items():
        if isinstance(blob, Plain):
            values = torch.randn(blob.shape, generator=random)
            dtype = torch.float32 if blob.dtype == "F32" else torch.bfloat16
            made[name] = [values.to(dtype).flatten().view(torch.uint8)]
        elif isinstance(blob, Matrix):
            made[name] = [quantize(torch.randn(blob.shape, generator=random), blob.format).data]
        else:
            shapes = (2 * blob.intermediate, blob.hidden), (blob.hidden, blob.intermediate)
            made[name] = [
                join_expert(
                    *(quantize(torch.randn(shape, generator=random), format)
                      for shape, format in zip(shapes, (blob.format13, blob.format2), strict=True))
                )
                for _ in range(blob.num_experts)
            ]  # fmt: skip
    return made


PARTS = parts_of(BLOBS)


def writer(path: Path, identity: str = "a", **options: Any) -> PackedWriter:
    return PackedWriter(path, CONFIG, FILES, BLOBS, metadata={"recipe": "q4"}, identity=identity, **options)


def write(path: Path) -> Path:
    with writer(path) as out:
        for name in out.missing():
            out.write(name, PARTS[name])
        out.finish()
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("packed") / "m.godwit").read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a file of these bytes."""

    def put(content: bytes) -> Path:
        path = tmp_path / "m.godwit"
        path.write_bytes(content)
        return path

    return put


def header_of(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[16:24], "little")
    parsed: dict[str, Any] = json.loads(content[64 : 64 + length])
    return parsed


def with_header(content: bytes, header: object) -> bytes:
    """The file with another header, its length and checksum made to fit and the data where they belong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    old = int.from_bytes(content[16:24], "little")
    data = content[-(-(64 + old) // 4096) * 4096 :]
    prefix = struct.pack("<8sIIQ32s8x", b"GODWIT\0\0", 2, 0, len(text), hashlib.sha256(text).digest())
    return (prefix + text).ljust(-(-(64 + len(text)) // 4096) * 4096, b"\0") + data


# --- what is written comes back


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "m.godwit")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.godwit"]
    opened = PackedFile.open(path)
    assert list(opened.blobs) == list(BLOBS) and "head.weight" in opened and "tail.weight" not in opened
    assert (opened.raw_config, opened.files(), opened.metadata) == (CONFIG, FILES, {"recipe": "q4"})
    assert opened.nbytes == path.stat().st_size
    for name, blob in BLOBS.items():
        assert opened.blobs[name] == blob
        found = opened.packed(name)
        data = found.view(-1).view(torch.uint8) if isinstance(found, torch.Tensor) else found.data
        assert torch.equal(data, torch.cat(PARTS[name]))
        assert data.data_ptr() % (4096 if isinstance(blob, ExpertStack) else 64) == 0
    head, experts, half = (opened.packed(name) for name in ("head.weight", "layers.0.ffn.experts", "half"))
    assert isinstance(head, QuantTensor) and (head.format, head.shape) == ("q4", (33, 64))
    assert isinstance(experts, QuantExperts) and experts.expert(2)[1].format == "q8"
    assert isinstance(half, torch.Tensor) and half.dtype == torch.bfloat16 and half.shape == (2, 3)
    seen: list[tuple[int, int]] = []
    opened.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(blob.nbytes for blob in BLOBS.values()) + 18


def test_the_bytes_are_those_of_the_specification(sample: bytes) -> None:
    """Parsed with nothing but the document's words."""
    magic, version, zero, length = struct.unpack_from("<8sIIQ", sample)
    assert (magic, version, zero, sample[56:64]) == (b"GODWIT\0\0", 2, 0, bytes(8))
    assert sample[24:56] == hashlib.sha256(sample[64 : 64 + length]).digest()
    header = json.loads(sample[64 : 64 + length])
    start = (64 + length + 4095) // 4096 * 4096
    assert not any(sample[64 + length : start])
    end = start
    for entry in [*header["files"].values(), *header["tensors"].values()]:
        begin = start + entry["offset"]
        alignment = 4096 if entry.get("kind") == "experts" else 64
        assert begin % alignment == 0 and 0 <= begin - end < alignment and not any(sample[end:begin])
        end = begin + entry["nbytes"]
        assert hashlib.sha256(sample[begin:end]).hexdigest() == entry["sha256"]
    assert end == len(sample)
    assert list(header["tensors"]) == list(BLOBS)
    experts = header["tensors"]["layers.0.ffn.experts"]
    # w13 q4 [64, 64]: 4 tiles of 2 groups of 272 bytes and a span of 32; w2 q8 [64, 32]: 4 of 2 groups of 544
    assert (experts["offset2"], experts["stride"]) == (4 * (2 * 272 + 32), 8192)
    assert header["tensors"]["head.weight"]["nbytes"] == 3 * (2 * 272 + 32)


def test_the_example_of_the_specification(tmp_path: Path) -> None:
    weight = torch.zeros(2, 40)
    weight[0, 0], weight[0, 17], weight[1, 39] = 3.75, -7.5, 0.9453125
    blobs: dict[str, TensorBlob] = {"norm.weight": Plain("F32", (2,)), "head.weight": Matrix("q4", (2, 40))}
    files = {"note.txt": b"hi\n"}
    with PackedWriter(
        tmp_path / "m", {"model_type": "llama"}, files, blobs, metadata={"recipe": "q4"}, identity=""
    ) as out:
        out.write("norm.weight", [torch.tensor([1.0, -0.5]).view(torch.uint8)])
        out.write("head.weight", [quantize(weight, "q4").data])
        out.finish()
    content = (tmp_path / "m").read_bytes()
    text = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text()
    lines = re.findall(r"^([0-9a-f]{5})  ((?:[0-9a-f]{2} ){15}[0-9a-f]{2})\b", text, re.MULTILINE)
    assert len(lines) == 12
    for at, digits in lines:
        assert content[int(at, 16) :][:16] == bytes.fromhex(digits), at
    assert content[64 : 64 + 512].decode() in text.splitlines() and len(content) == 0x12C0


def test_a_view_never_changes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.godwit")
    norm = PackedFile.open(path).packed("norm.weight")
    assert isinstance(norm, torch.Tensor)
    norm.zero_()
    PackedFile.open(path).verify()


def test_what_is_a_packed_file(tmp_path: Path) -> None:
    assert is_packed(write(tmp_path / "any.name"))
    (tmp_path / "empty.godwit").touch()
    assert is_packed(tmp_path / "empty.godwit")
    (tmp_path / "config.json").write_text("{}")
    assert not is_packed(tmp_path / "config.json")
    assert not is_packed(tmp_path) and not is_packed(tmp_path / "absent.godwit")


def test_an_unknown_tensor_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'tail'"):
        PackedFile.open(write(tmp_path / "m.godwit")).packed("tail")


# --- writing


class Killed(Exception):
    pass


def parts_then_killed(name: str) -> Iterator[torch.Tensor]:
    yield PARTS[name][0]
    raise Killed


def test_it_goes_on_after_the_last_whole_tensor(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.godwit"
    names = list(BLOBS)
    with pytest.raises(Killed), writer(path) as out:
        for name in names[:2]:
            out.write(name, PARTS[name])
        out.write(names[2], parts_then_killed(names[2]))
    assert not path.exists() and (tmp_path / "m.godwit.partial").exists()
    with writer(path) as out:
        assert out.missing() == names[2:]
        for name in reversed(names[2:]):
            out.write(name, PARTS[name])
        out.finish()
    assert path.read_bytes() == sample


def test_a_torn_journal_costs_its_last_line_only(tmp_path: Path) -> None:
    with pytest.raises(Killed), writer(tmp_path / "m") as out:
        for name in list(BLOBS)[:3]:
            out.write(name, PARTS[name])
        raise Killed
    journal = tmp_path / "m.journal"
    journal.write_bytes(journal.read_bytes()[:-10])
    for _ in range(2):  # the second finds what the first has mended
        with writer(tmp_path / "m") as out:
            assert out.missing() == list(BLOBS)[2:]


def test_nothing_is_recorded_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_writer, "SYNC_BYTES", 1)
    done: list[str] = []
    synced: list[list[str]] = []
    real = os.fsync

    def fsync(file: int) -> None:
        journal = tmp_path / "m.journal"
        lines = journal.read_text().splitlines()[1:] if journal.exists() else []
        synced.append([json.loads(line)["name"] for line in lines])
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with writer(tmp_path / "m") as out:
        synced.clear()
        for name in BLOBS:
            out.write(name, PARTS[name])
            done.append(name)
            assert synced[-2:] == [done[:-1], done]  # the data are synced before the journal knows of them


def test_another_source_does_not_go_on_with_it(tmp_path: Path) -> None:
    with writer(tmp_path / "m") as out:
        out.write("half", PARTS["half"])
        out._record()
    with pytest.raises(CheckpointError, match=r"another model or recipe.*restart"):
        writer(tmp_path / "m", identity="b")
    with writer(tmp_path / "m") as out:
        assert "half" not in out.missing()
    with writer(tmp_path / "m", identity="b", restart=True) as out:
        assert out.missing() == list(BLOBS)


def test_leftovers_without_a_journal_are_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "m.partial").write_bytes(b"x" * 10)
    with writer(tmp_path / "m") as out:
        assert out.missing() == list(BLOBS)
    (tmp_path / "m.journal").write_bytes(b"\xff{]")
    with writer(tmp_path / "m") as out:
        assert out.missing() == list(BLOBS)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with writer(tmp_path / "m"), pytest.raises(CheckpointError, match="another process"):
        writer(tmp_path / "m")


def test_a_taken_place_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        writer(tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"the disk has .* free"):
        writer(tmp_path / "n")


def test_a_disk_that_fills_up_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with writer(tmp_path / "m") as out:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"No space left.*m\.partial"):
            out.write("half", PARTS["half"])


def test_wrong_sizes_and_unfinished_files_are_our_own_errors(tmp_path: Path) -> None:
    with writer(tmp_path / "m") as out:
        with pytest.raises(ValueError, match="instead of"):
            out.write("half", PARTS["norm.weight"])
        with pytest.raises(ValueError, match="not written"):
            out.finish()


# --- attacks: each file is refused in one sentence


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PackedFile.open(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence and len(sentence) < 600
    return sentence


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"G0DWIT", "not a packed model"),
        (0, bytes(64), "an unfinished one"),
        (8, b"\x01", "reads version 2; quantize the model again"),
        (8, b"\x03", "reads version 2; update Godwit"),
        (12, b"\x01", "reserved"),
        (63, b"\x01", "reserved"),
        (16, b"\xff" * 8, "claims a header"),
        (16, (1 << 26).to_bytes(8, "little"), "cut short"),
        (16, bytes(8), "checksum"),
        (24, bytes(32), "checksum"),
        (70, b"\0", "checksum"),
    ],
)
def test_damaged_prefixes(
    sample: bytes, place: Callable[[bytes], Path], at: int, value: bytes, words: str
) -> None:
    assert words in refused(place(sample[:at] + value + sample[at + len(value) :]))


@pytest.mark.parametrize("length", [0, 7, 8, 63, 64, 500, 4096, 10000])
def test_cut_short(sample: bytes, place: Callable[[bytes], Path], length: int) -> None:
    refused(place(sample[:length]))
    refused(place(sample[: len(sample) - 1 - length % 100]))
    refused(place(sample + b"\0"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("norm.weight", {"offset": 0}),
        ("norm.weight", {"offset": 128}),
        ("norm.weight", {"offset": -64}),
        ("norm.weight", {"offset": 64.0}),
        ("norm.weight", {"nbytes": 24}),
        ("norm.weight", {"nbytes": 2**70}),
        ("norm.weight", {"shape": [6]}),
        ("norm.weight", {"shape": []}),
        ("norm.weight", {"shape": [0]}),
        ("norm.weight", {"shape": [-5]}),
        ("norm.weight", {"shape": [True]}),
        ("norm.weight", {"shape": [5.0]}),
        ("norm.weight", {"shape": [2**62, 2**62]}),
        ("norm.weight", {"shape": [1, 1, 1, 1, 5]}),
        ("norm.weight", {"shape": "5"}),
        ("norm.weight", {"dtype": "F16"}),
        ("norm.weight", {"dtype": ["F32"]}),
        ("norm.weight", {"kind": "sparse"}),
        ("norm.weight", {"kind": {}}),
        ("norm.weight", {"more": 1}),
        ("norm.weight", {"sha256": "0" * 63}),
        ("norm.weight", {"sha256": "G" * 64}),
        ("norm.weight", {"sha256": 0}),
        ("head.weight", {"format": "q5"}),
        ("head.weight", {"format": "q8"}),
        ("head.weight", {"shape": [32, 64]}),
        ("head.weight", {"shape": [64]}),
        ("head.weight", {"shape": [2**50, 2**50]}),
        ("layers.0.ffn.experts", {"num_experts": 4}),
        ("layers.0.ffn.experts", {"num_experts": 0}),
        ("layers.0.ffn.experts", {"num_experts": 2**39}),
        ("layers.0.ffn.experts", {"hidden": 128}),
        ("layers.0.ffn.experts", {"intermediate": True}),
        ("layers.0.ffn.experts", {"format13": "q8"}),
        ("layers.0.ffn.experts", {"stride": 4096}),
        ("layers.0.ffn.experts", {"stride": 12288}),
        ("layers.0.ffn.experts", {"offset2": 0}),
        ("layers.0.ffn.experts", {"offset": 4100}),
    ],
)
def test_lying_entries(
    sample: bytes, place: Callable[[bytes], Path], name: str, changes: dict[str, Any]
) -> None:
    header = header_of(sample)
    header["tensors"][name].update(changes)
    assert name in refused(place(with_header(sample, header)))


@pytest.mark.parametrize("field", ["kind", "dtype", "shape", "nbytes", "offset", "sha256"])
def test_entries_that_lack_something(sample: bytes, place: Callable[[bytes], Path], field: str) -> None:
    header = header_of(sample)
    del header["tensors"]["norm.weight"][field]
    assert "norm.weight" in refused(place(with_header(sample, header)))


def renamed(table: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: entry for name, entry in table.items()}


@pytest.mark.parametrize("name", ["", ".", "a..b", "a/b", "a b", "\x1b[2J", "a" * 300, "é"])
def test_names_that_are_none(sample: bytes, place: Callable[[bytes], Path], name: str) -> None:
    header = header_of(sample)
    tensors = {**header, "tensors": renamed(header["tensors"], "half", name)}
    assert "\x1b" not in refused(place(with_header(sample, tensors)))


@pytest.mark.parametrize("name", ["", "..", ".hidden", "../x", "a/b", "a\\b", "\0", "a" * 200])
def test_files_that_would_leave_their_directory(
    sample: bytes, place: Callable[[bytes], Path], name: str
) -> None:
    header = header_of(sample)
    refused(place(with_header(sample, {**header, "files": renamed(header["files"], "tokenizer.json", name)})))


def test_swapped_entries_overlap(sample: bytes, place: Callable[[bytes], Path]) -> None:
    header = header_of(sample)
    header["tensors"]["half"]["offset"] = header["tensors"]["head.weight"]["offset"]
    assert "half" in refused(place(with_header(sample, header)))
    header = header_of(sample)
    header["tensors"] = dict(reversed(header["tensors"].items()))
    refused(place(with_header(sample, header)))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"config": {}, "config": {}}',
        b'{"x": ' + b"9" * 5000 + b"}",
        {},
        {"config": {}, "metadata": {}, "files": {}, "tensors": {}},
        {"config": [], "metadata": {}, "files": {}, "tensors": {"a": {}}},
        {"config": {}, "metadata": {"a": 1}, "files": {}, "tensors": {"a": {}}},
        {"config": {}, "metadata": {"a": "\x1b[2J"}, "files": {}, "tensors": {"a": {}}},
        {"config": {}, "metadata": {}, "files": {"a": []}, "tensors": {"a": {}}},
        {"config": {}, "metadata": {}, "files": {"a": {"nbytes": 2**40}}, "tensors": {"a": {}}},
        {"config": {}, "metadata": {}, "files": {}, "tensors": {"a": []}},
        {"config": {}, "metadata": {}, "files": {}, "tensors": {"a": {}}, "more": {}},
    ],
    ids=lambda header: str(header)[:40],
)
def test_headers_that_are_none(sample: bytes, place: Callable[[bytes], Path], header: object) -> None:
    refused(place(with_header(sample, header)))


def test_damaged_data_are_named(sample: bytes, place: Callable[[bytes], Path]) -> None:
    content = bytearray(sample)
    content[-1] ^= 1
    with pytest.raises(CheckpointError, match=r"1 of 7 parts.*: half;"):
        PackedFile.open(place(bytes(content))).verify()
    start = sample.index(FILES["tokenizer.json"])
    gap = start + len(FILES["tokenizer.json"])
    with pytest.raises(CheckpointError, match="before empty"):
        PackedFile.open(place(sample[:gap] + b"x" + sample[gap + 1 :])).verify()
    damaged = PackedFile.open(place(sample[:start] + b"[" + sample[start + 1 :]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        damaged.files()


def test_every_byte_counts(sample: bytes, place: Callable[[bytes], Path]) -> None:
    """Whatever byte is changed, verifying says so: header, padding, parts and the gaps between them."""
    end, path = header_end(sample), place(sample)
    start = -(-end // 4096) * 4096
    steps = [*range(0, 64), *range(64, end, 97), *range(end, start, 61), start - 1]
    header = header_of(sample)
    for entry in (*header["files"].values(), *header["tensors"].values()):
        begin = start + entry["offset"]
        steps += [begin - 1, begin, begin + entry["nbytes"] - 1, begin + entry["nbytes"]]
    steps = [at for at in (*steps, *range(start, len(sample), len(sample) // 150)) if at < len(sample)]
    for at in sorted(set(steps)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([sample[at] ^ 0x10]))
        with pytest.raises(CheckpointError):
            PackedFile.open(path).verify()
        with path.open("r+b") as file:
            file.seek(at)
            file.write(sample[at : at + 1])
    PackedFile.open(path).verify()


def header_end(content: bytes) -> int:
    return 64 + int.from_bytes(content[16:24], "little")


def test_bytes_behind_the_header_are_refused_at_once(sample: bytes, place: Callable[[bytes], Path]) -> None:
    content = bytearray(sample)
    for at in (header_end(sample), -(-header_end(sample) // 4096) * 4096 - 1):
        content[at] = 1
        with pytest.raises(CheckpointError, match="after its header are not zero"):
            PackedFile.open(place(bytes(content)))
        content[at] = 0


def test_verifying_reads_the_file_as_it_is_now(sample: bytes, place: Callable[[bytes], Path]) -> None:
    path = place(sample)
    packed = PackedFile.open(path)
    place(sample[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        packed.verify()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        packed.verify()


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.godwit")
    for path in (tmp_path / "pipe.godwit", tmp_path, tmp_path / "absent.godwit"):
        refused(path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_damage_before_the_data(sample: bytes, changes: list[tuple[int, int]]) -> None:
    content = bytearray(sample)
    for at, value in changes:
        content[at] = value
    length = min(int.from_bytes(content[16:24], "little"), 4000)
    content[24:56] = hashlib.sha256(content[64 : 64 + length]).digest()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.godwit"
        path.write_bytes(content)
        try:
            opened = PackedFile.open(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            return
        for name in opened.blobs:
            assert opened.blobs[name].nbytes > 0 and opened.packed(name) is not None
