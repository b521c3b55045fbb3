"""Untrusted files: those that are not regular, too large or links to elsewhere are rejected at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from godwit.errors import CheckpointError
from godwit.safe_files import MAX_JSON_PARTS, check_json, open_regular, read_beginning, read_bounded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_bytes(b"0123456789")
    (tmp_path / "secret").write_bytes(b"secret")
    return made


def test_a_file_is_read_up_to_its_limit(folder: Path) -> None:
    path = folder / "config.json"
    assert read_bounded(path, 10, folder=folder) == read_bounded(path, 99) == b"0123456789"
    assert read_beginning(path, 4) == b"0123"
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 9 bytes"):
        read_bounded(path, 9)
    with pytest.raises(FileNotFoundError):
        read_bounded(folder / "absent", 9, folder=folder)


def test_what_claims_to_be_empty_is_bounded_too() -> None:
    path = Path("/proc/self/maps")  # of size 0, as the system says
    if not path.exists():
        pytest.skip("needs /proc")
    with pytest.raises(CheckpointError, match="larger than 10 bytes"):
        read_bounded(path, 10)


def test_holes_are_not_read(folder: Path) -> None:
    with (folder / "hole").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        read_bounded(folder / "hole", 1 << 20)


def test_pipes_sockets_devices_and_folders(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for path in ("pipe", "socket", "/dev/zero", "/dev/stdin", str(folder)):
        if os.path.exists(path) and not os.path.isfile(path):
            with pytest.raises(CheckpointError, match="not a regular file"):
                open_regular(path)


@pytest.mark.parametrize("target", ["../secret", "/dev/zero", "/etc/passwd", "../model2/x", "out/secret"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "model2").mkdir()
    (tmp_path / "model2" / "x").write_bytes(b"")
    (folder / "out").symlink_to("..")
    (folder / "vocab.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"vocab\.json: a link that leads out of the model's folder"):
        read_bounded(folder / "vocab.json", 100, folder=folder)


def test_links_within_the_folder_and_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to("model")
    for place in (folder, tmp_path / "link"):
        assert read_bounded(place / "vocab.json", 100, folder=place) == b"0123456789"
    (folder / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: not a regular file"):
        open_regular(folder / "loop", folder=folder)


def test_the_layout_of_the_hub(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    other = tmp_path / "models--c--d" / "blobs"
    for path in (snapshot, blobs, other):
        path.mkdir(parents=True)
    (blobs / "1f").write_bytes(b"here")
    (other / "1f").write_bytes(b"there")
    (snapshot / "config.json").symlink_to("../../blobs/1f")
    assert read_bounded(snapshot / "config.json", 100, folder=snapshot) == b"here"
    (snapshot / "vocab.json").symlink_to("../../../models--c--d/blobs/1f")
    with pytest.raises(CheckpointError, match="leads out"):
        read_bounded(snapshot / "vocab.json", 100, folder=snapshot)


def test_files_the_user_names_may_be_links(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder / "config.json")
    assert read_bounded(tmp_path / "link", 100) == b"0123456789"


def test_json_of_many_parts() -> None:
    check_json(b"[]" * MAX_JSON_PARTS, "x")
    with pytest.raises(CheckpointError, match="more than 1,048,576 lists and objects"):
        check_json(b"[" * MAX_JSON_PARTS + b"{", "x")
