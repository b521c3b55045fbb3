"""Saving: what is written, who can read it, and what a kill at any moment leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from godwit.checkpoint import TensorSource, open_checkpoint, quantize_fp8, save_checkpoint
from godwit.checkpoint.safetensors import DTYPES
from godwit.errors import CheckpointError

CONFIG = {"model_type": "qwen3_next", "hidden_size": 8}
TENSORS = {
    "model.embed_tokens.weight": torch.arange(32, dtype=torch.bfloat16).reshape(8, 4),
    "mtp.fc.weight": torch.randn(4, 8),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "nothing": torch.zeros(0, 5, dtype=torch.float16),
}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    save_checkpoint(path, TENSORS.items(), CONFIG, extra_files={"tokenizer.json": b"{}"})
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(path.parent) == ["model"]
    assert_same(read_all(path), TENSORS)
    assert_same(load_file(path / "model.safetensors"), TENSORS)
    assert json.loads((path / "config.json").read_text()) == CONFIG
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(5)}
    tensors["large"] = torch.zeros(1000)
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIG, max_shard_bytes=900)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6000, "total_parameters": 1500}
    files = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert list(index["weight_map"].values()) == [files[0]] * 2 + [files[1]] * 2 + files[2:]
    assert sorted(os.listdir(tmp_path / "m")) == sorted(
        [*files, "config.json", "model.safetensors.index.json"]
    )
    assert_same(read_all(tmp_path / "m"), tensors)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "m" / file)[name], tensors[name])


def test_every_dtype_and_aligned(tmp_path: Path) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2, (3, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = bits.view(dtype)
        if name.startswith("F8"):
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIG)
    got = load_file(tmp_path / "m" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, tensor in tensors.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))
    for name in checkpoint.names():
        x = checkpoint.tensor(name)
        assert x.data_ptr() % x.dtype.itemsize == 0


def test_awkward_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "expanded": base[:1].expand(3, 6),
        "tied": base,
        "tied_too": base,
        "parameter": torch.nn.Parameter(base + 1),
        'név \n "quoted"': torch.ones(1),
    }
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIG)
    assert_same(read_all(tmp_path / "m"), {name: tensor.detach() for name, tensor in tensors.items()})
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == tensors.keys()


def test_fp8_round_trip(tmp_path: Path) -> None:
    q, scale = quantize_fp8(torch.randn(130, 40))
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    save_checkpoint(tmp_path / "m", [("x.weight", q), ("x.weight_scale_inv", scale)], config)
    assert open_checkpoint(tmp_path / "m").info("x.weight").dtype == torch.bfloat16


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    save_checkpoint(tmp_path / "m", state.items(), raw, max_shard_bytes=1000)
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(dict(again.state_dict()), state)


def test_a_generator_is_held_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def generate() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(12):
            tensor = torch.full((100,), float(number))
            alive.add(tensor)
            most = max(most, len(alive))
            yield str(number), tensor
            del tensor

    save_checkpoint(tmp_path / "m", generate(), CONFIG, max_shard_bytes=1200)
    assert most <= 4  # a shard of three, and the one that did not fit it
    assert_same(read_all(tmp_path / "m"), {str(n): torch.full((100,), float(n)) for n in range(12)})


def test_sources_are_loaded_one_at_a_time_and_once(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    loaded: list[str] = []

    def source(name: str) -> TensorSource:
        def load() -> torch.Tensor:
            assert not alive
            loaded.append(name)
            tensor = torch.ones(10)
            alive.add(tensor)
            return tensor

        return TensorSource(name, (10,), torch.float32, load)

    save_checkpoint(tmp_path / "m", [source(name) for name in "abc"], CONFIG)
    assert loaded == ["a", "b", "c"]
    assert open_checkpoint(tmp_path / "m").num_parameters == 30


def stop() -> NoReturn:
    raise KeyboardInterrupt


X = torch.ones(2)
BAD: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    ("nothing", [], CONFIG, {}, "no tensors to save"),
    ("repeated", [("a", X), ("a", X)], CONFIG, {}, "tensor name 'a' is used twice or reserved"),
    ("reserved", [("__metadata__", X)], CONFIG, {}, "used twice or reserved"),
    ("complex", [("a", torch.ones(2, dtype=torch.complex64))], CONFIG, {}, "dtype torch.complex64"),
    ("meta", [("a", torch.ones(2, device="meta"))], CONFIG, {}, "on meta"),
    (
        "other shape",
        [TensorSource("a", (3,), X.dtype, lambda: X)],
        CONFIG,
        {},
        "expected [3] torch.float32",
    ),
    ("other dtype", [TensorSource("a", (2,), torch.float16, lambda: X)], CONFIG, {}, "expected [2]"),
    ("config", [("a", X)], {"x": X}, {}, "cannot be written as JSON"),
    (
        "stale section",
        [("a", X)],
        {"quantization_config": {"quant_method": "fp8"}},
        {},
        "remove that section",
    ),
    ("upwards", [("a", X)], CONFIG, {"../x": b""}, "'../x' cannot be the name"),
    ("absolute", [("a", X)], CONFIG, {"/x": b""}, "cannot be the name"),
    ("dots", [("a", X)], CONFIG, {"..": b""}, "cannot be the name"),
    ("no name", [("a", X)], CONFIG, {"": b""}, "cannot be the name"),
    ("null byte", [("a", X)], CONFIG, {"x\0": b""}, "cannot be the name"),
    ("the config", [("a", X)], CONFIG, {"config.json": b""}, "cannot be the name"),
    ("the weights", [("a", X)], CONFIG, {"model.safetensors": b""}, "cannot be the name"),
]


@pytest.mark.parametrize(
    ("tensors", "config", "extra", "sentence"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_what_cannot_be_saved_leaves_nothing(
    tmp_path: Path, tensors: Any, config: Any, extra: dict[str, bytes], sentence: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "m", tensors, config, extra_files=extra)
    assert sentence in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_destinations(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", TENSORS.items(), CONFIG)
    assert_same(read_all(tmp_path / "empty"), TENSORS)
    with pytest.raises(CheckpointError, match="not empty; choose another name, or allow overwriting it"):
        save_checkpoint(tmp_path / "empty", [("a", X)], CONFIG)
    assert_same(read_all(tmp_path / "empty"), TENSORS)
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    for name, sentence in [
        ("file", "not a directory"),
        ("file/sub", "could not be written"),
        ("home", "no config.json, so it is not a checkpoint to overwrite"),
        ("n" * 300, "File name too long"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            save_checkpoint(tmp_path / name, [("a", X)], CONFIG, overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be a checkpoint"):
        save_checkpoint("/", [("a", X)], CONFIG, overwrite=True)
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear diary"
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "home"]


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, TENSORS.items(), CONFIG, extra_files={"old.json": b""}, max_shard_bytes=10)
    view = open_checkpoint(path).tensor("mtp.fc.weight")
    # A checkpoint can replace the one it reads from.
    save_checkpoint(path, [("a", view)], {"model_type": "new"}, overwrite=True)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert torch.equal(read_all(path)["a"], TENSORS["mtp.fc.weight"])
    assert torch.equal(view, TENSORS["mtp.fc.weight"])
    assert os.listdir(tmp_path) == ["m"]


def test_overwriting_through_a_symlink(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "real", TENSORS.items(), CONFIG)
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(tmp_path / "link", [("a", X)], CONFIG, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_checkpoint(tmp_path / "real").names() == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_changes_nothing(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "m"
    if overwrite:
        save_checkpoint(path, TENSORS.items(), CONFIG)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            path,
            [("a", X), TensorSource("b", (2,), X.dtype, stop)],
            CONFIG,
            max_shard_bytes=8,
            overwrite=overwrite,
        )
    assert os.listdir(tmp_path) == (["m"] if overwrite else [])
    if overwrite:
        assert_same(read_all(path), TENSORS)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match="could not be written \\(No space left on device\\); nothing was changed"
    ):
        save_checkpoint(tmp_path / "m", [("a", X)], CONFIG)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys, torch
from godwit.checkpoint import TensorSource, save_checkpoint
import godwit.checkpoint.publish as publish
path, moment = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def load():
    if moment == "writing":
        die()
    return torch.zeros(2)
if moment == "publishing":
    publish._publish = die
if moment == "between renames":
    rename = os.rename
    def once(source, target):
        rename(source, target)
        if str(target).endswith(".previous"):
            die()
    os.rename = once
if moment == "cleaning":
    publish.shutil.rmtree = die  # the old directory is removed last
sources = [TensorSource(name, (2,), torch.float32, load) for name in "xy"]
save_checkpoint(path, sources, {"model_type": "new"}, max_shard_bytes=8, overwrite=True)
"""


def kill_a_save(path: Path, moment: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", ["writing", "publishing"])
def test_a_killed_save_leaves_the_old_state_and_a_remnant(
    tmp_path: Path, moment: str, existing: bool
) -> None:
    path = tmp_path / "m"
    if existing:
        save_checkpoint(path, TENSORS.items(), CONFIG)
    kill_a_save(path, moment)
    assert sorted(os.listdir(tmp_path)) == [".m.saving"] + ["m"] * existing
    if existing:
        assert_same(read_all(path), TENSORS)
    save_checkpoint(path, [("a", X)], CONFIG, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert_same(read_all(path), {"a": X})


def test_a_save_killed_after_the_renames_has_been_made(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, TENSORS.items(), CONFIG)
    kill_a_save(path, "cleaning")
    assert open_checkpoint(path).raw_config == {"model_type": "new"}
    save_checkpoint(path, [("a", X)], CONFIG, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]


def test_a_save_killed_between_two_renames_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, TENSORS.items(), CONFIG)
    kill_a_save(path, "between renames")
    assert sorted(os.listdir(tmp_path)) == [".m.previous", ".m.saving"]
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(path, [("a", X)], CONFIG)
    assert_same(read_all(path), TENSORS)
    assert os.listdir(tmp_path) == ["m"]


def test_a_remnant_is_emptied_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    remnant = tmp_path / ".m.saving"
    (remnant / "sub").mkdir(parents=True)
    (remnant / "link").symlink_to(tmp_path / "precious")
    save_checkpoint(tmp_path / "m", [("a", X)], CONFIG)
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert (tmp_path / "precious" / "file").exists()
    (tmp_path / ".n.saving").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "n", [("a", X)], CONFIG)
    assert (tmp_path / "precious" / "file").exists()


def test_two_saves_at_once(tmp_path: Path) -> None:
    def nested() -> torch.Tensor:
        with pytest.raises(CheckpointError, match="another process is saving there"):
            save_checkpoint(tmp_path / "m", [("b", X)], CONFIG)
        return X

    save_checkpoint(tmp_path / "m", [TensorSource("a", (2,), X.dtype, nested)], CONFIG)
    assert_same(read_all(tmp_path / "m"), {"a": X})
    assert os.listdir(tmp_path) == ["m"]


def test_a_replacement_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, TENSORS.items(), CONFIG)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(".saving"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="nothing was changed there"):
        save_checkpoint(path, [("a", X)], CONFIG, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert_same(read_all(path), TENSORS)
