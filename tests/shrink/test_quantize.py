"""Packing checkpoints: what is stored, going on after a kill, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from godwit.checkpoint import open_checkpoint, packed_writer, quantize_fp8, save_checkpoint
from godwit.checkpoint.packed import PackedFile
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import export_tensors, load_model, save_model
from godwit.qtensor import QuantExperts, QuantTensor, quantize
from godwit.shrink.importance import read_importance
from godwit.shrink.quantize import quantize_checkpoint
from godwit.shrink.recipe import QuantRecipe
from tests.engine.tiny import CONFIGS, tiny_model
from tests.shrink.dequantized import load_dequantized, same_weights

Q4 = QuantRecipe.find("q4")
EXPERTS = "layers.0.ffn.experts"


def source_of(kind: str, path: Path, seed: int = 0) -> Path:
    save_model(tiny_model(kind, seed), path, extra_files={"tokenizer.json": b"{}", "notes.txt": b"-"})
    return path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of("hybrid", tmp_path_factory.mktemp("source") / "hybrid")


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_bf16_only_rounds_matrices(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path / "m")
    report = quantize_checkpoint(source, tmp_path / "m.godwit", QuantRecipe.find("bf16"))
    wanted, found = load_model(source), load_dequantized(tmp_path / "m.godwit")
    blobs = report.blobs
    for name, parameter in wanted.named_parameters():
        plain = name in blobs and type(blobs[name]).__name__ == "Plain"
        parameter.copy_(parameter if plain else parameter.bfloat16())
    assert same_weights(wanted, found)
    assert report.nbytes == (tmp_path / "m.godwit").stat().st_size and report.resumed == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_stored(hybrid: Path, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    try:
        quantize_checkpoint(hybrid, tmp_path / "m", Q4, progress=lambda *pair: seen.append(pair))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    packed, model = PackedFile.open(tmp_path / "m"), load_model(hybrid)
    packed.verify()
    for name, parameter in model.named_parameters():
        stack, _, part = name.rpartition(".")
        if parameter.dim() == 3:
            experts = packed.tensor(stack)
            assert isinstance(experts, QuantExperts)
            for index in range(4):
                found = experts.expert(index)[0 if part == "w13" else 1]
                assert torch.equal(found.data, quantize(parameter[index], "q4").data)
            continue
        value = packed.tensor(name)
        if isinstance(value, QuantTensor):
            assert torch.equal(value.data, quantize(parameter, value.format).data)
        else:
            assert isinstance(value, torch.Tensor) and torch.equal(value, parameter)
    assert packed.files() == {"tokenizer.json": b"{}"}
    assert packed.metadata["recipe"] == "q4" and packed.config == open_checkpoint(hybrid).config
    total = sum(parameter.numel() for parameter in model.parameters())
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) > 30


def fused(model: CausalLM) -> dict[str, torch.Tensor]:
    """The tensors of a model with the experts of a layer in one."""
    tensors = {n: t for n, t in export_tensors(model) if ".experts." not in n}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            layer = name.split("ffn.")[0] if name.startswith("mtp") else f"model.{name.split('ffn.')[0]}"
            last = "gate_up_proj" if name.endswith("w13") else "down_proj"
            tensors[f"{layer}mlp.experts.{last}"] = parameter
    return tensors


def test_experts_fused_on_disk_give_the_same_file(hybrid: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "fused", fused(load_model(hybrid)).items(), CONFIGS["hybrid"])
    for source, out in ((hybrid, "a"), (tmp_path / "fused", "b")):
        quantize_checkpoint(source, tmp_path / out, Q4)
    first, second = (PackedFile.open(tmp_path / out) for out in "ab")
    for name in first.names():
        one, two = first.tensor(name), second.tensor(name)
        pair = [x if isinstance(x, torch.Tensor) else x.data for x in (one, two)]
        assert torch.equal(*pair), name


def test_fp8_sources(hybrid: Path, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in export_tensors(load_model(hybrid, dtype=torch.bfloat16)):
        if ".experts." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8(tensor)
        else:
            tensors[name] = tensor
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save_checkpoint(tmp_path / "m", tensors.items(), {**CONFIGS["hybrid"], "quantization_config": section})
    quantize_checkpoint(tmp_path / "m", tmp_path / "m.godwit", QuantRecipe.find("bf16"))
    packed = PackedFile.open(tmp_path / "m.godwit")
    assert "quantization_config" not in packed.raw_config
    assert same_weights(load_model(tmp_path / "m", dtype=torch.float32), load_dequantized(packed.path))


class Killed(Exception):
    pass


@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_an_interrupted_run_goes_on(hybrid: Path, tmp_path: Path, share: float) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= share * total:
            raise Killed

    out = tmp_path / "m"
    with pytest.raises(Killed):
        quantize_checkpoint(hybrid, out, Q4, progress=interrupt)
    assert not out.exists()
    seen: list[int] = []
    report = quantize_checkpoint(hybrid, out, Q4, progress=lambda done, total: seen.append(done))
    assert 0 < report.resumed < len(report.blobs)
    written = sum(report.blobs[n].num_weights for n in list(report.blobs)[: report.resumed])
    assert seen[0] > written and written <= share * seen[-1]
    quantize_checkpoint(hybrid, tmp_path / "whole", Q4)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"m", "whole"}


KILLED = """
import os, sys
from godwit.checkpoint import packed_writer
from godwit.shrink.quantize import quantize_checkpoint
from godwit.shrink.recipe import QuantRecipe

packed_writer.SYNC_BYTES = 1
stop = lambda done, total: os._exit(9) if done > total // 2 else None
quantize_checkpoint(sys.argv[1], sys.argv[2], QuantRecipe.find("q4"), progress=stop)
"""


def test_a_killed_process_goes_on(hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(hybrid), str(out)], timeout=200)
    assert killed.returncode == 9 and not out.exists()
    report = quantize_checkpoint(hybrid, out, Q4)
    assert 0 < report.resumed < len(report.blobs)
    quantize_checkpoint(hybrid, tmp_path / "whole", Q4)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_source_or_recipe_does_not_go_on(
    hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_writer, "SYNC_BYTES", 1)

    def begin() -> None:
        with pytest.raises(Killed):
            quantize_checkpoint(hybrid, tmp_path / "m", Q4, progress=interrupt, restart=True)

    def interrupt(done: int, total: int) -> None:
        if 2 * done > total:
            raise Killed

    begin()
    other = source_of("hybrid", tmp_path / "other", seed=1)
    importance = {"mtp.fc.weight": torch.rand(64)}
    attempts: list[tuple[Path, QuantRecipe, dict[str, Any]]] = [
        (other, Q4, {}),
        (hybrid, QuantRecipe.find("q8"), {}),
        (hybrid, Q4, {"importance": importance}),
    ]
    for source, recipe, options in attempts:
        with pytest.raises(CheckpointError, match="another model or recipe"):
            quantize_checkpoint(source, tmp_path / "m", recipe, **options)
    assert quantize_checkpoint(other, tmp_path / "m", Q4, restart=True).resumed == 0
    assert same_weights(load_dequantized(tmp_path / "m"), _packed(other, tmp_path / "n"))


def _packed(source: Path, out: Path) -> CausalLM:
    quantize_checkpoint(source, out, Q4)
    return load_dequantized(out)


def test_a_moved_source_goes_on(hybrid: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if 2 * done > total:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(hybrid, tmp_path / "m", Q4, progress=interrupt)
    moved = source_of("hybrid", tmp_path / "moved")
    assert quantize_checkpoint(moved, tmp_path / "m", Q4).resumed > 0


def test_importance_reaches_its_matrix(hybrid: Path, tmp_path: Path) -> None:
    values = {
        "layers.3.mixer.out_proj.weight": torch.rand(32) ** 3,
        f"{EXPERTS}.w13": torch.rand(4, 32) ** 3,
        f"{EXPERTS}.w2": torch.rand(16),
    }
    save_file(values, tmp_path / "importance.safetensors")
    read = read_importance(tmp_path / "importance.safetensors")
    quantize_checkpoint(hybrid, tmp_path / "m", Q4, importance=read)
    packed, model = PackedFile.open(tmp_path / "m"), load_model(hybrid)
    out = packed.tensor("layers.3.mixer.out_proj.weight")
    weight = model.get_parameter("layers.3.mixer.out_proj.weight")
    assert isinstance(out, QuantTensor)
    assert torch.equal(out.data, quantize(weight, "q4", values["layers.3.mixer.out_proj.weight"]).data)
    assert not torch.equal(out.data, quantize(weight, "q4").data)
    stack = packed.tensor(EXPERTS)
    assert isinstance(stack, QuantExperts)
    for index in range(4):
        w13, w2 = stack.expert(index)
        first, second = (model.get_parameter(f"{EXPERTS}.{part}")[index] for part in ("w13", "w2"))
        assert torch.equal(w13.data, quantize(first, "q4", values[f"{EXPERTS}.w13"][index]).data)
        assert torch.equal(w2.data, quantize(second, "q4", values[f"{EXPERTS}.w2"]).data)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("norm.weight", [32]), ("head", [32]), ("head.weight", [31]), (f"{EXPERTS}.w2", [3, 16])],
)
def test_importances_that_do_not_fit(hybrid: Path, tmp_path: Path, name: str, shape: list[int]) -> None:
    with pytest.raises(UsageError, match="importance"):
        quantize_checkpoint(hybrid, tmp_path / "m", Q4, importance={name: torch.ones(shape)})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"],
)
def test_numbers_that_are_none_are_named(hybrid: Path, tmp_path: Path, name: str) -> None:
    tensors = dict(export_tensors(load_model(hybrid)))
    tensors[name].flatten()[-1] = torch.nan
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIGS["hybrid"])
    with pytest.raises(CheckpointError, match=r"embedding\.weight|norm\.weight|layers\.1\.ffn\.experts"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "m.godwit", Q4)


def test_weights_that_are_not_those_of_the_config(hybrid: Path, tmp_path: Path) -> None:
    tensors = dict(export_tensors(load_model(hybrid)))
    del tensors["model.norm.weight"]
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIGS["hybrid"])
    with pytest.raises(CheckpointError, match="missing tensors"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "m.godwit", Q4)


def test_what_is_there_is_not_overwritten(hybrid: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("precious")
    with pytest.raises(CheckpointError, match="there already"):
        quantize_checkpoint(hybrid, tmp_path / "m", Q4, restart=True)
    assert (tmp_path / "m").read_text() == "precious"


MEMORY = """
import sys, torch
from godwit.shrink.quantize import quantize_checkpoint
from godwit.shrink.recipe import QuantRecipe

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

small, large, out = sys.argv[1:]
quantize_checkpoint(small, out + ".small", QuantRecipe.find("q4"))  # the code's own pages
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
before = status("VmRSS")
quantize_checkpoint(large, out, QuantRecipe.find("q4"))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux memory accounting")
@pytest.mark.parametrize("layout", ["apart", "fused"])
def test_a_stack_of_experts_is_never_in_memory(hybrid: Path, tmp_path: Path, layout: str) -> None:
    """128 MiB of experts in two layers; a single one is 1 MiB."""
    raw = {**CONFIGS["hybrid"], "num_hidden_layers": 2, "hidden_size": 256, "num_experts": 64,
           "moe_intermediate_size": 512, "mtp_num_hidden_layers": 0}  # fmt: skip
    model = CausalLM(ModelConfig.from_dict(raw)).to(torch.bfloat16).requires_grad_(False)
    model.init_weights()
    tensors = fused(model).items() if layout == "fused" else export_tensors(model)
    save_checkpoint(tmp_path / "large", tensors, raw)
    words = [str(path) for path in (hybrid, tmp_path / "large", tmp_path / "m")]
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, timeout=200, check=True
    )
    assert int(ran.stdout) < 40 << 20
