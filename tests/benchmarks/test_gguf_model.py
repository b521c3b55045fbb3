"""The shape of a GGUF model against published sizes, and its bytes against the package's own dequantiser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gguf_model
from benchmarks.gguf_model import Filler, GgufTensor, more_bits, tensors, token_bytes, write
from benchmarks.peers import QWEN3_NEXT

SMALL: dict[str, Any] = {
    **QWEN3_NEXT,
    "vocab_size": 96,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 256,
}


def test_the_size_of_the_whole_model_is_the_published_one() -> None:
    sizes = {mix: sum(tensor.nbytes for tensor in tensors(QWEN3_NEXT, mix)) for mix in gguf_model.MIXES}
    assert sizes["q4_k_m"] == pytest.approx(48.5e9, rel=0.005)
    assert sizes["q4_0"] == pytest.approx(45.1e9, rel=0.005)
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(QWEN3_NEXT, "q4_0")) == 79_674_391_296
    assert len(tensors(QWEN3_NEXT, "q4_k_m")) == 843
    assert sum(more_bits(layer, 48) for layer in range(48)) == 24


def test_bytes_of_a_token() -> None:
    eight = {**QWEN3_NEXT, "num_hidden_layers": 8}
    assert token_bytes(eight, "q4_k_m") == pytest.approx(611e6, rel=0.001)
    assert token_bytes(eight, "q4_0") == pytest.approx(590e6, rel=0.001)


def test_rows_that_are_no_multiple_of_256_are_q4_0() -> None:
    formats = {tensor.name: tensor.format for tensor in tensors(SMALL, "q4_k_m")}
    assert formats["blk.0.ffn_down_exps.weight"] == "Q4_0"
    assert formats["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert formats["blk.0.attn_qkv.weight"] == formats["output.weight"] == "Q6_K"
    assert formats["blk.0.ffn_gate_inp.weight"] == formats["blk.0.ssm_a"] == "F32"
    assert "blk.3.attn_q.weight" in formats and "blk.3.ssm_a" not in formats


@pytest.mark.parametrize("format", ["F32", "Q4_0", "Q4_K", "Q6_K"])
def test_pieces_add_up_to_the_tensor(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "POOL_BYTES", 1000)
    tensor = GgufTensor("x", (7, 512), format)
    pieces = list(Filler(pool_bytes=100).data(tensor))
    assert len(pieces) > 1 and sum(piece.nbytes for piece in pieces) == tensor.nbytes


@pytest.mark.parametrize("mix", gguf_model.MIXES)
def test_a_file_holds_what_it_should(tmp_path: Path, mix: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    size = write(SMALL, tmp_path / "model.gguf", mix)
    assert size == (tmp_path / "model.gguf").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen3next"
    assert reader.fields["qwen3next.expert_used_count"].contents() == 2
    assert reader.fields["qwen3next.ssm.inner_size"].contents() == 256
    assert [found.name for found in reader.tensors] == [tensor.name for tensor in tensors(SMALL, mix)]
    for found, tensor in zip(reader.tensors, tensors(SMALL, mix), strict=True):
        values = gguf.dequantize(found.data, found.tensor_type)
        assert values.shape == tensor.shape and np.isfinite(values).all()
        if tensor.fill is not None:
            assert (values == np.float32(tensor.fill)).all()
        elif tensor.name != "blk.0.ffn_gate_inp.weight":
            assert values.std() == pytest.approx(gguf_model.STD, rel=0.15)
            assert abs(values.mean()) < 0.15 * gguf_model.STD


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    line = [sys.executable, gguf_model.__file__, str(tmp_path / "config.json"), str(tmp_path / "out.gguf")]
    done = subprocess.run([*line, "--layers", "2"], capture_output=True, text=True, check=True)
    size = (tmp_path / "out.gguf").stat().st_size
    assert done.stderr.startswith(f"{size:,} bytes")
    assert size > sum(tensor.nbytes for tensor in tensors({**SMALL, "num_hidden_layers": 2}, "q4_k_m"))
