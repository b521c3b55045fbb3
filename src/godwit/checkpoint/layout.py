"""Find the weight files of a model directory and check them against the index."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from godwit.checkpoint.formats import INDEX as INDEX
from godwit.checkpoint.safetensors import SafetensorsFile, shown, strict_json
from godwit.errors import CheckpointError
from godwit.safe_files import read_bounded

WEIGHTS = "model.safetensors"
MAX_INDEX_BYTES = 32 << 20  # the largest models have an index of about 15 MB

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)


def open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it, for all weights of the directory, in file and byte order.

    With an index, its files are used, including tensors that the index does not list; without one,
    ``model.safetensors``, or else every ``*.safetensors``. Pickles are never opened.

    Raises:
        CheckpointError: a missing shard, a damaged file, or files that contradict each other.
    """
    index = _read_index(directory)
    files = sorted(set(index.values())) if index is not None else _find_weights(directory)
    shards: dict[str, SafetensorsFile] = {}
    for name in files:
        shard = SafetensorsFile(directory / name, folder=directory)
        for tensor in shard.entries:
            if tensor in shards:
                raise CheckpointError(
                    f"{directory}: tensor {shown(tensor)} is in both {shards[tensor].path.name} and {name}; "
                    "keep the files of one checkpoint only"
                )
            shards[tensor] = shard
    for tensor, name in (index or {}).items():
        if tensor not in shards or shards[tensor].path.name != name:
            raise CheckpointError(
                f"{directory / INDEX}: lists tensor {shown(tensor)} in {name}, which lacks it; "
                "fetch the index and that file again"
            )
    return shards


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not os.path.lexists(path):
        return None
    data = read_bounded(path, MAX_INDEX_BYTES, folder=directory)
    weight_map = strict_json(data, path, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files; fetch it again")
    for name in weight_map.values():
        _check_shard_name(path, name)
    index: dict[str, str] = weight_map
    files = set(index.values())
    for name in sorted(files):
        if not (directory / name).exists():
            raise CheckpointError(
                f"{directory}: the index names {name}, which is missing; fetch the checkpoint again"
            )
    if WEIGHTS not in files and (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory}: has both {WEIGHTS} and an index of other files, so there are two sets of weights; "
            "remove one"
        )
    return index


def _check_shard_name(path: Path, name: object) -> None:
    # A plain file name on every system: an index must not point outside its directory.
    plain = isinstance(name, str) and name == PureWindowsPath(name).name and name.isprintable()
    if not plain or not str(name).endswith(".safetensors"):
        raise CheckpointError(
            f"{path}: names the file {shown(name)}, but may only name .safetensors files in the same "
            "directory; fetch it again"
        )


def _find_weights(directory: Path) -> list[str]:
    names = sorted(os.listdir(directory))
    if WEIGHTS in names:
        return [WEIGHTS]
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    _check_numbers(directory, found)
    return found


def _check_numbers(directory: Path, names: list[str]) -> None:
    for name in names:
        match = _NUMBERED.fullmatch(name)
        for number in range(1, int(match[3]) + 1) if match else ():
            wanted = f"{match[1]}-{number:05d}-of-{match[3]}.safetensors" if match else name
            if wanted not in names:
                raise CheckpointError(f"{directory}: has {name} but not {wanted}; fetch the checkpoint again")
