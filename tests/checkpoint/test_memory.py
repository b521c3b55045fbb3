"""Loading stays within the model's own size and one tensor, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from godwit.checkpoint import TensorSource, quantize_fp8, save_checkpoint

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux memory accounting"
)

MIB = 2**20
ROWS, COLUMNS, COUNT = 2048, 2048, 24  # 8 MiB a tensor in bfloat16, 192 MiB in all

SCRIPT = """
import json, sys, torch
from godwit.checkpoint import open_checkpoint, save_checkpoint, TensorSource

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

source, copy = sys.argv[1:]
checkpoint = open_checkpoint(source)
names = checkpoint.names()
checkpoint.read_into(names[0], torch.empty(checkpoint.info(names[0]).shape))  # the code's own pages
targets = {name: torch.zeros(checkpoint.info(name).shape, dtype=torch.bfloat16) for name in names}
for target in targets.values():
    target.fill_(1)  # resident before the baseline
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
base = {field: status(field) for field in ("RssAnon", "VmHWM")}
anon = 0
for name in names:
    checkpoint.read_into(name, targets[name])
    anon = max(anon, status("RssAnon"))
loaded = {"anon": anon - base["RssAnon"], "peak": status("VmHWM") - base["VmHWM"]}
assert all(bool((target == 0.5).all()) for target in targets.values())
targets.clear()
del target

open("/proc/self/clear_refs", "w").write("5")
base = status("VmHWM")
def stream(name):
    def load():
        for done in names[:names.index(name)]:
            checkpoint.release(done)
        return checkpoint.tensor(name)
    return TensorSource(name, checkpoint.info(name).shape, torch.bfloat16, load)
save_checkpoint(copy, map(stream, names), {"model_type": "qwen3_next"})
loaded["copied"] = status("VmHWM") - base
print(json.dumps(loaded))
"""


def source(name: str, tensor: torch.Tensor) -> TensorSource:
    return TensorSource(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def make(path: Path, fp8: bool) -> None:
    weight = torch.full((ROWS, COLUMNS), 0.5, dtype=torch.bfloat16)
    q, scale = quantize_fp8(weight)
    sources: list[TensorSource] = []
    for number in range(COUNT):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        sources += [source(name, q), source(f"{name}_scale_inv", scale)] if fp8 else [source(name, weight)]
    save_checkpoint(path, sources, {"model_type": "qwen3_next"}, max_shard_bytes=100 * MIB)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_peak_memory(tmp_path: Path, fp8: bool) -> None:
    make(tmp_path / "m", fp8)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m"), str(tmp_path / "copy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    one = ROWS * COLUMNS * 2
    # Beyond the targets: nothing but small pieces in anonymous memory, and one tensor with the file's pages.
    # What the allocator keeps of the pieces in which FP8 is multiplied out varies by a few MiB.
    slack = 12 * MIB if fp8 else 2 * MIB
    assert grown["anon"] <= slack
    assert grown["peak"] <= one + slack
    assert grown["copied"] <= 2 * one + slack
