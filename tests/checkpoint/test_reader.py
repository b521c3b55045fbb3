"""Directories: shards, indexes, and everything that is refused before a byte of data is read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from godwit.checkpoint import SafetensorsCheckpoint, open_checkpoint, read_raw_config
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError, UsageError

MakeModel = Callable[..., Path]
A, B = {"a": torch.arange(4.0)}, {"b": torch.arange(6).reshape(2, 3)}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(**names: str) -> dict[str, Any]:
    return {"metadata": {"total_size": 64}, "weight_map": names}


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": A | B},
        {ONE: A, TWO: B, INDEX: index(a=ONE, b=TWO)},
        {ONE: A, TWO: B},
        {"first.safetensors": A, "second.safetensors": B},
        {"only.safetensors": A | B, INDEX: index(a="only.safetensors")},
        {"model.safetensors": A | B, "training_state.safetensors": {"a": torch.zeros(9)}},
        {ONE: A, TWO: B, INDEX: index(a=ONE, b=TWO), "consolidated.safetensors": A | B},
    ],
    ids=["single", "index", "numbered", "unnumbered", "unlisted tensor", "main file wins", "index wins"],
)
def test_layouts(make_model: MakeModel, files: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(make_model(files))
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert torch.equal(checkpoint.tensor("a"), A["a"])
    assert torch.equal(checkpoint.tensor("b"), B["b"])
    assert checkpoint.num_parameters == 10
    assert checkpoint.nbytes == 64
    assert checkpoint.info("b").shape == (2, 3)
    assert checkpoint.info("b").dtype == torch.int64
    assert "a" in checkpoint
    assert "c" not in checkpoint


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {}, "has a config.json but no weights"),
    (
        "same name twice",
        {"x.safetensors": A, "y.safetensors": A | B},
        "'a' is in both x.safetensors and y.safetensors",
    ),
    ("missing companion", {ONE: A}, f"has {ONE} but not {TWO}"),
    ("missing shard", {ONE: A, INDEX: index(a=ONE, b=TWO)}, f"the index names {TWO}, which is missing"),
    ("tensor elsewhere", {ONE: A, TWO: B, INDEX: index(a=ONE, b=ONE)}, f"'b' in {ONE}, which lacks it"),
    ("tensor nowhere", {ONE: A, INDEX: index(a=ONE, c=ONE)}, f"'c' in {ONE}, which lacks it"),
    ("duplicate with index", {ONE: A, TWO: A | B, INDEX: index(a=ONE, b=TWO)}, "is in both"),
    ("two sets", {"model.safetensors": A, ONE: A, TWO: B, INDEX: index(a=ONE, b=TWO)}, "two sets of weights"),
    ("index is a list", {ONE: A, INDEX: []}, "is not a JSON object"),
    ("index is empty", {ONE: A, INDEX: b""}, "is not JSON"),
    ("index nested", {ONE: A, INDEX: b"[" * 100_000}, "nested too deeply"),
    ("index repeats", {ONE: A, INDEX: b'{"weight_map": {"a": "x", "a": "y"}}'}, "has 'a' twice"),
    ("no map", {ONE: A, INDEX: {"metadata": {}}}, "no weight_map"),
    ("empty map", {ONE: A, INDEX: {"weight_map": {}}}, "no weight_map"),
    ("file is a number", {ONE: A, INDEX: index(a=1)}, "names the file 1"),  # type: ignore[arg-type]
    (
        "upwards",
        {INDEX: index(a="../model.safetensors")},
        "'../model.safetensors', but may only name .safetensors files",
    ),
    ("absolute", {INDEX: index(a="/etc/x.safetensors")}, "but may only name .safetensors files"),
    ("subdirectory", {INDEX: index(a="sub/x.safetensors")}, "but may only name .safetensors files"),
    ("backslash", {INDEX: index(a="..\\x.safetensors")}, "but may only name .safetensors files"),
    ("drive", {INDEX: index(a="c:x.safetensors")}, "but may only name .safetensors files"),
    ("null byte", {INDEX: index(a="x\0.safetensors")}, "but may only name .safetensors files"),
    (
        "pickle in index",
        {"model.bin": b"", INDEX: index(a="model.bin")},
        "but may only name .safetensors files",
    ),
    ("dots", {INDEX: index(a="..")}, "but may only name .safetensors files"),
    ("damaged shard", {ONE: A, TWO: save(B)[:-1], INDEX: index(a=ONE, b=TWO)}, "cut short"),
    ("config is a list", {"model.safetensors": A, "config.json": []}, "must be a JSON object"),
    ("config is cut", {"model.safetensors": A, "config.json": b'{"a":'}, "not valid JSON"),
    ("config nested", {"model.safetensors": A, "config.json": b'{"a":' * 100_000}, "not valid JSON"),
    ("config huge", {"model.safetensors": A, "config.json": b" " * (17 << 20)}, "larger than 16 MiB"),
]


@pytest.mark.parametrize(("files", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_directories_that_are_refused(make_model: MakeModel, files: dict[str, Any], sentence: str) -> None:
    directory = make_model(files)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(directory))
    message = str(caught.value)
    assert sentence in message
    assert message.startswith(str(directory))
    assert "\n" not in message


def test_a_directory_without_config(make_model: MakeModel) -> None:
    directory = make_model({"model.safetensors": A})
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_checkpoint(directory)


def test_paths_that_are_no_directories(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = make_model({"model.safetensors": A, "old.bin": b""})
    rows: list[tuple[str | Path, str]] = [
        ("nowhere", "no such directory"),
        ("./nowhere", "no such directory"),
        ("../nowhere", "no such directory"),
        (str(tmp_path / "no" / "where"), "no such directory"),
        (Path("org/name"), "no such directory"),
        ("a/b/c", "no such directory"),
        ("org/na me", "no such directory"),
        ("x\0y", "no such directory"),
        ("n" * 5000, "no such directory"),
        ("", "'': no such directory"),
        (directory / "config.json", "a config without weights"),
        (directory / "model.safetensors", "weights without a config.json"),
    ]
    for source, sentence in rows:
        with pytest.raises(CheckpointError, match=sentence.replace(".", r"\.")):
            open_checkpoint(source)
    with pytest.raises(UsageError, match="a revision applies to Hub repositories"):
        open_checkpoint(directory, revision="main")
    for source in ("hf://nowhere", "hf://a/b/c", "hf://../x", "hf://"):
        with pytest.raises(UsageError, match="not a Hub repository"):
            open_checkpoint(source)


def test_an_unreadable_directory(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model({"model.safetensors": A})

    def refuse(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        open_checkpoint(directory)


def linked(folder: Path, blobs: Path) -> Path:
    """A folder of links to the files in another."""
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    return folder


def test_links_are_followed_in_the_hub_cache(make_model: MakeModel, tmp_path: Path) -> None:
    blobs = make_model({"model.safetensors": A}, name="blobs")
    snapshot = linked(tmp_path / "snapshots" / "abc", blobs)
    assert open_checkpoint(snapshot).names() == ["a"]
    (tmp_path / "elsewhere").symlink_to(tmp_path / "snapshots")
    assert open_checkpoint(tmp_path / "elsewhere" / "abc").names() == ["a"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_not_followed(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"a": "model.safetensors"}}
    folder = make_model({"model.safetensors": A, "model.safetensors.index.json": index})
    kept = make_model({}, name="kept")
    (folder / name).rename(kept / name)
    (folder / name).symlink_to(kept / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a link that leads out of the model's folder"):
        open_checkpoint(folder)


def test_links_within_the_folder_are_followed(make_model: MakeModel) -> None:
    folder = make_model({"weights": b"", "model.safetensors": A})
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert open_checkpoint(folder).names() == ["a"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "README.md"]
)
def test_pipes_and_devices_are_refused_at_once(make_model: MakeModel, name: str) -> None:
    folder = make_model({"model.safetensors": A})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "README.md":  # of no importance
        assert open_checkpoint(folder).names() == ["a"]
        return
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="leads out of"):
        open_checkpoint(folder)


def test_names_come_in_the_order_of_the_bytes(make_model: MakeModel) -> None:
    tensors = {
        "z": torch.zeros(3, dtype=torch.int64),
        "m": torch.zeros(3, dtype=torch.int8),
        "a": torch.zeros(2),
    }
    checkpoint = open_checkpoint(make_model({"model.safetensors": tensors}))
    assert checkpoint.names() == ["z", "a", "m"]


def test_mtp_names_are_kept(make_model: MakeModel) -> None:
    tensors = {"mtp.fc.weight": torch.ones(2, 2), "model.norm.weight": torch.ones(2)}
    assert sorted(open_checkpoint(make_model({"model.safetensors": tensors})).names()) == sorted(tensors)


def test_tensors_are_views_and_read_into_copies(make_model: MakeModel) -> None:
    checkpoint = SafetensorsCheckpoint(make_model({"model.safetensors": A | B}))
    assert checkpoint.tensor("a").data_ptr() == checkpoint.tensor("a").data_ptr()
    target = torch.full((4,), torch.nan, dtype=torch.float64, requires_grad=True)
    checkpoint.read_into("a", target)
    assert target.tolist() == [0, 1, 2, 3]
    checkpoint.release("b")
    with pytest.raises(CheckpointError, match=r"shape \[4\], but the model expects \[2, 2\]"):
        checkpoint.read_into("a", torch.zeros(2, 2))
    for read in (checkpoint.tensor, checkpoint.info, checkpoint.release):
        with pytest.raises(CheckpointError, match="has no tensor 'c'"):
            read("c")


def test_opening_needs_no_supported_model_type(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model({"model.safetensors": A}, {"model_type": "gpt2"}))
    assert checkpoint.raw_config == {"model_type": "gpt2"}
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        _ = checkpoint.config


def test_config_is_read_once(make_model: MakeModel) -> None:
    config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    checkpoint = open_checkpoint(make_model({"model.safetensors": A}, config))
    assert checkpoint.config.vocab_size == 16
    assert checkpoint.config is checkpoint.config


def test_code_in_a_checkpoint_is_never_run(make_model: MakeModel) -> None:
    code = b"raise SystemExit('the code of a checkpoint ran')"
    config = {
        "model_type": "of_its_own",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    files = {"model.safetensors": A, "evil.py": code, "conftest.py": code, "pytorch_model.bin": b"\x80\x04."}
    checkpoint = open_checkpoint(make_model(files, config))
    assert checkpoint.tensor("a").shape == (4,)
    with pytest.raises(GodwitError):
        _ = checkpoint.config
    assert "evil" not in sys.modules


def test_read_raw_config(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model({}, {"model_type": "anything"})
    assert read_raw_config(directory) == {"model_type": "anything"}
    assert read_raw_config(str(directory / "config.json")) == {"model_type": "anything"}
    (tmp_path / "other.json").write_text(json.dumps({"x": 1}))
    assert read_raw_config(tmp_path / "other.json") == {"x": 1}
    with pytest.raises(CheckpointError, match="no such directory"):
        read_raw_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_raw_config(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match="revision"):
        read_raw_config(directory / "config.json", revision="main")
