"""Reading GGUF headers: what is in order is read, everything else is refused in one sentence."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from godwit.checkpoint.gguf.container import GgufFile, open_parts
from godwit.checkpoint.gguf.types import TYPES
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError

F32, Q8_0 = 0, 8
U8, U16, U32, I32, BOOL, STRING, ARRAY = 0, 2, 4, 5, 7, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def info(name: str, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return (
        text(name) + u32(len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    )


@dataclass
class Raw:
    """A file put together by hand."""

    keys: list[bytes] = field(default_factory=lambda: [key("general.architecture", STRING, text("llama"))])
    infos: list[bytes] = field(default_factory=lambda: [info("a", (4, 3)), info("b", (32, 2), Q8_0, 64)])
    data: bytes = bytes(64 + 68)
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    alignment: int = 32

    def bytes(self) -> bytes:
        counts = (
            len(self.infos) if self.num_tensors is None else self.num_tensors,
            len(self.keys) if self.num_keys is None else self.num_keys,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join([*self.keys, *self.infos])
        return head + bytes(-len(head) % self.alignment) + self.data

    def open(self, folder: Path) -> GgufFile:
        path = folder / "model.gguf"
        path.write_bytes(self.bytes())
        return GgufFile(path)


def test_keys_tensors_and_bytes(tmp_path: Path) -> None:
    numbers = struct.pack("<IQ3i", I32, 3, -1, 0, 7)
    words = struct.pack("<IQ", STRING, 2) + text("é") + text("")
    flags = struct.pack("<IQ3B", BOOL, 3, 1, 0, 1)
    data = bytes(range(48)) + bytes(16) + bytes(reversed(range(68)))
    raw = Raw(
        keys=[
            key("n", U32, u32(2**32 - 1)),
            key("text", STRING, text("words")),
            key("flag", BOOL, b"\x01"),
            key("numbers", ARRAY, numbers),
            key("words", ARRAY, words),
            key("flags", ARRAY, flags),
            key("none", ARRAY, struct.pack("<IQ", U8, 0)),
        ],
        data=data,
    )
    file = raw.open(tmp_path)
    assert (file.keys["n"], file.keys["text"], file.keys["flag"]) == (2**32 - 1, "words", True)
    assert file.keys["numbers"].tolist() == [-1, 0, 7]
    assert file.keys["words"] == ["é", ""]
    assert file.keys["flags"].tolist() == [True, False, True]
    assert file.keys["none"].tolist() == []
    assert {name: (entry.type.name, entry.shape) for name, entry in file.entries.items()} == {
        "a": ("F32", (3, 4)),
        "b": ("Q8_0", (2, 32)),
    }
    assert bytes(file.raw("a").flatten().tolist()) == data[:48]
    assert file.raw("b").shape == (2, 34)
    file.release("b")
    assert bytes(file.raw("b").flatten().tolist()) == data[64:]


def test_alignment_is_that_of_the_file(tmp_path: Path) -> None:
    keys = [key("general.alignment", U32, u32(64))]
    infos = [info("a", (4,)), info("b", (4,), offset=64)]
    file = Raw(keys=keys, infos=infos, data=bytes(80), alignment=64).open(tmp_path)
    assert [entry.begin % 64 for entry in file.entries.values()] == [0, 0]


HUGE = 2**63
REFUSED: dict[str, tuple[Raw, str]] = {
    "magic": (Raw(magic=b"GGML"), "does not begin with GGUF"),
    "tensors": (Raw(num_tensors=2**60), "more than it can hold"),
    "keys": (Raw(num_keys=2**60), "more than it can hold"),
    "key's length": (Raw(keys=[struct.pack("<Q", HUGE)]), "a key claims"),
    "empty key": (Raw(keys=[key("", U8, b"\x00")]), "an empty key"),
    "key twice": (Raw(keys=[key("a", U8, b"\x00")] * 2), "the key 'a' twice"),
    "not UTF-8": (Raw(keys=[key("a", STRING, text(b"\xff"))]), "is not UTF-8"),
    "text's length": (Raw(keys=[key("a", STRING, struct.pack("<Q", HUGE))]), "the value of 'a' claims"),
    "type of a value": (Raw(keys=[key("a", 13, b"\x00" * 8)]), "the unknown type 13"),
    "array of arrays": (Raw(keys=[key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "the unknown type 9"),
    "array's length": (Raw(keys=[key("a", ARRAY, struct.pack("<IQ", U32, HUGE))]), "longer than the file"),
    "texts": (Raw(keys=[key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))]), "longer than the file"),
    "alignment 0": (Raw(keys=[key("general.alignment", U32, u32(0))]), "no power of two"),
    "alignment 3": (Raw(keys=[key("general.alignment", U32, u32(3))]), "no power of two"),
    "alignment 2^31": (Raw(keys=[key("general.alignment", U32, u32(2**31))]), "no power of two"),
    "alignment's type": (Raw(keys=[key("general.alignment", STRING, text("32"))]), "no power of two"),
    "tensor twice": (Raw(infos=[info("a", (4,)), info("a", (4,), offset=32)]), "the tensor 'a' twice"),
    "no name": (Raw(infos=[info("", (4,))]), "the impossible name"),
    "long name": (Raw(infos=[info("a" * 64, (4,))]), "the impossible name"),
    "dimensions": (Raw(infos=[info("a", (1,) * 5)]), "5 dimensions"),
    "a dimension of 0": (Raw(infos=[info("a", (4, 0))]), "the impossible shape"),
    "product": (Raw(infos=[info("a", (2**40, 2**40))]), "the impossible shape"),
    "blocks": (Raw(infos=[info("a", (33, 2), Q8_0)]), "no whole blocks of Q8_0"),
    "offset": (Raw(infos=[info("a", (4,), offset=32)]), "lies at 32 of the data, not at 0"),
    "gap": (Raw(infos=[info("a", (4,)), info("b", (4,), offset=64)]), "lies at 64 of the data, not at 32"),
    "overlap": (Raw(infos=[info("a", (4, 8)), info("b", (4,), offset=32)]), "not at 128"),
    "beyond": (Raw(infos=[info("a", (4, 4000))]), "ends beyond the file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_is_refused(case: str, tmp_path: Path) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}.*fetch it again") as caught:
        raw.open(tmp_path)
    assert "\n" not in str(caught.value)


UNSUPPORTED: dict[str, tuple[Raw, str]] = {
    "version 1": (Raw(version=1), "GGUF version 1"),
    "version 4": (Raw(version=4), "GGUF version 4"),
    "byte order": (Raw(version=3 << 24), "big-endian"),
    "repacked": (Raw(infos=[info("a", (32,), 31)]), "repacked for one CPU"),
    "fork": (Raw(infos=[info("a", (32,), 138)]), "ik_llama.cpp alone"),
    "unknown": (Raw(infos=[info("a", (32,), 77)]), "not read by Godwit"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_read_is_named(case: str, tmp_path: Path) -> None:
    raw, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        raw.open(tmp_path)


def test_a_file_cut_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    data = Raw().bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            GgufFile(path)


def test_no_flipped_byte_does_harm(tmp_path: Path) -> None:
    data = Raw().bytes()
    path = tmp_path / "flipped.gguf"
    draw = random.Random(0)
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(data) - 132)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            file = GgufFile(path)
        except GodwitError as error:
            assert "\n" not in str(error)
        else:
            assert all(file.raw(name).numel() == entry.nbytes for name, entry in file.entries.items())


def test_a_block_type_has_the_bytes_of_its_rows(tmp_path: Path) -> None:
    for number, kind in TYPES.items():
        row = kind.bytes * 2
        raw = Raw(infos=[info("a", (kind.elements * 2, 3), number)], data=bytes(3 * row))
        assert raw.open(tmp_path).raw("a").shape == (3, row)


# ---- Split files -------------------------------------------------------------------------------------


def split_keys(number: int, count: int, tensors: int) -> list[bytes]:
    return [
        key("split.no", U16, struct.pack("<H", number)),
        key("split.count", U16, struct.pack("<H", count)),
        key("split.tensors.count", I32, struct.pack("<i", tensors)),
    ]


def write_set(folder: Path, change: Callable[[dict[int, Raw]], None] | None = None) -> Path:
    """Three parts, the first without tensors."""
    parts = {
        1: Raw(keys=[*Raw().keys, *split_keys(0, 3, 3)], infos=[], data=b""),
        2: Raw(keys=split_keys(1, 3, 3)),
        3: Raw(keys=split_keys(2, 3, 3), infos=[info("c", (4,))], data=bytes(16)),
    }
    if change is not None:
        change(parts)
    for number, part in parts.items():
        (folder / f"m-{number:05d}-of-00003.gguf").write_bytes(part.bytes())
    return folder / "m-00001-of-00003.gguf"


def test_a_split_set_is_read_whole(tmp_path: Path) -> None:
    parts = open_parts(write_set(tmp_path))
    assert [list(part.entries) for part in parts] == [[], ["a", "b"], ["c"]]


def test_a_part_that_is_not_the_first_names_the_first(tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(CheckpointError, match=r"give .*m-00001-of-00003\.gguf"):
        open_parts(tmp_path / "m-00002-of-00003.gguf")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf is missing"):
        open_parts(path)


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    def swap(parts: dict[int, Raw]) -> None:
        parts[2], parts[3] = parts[3], parts[2]

    with pytest.raises(CheckpointError, match="not part 2 of 3"):
        open_parts(write_set(tmp_path, swap))


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    def repeat(parts: dict[int, Raw]) -> None:
        parts[3].infos = [info("a", (4,))]

    with pytest.raises(CheckpointError, match="hold the same tensor"):
        open_parts(write_set(tmp_path, repeat))


def test_the_parts_must_hold_as_many_tensors_as_they_say(tmp_path: Path) -> None:
    def claim(parts: dict[int, Raw]) -> None:
        parts[1].keys = [*Raw().keys, *split_keys(0, 3, 4)]

    with pytest.raises(CheckpointError, match="hold 3 tensors, not 4"):
        open_parts(write_set(tmp_path, claim))


def test_a_renamed_first_part_is_refused(tmp_path: Path) -> None:
    path = write_set(tmp_path).rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"does not end in -00001-of-00003\.gguf"):
        open_parts(path)


def test_files_that_are_missing_or_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "no.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="only 4 bytes long"):
        GgufFile(tmp_path / "short.gguf")


def test_a_vector_has_a_row_a_value(tmp_path: Path) -> None:
    file = Raw(infos=[info("a", (4,))], data=struct.pack("<4f", 1, 2, 3, 4)).open(tmp_path)
    assert torch.equal(file.raw("a").view(torch.float32).flatten(), torch.tensor([1.0, 2, 3, 4]))
