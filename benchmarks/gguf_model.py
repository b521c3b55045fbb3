"""A GGUF file with random weights in the shape of a Qwen3-Next model, for timing llama.cpp.

Standalone: needs numpy and the `gguf` package but not godwit, so that it runs in llama.cpp's environment:

    python benchmarks/gguf_model.py CONFIG.json OUT.gguf --layers 8 --mix q4_k_m

Blocks are random bytes, with scales such that weights have a standard deviation of about 0.02. `--mix`
selects formats as llama.cpp's quantiser does: bf16 or q4_0 throughout, or q4_k_m, with more bits for some
matrices of half of the layers. With quantised matrices the head is Q6_K; routers, norms and other small
tensors are float32. `--tokenizer` adds a byte-level BPE vocabulary and the chat template, so that the file
can be served.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STD = 0.02
POOL_BYTES = 1 << 26  # random bytes are drawn once and used again from other places
#: format -> weights of a block, bytes of a block
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}
MIXES = ("q4_0", "q4_k_m", "bf16")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; `shape` has rows before columns, experts before both. `fill` is the value of vectors."""

    name: str
    shape: tuple[int, ...]
    format: str
    fill: float | None = None

    @property
    def nbytes(self) -> int:
        weights, size = BLOCKS[self.format]
        return int(np.prod(self.shape)) // weights * size


def tensors(config: Mapping[str, Any], mix: str) -> list[GgufTensor]:
    """All tensors of the file, in order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found = [
        GgufTensor("token_embd.weight", (vocab, hidden), matrix_format(mix, hidden)),
        GgufTensor("output_norm.weight", (hidden,), "F32", 1.0),
    ]
    if not config.get("tie_word_embeddings"):
        best = matrix_format(mix, hidden) if mix == "bf16" or hidden % 256 else "Q6_K"
        found.append(GgufTensor("output.weight", (vocab, hidden), best))
    for layer in range(config["num_hidden_layers"]):
        mixer = _attention if is_attention(config, layer) else _delta
        parts = [("attn_norm.weight", (hidden,), 1.0), ("post_attention_norm.weight", (hidden,), 1.0)]
        for name, shape, fill in [*parts, *mixer(config), *_ffn(config)]:
            found.append(
                GgufTensor(f"blk.{layer}.{name}", shape, _format(name, shape, mix, layer, config), fill)
            )
    return found


Part = tuple[str, tuple[int, ...], float | None]


def is_attention(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has softmax attention."""
    return bool((layer + 1) % config.get("full_attention_interval", 4) == 0)


def _attention(config: Mapping[str, Any]) -> list[Part]:
    hidden, width = config["hidden_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    return [
        ("attn_q.weight", (2 * query, hidden), None),  # query and gate
        ("attn_k.weight", (kv, hidden), None),
        ("attn_v.weight", (kv, hidden), None),
        ("attn_output.weight", (hidden, query), None),
        ("attn_q_norm.weight", (width,), 1.0),
        ("attn_k_norm.weight", (width,), 1.0),
    ]


def _delta(config: Mapping[str, Any]) -> list[Part]:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value = heads * config["linear_value_head_dim"]
    return [
        ("attn_qkv.weight", (2 * key + value, hidden), None),
        ("attn_gate.weight", (value, hidden), None),
        ("ssm_ba.weight", (2 * heads, hidden), None),
        ("ssm_conv1d.weight", (2 * key + value, config["linear_conv_kernel_dim"]), 0.3),
        ("ssm_a", (heads,), -1.0),
        ("ssm_dt.bias", (heads,), 1.0),
        ("ssm_norm.weight", (config["linear_value_head_dim"],), 1.0),
        ("ssm_out.weight", (hidden, value), None),
    ]


def _ffn(config: Mapping[str, Any]) -> list[Part]:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shared = config["shared_expert_intermediate_size"]
    return [
        ("ffn_gate_inp.weight", (experts, hidden), None),
        ("ffn_gate_exps.weight", (experts, width, hidden), None),
        ("ffn_up_exps.weight", (experts, width, hidden), None),
        ("ffn_down_exps.weight", (experts, hidden, width), None),
        ("ffn_gate_inp_shexp.weight", (hidden,), 0.0),
        ("ffn_gate_shexp.weight", (shared, hidden), None),
        ("ffn_up_shexp.weight", (shared, hidden), None),
        ("ffn_down_shexp.weight", (hidden, shared), None),
    ]


def _format(name: str, shape: tuple[int, ...], mix: str, layer: int, config: Mapping[str, Any]) -> str:
    if len(shape) == 1 or name in ("ffn_gate_inp.weight", "ssm_conv1d.weight"):
        return "F32"
    more = name in ("attn_v.weight", "attn_qkv.weight") or name.startswith("ffn_down")
    if mix == "q4_k_m" and more and more_bits(layer, config["num_hidden_layers"]) and shape[-1] % 256 == 0:
        return "Q6_K"
    return matrix_format(mix, shape[-1])


def matrix_format(mix: str, columns: int) -> str:
    """The format of most matrices; rows that are not a multiple of 256 cannot be Q4_K."""
    if mix == "bf16":
        return "BF16"
    return "Q4_K" if mix == "q4_k_m" and columns % 256 == 0 else "Q4_0"


def more_bits(layer: int, num_layers: int) -> bool:
    """The layers that get more bits in Q4_K_M: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def token_bytes(config: Mapping[str, Any], mix: str) -> float:
    """Bytes of weights read to decode one token, without the embedding's row."""
    share = config["num_experts_per_tok"] / config["num_experts"]
    return sum(
        tensor.nbytes * (share if "_exps." in tensor.name else 1.0)
        for tensor in tensors(config, mix)
        if not tensor.name.startswith("token_embd")
    )


class Filler:
    """Draws the bytes of tensors."""

    def __init__(self, seed: int = 0, pool_bytes: int = POOL_BYTES) -> None:
        self.rng = np.random.default_rng(seed)
        self.pool = self.rng.integers(0, 256, pool_bytes, np.uint8)

    def _bytes(self, count: int, width: int) -> NDArray[np.uint8]:
        """`[count, width]` bytes of the pool, from a random position, wrapping around."""
        start = int(self.rng.integers(len(self.pool)))
        return np.resize(np.roll(self.pool, -start), (count, width))

    def data(self, tensor: GgufTensor) -> Iterator[NDArray[Any]]:
        """The tensor in pieces of moderate size."""
        weights, size = BLOCKS[tensor.format]
        total = int(np.prod(tensor.shape)) // weights
        step = max(1, POOL_BYTES // size)
        for start in range(0, total, step):
            count = min(step, total - start)
            if tensor.format == "F32":
                yield self._floats(count, tensor.fill)
            else:
                yield self._blocks(count, tensor.format)

    def _floats(self, count: int, fill: float | None) -> NDArray[np.float32]:
        if fill is None:
            return self.rng.standard_normal(count, np.float32) * np.float32(STD)
        return np.full(count, fill, np.float32)

    def _blocks(self, count: int, format: str) -> NDArray[np.uint8]:
        """Random codes with equal scales."""
        if format == "BF16":
            values = self.rng.standard_normal(count, np.float32) * np.float32(STD)
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(count, 2)
        if format == "Q4_0":  # scale, 16 bytes of codes 0 to 15 less 8
            return np.hstack((_half(STD / 4.6, count), self._bytes(count, 16)))
        if format == "Q4_K":  # scale, minimum, 8 scales and 8 minima of 32 in 6 bits each, codes 0 to 15
            inner = np.repeat(np.array([160, 0], np.uint8), (8, 4))
            scales = _half(STD / 4.6 / 32, count), _half(7.5 * STD / 4.6 / 32, count)
            return np.hstack((*scales, np.tile(inner, (count, 1)), self._bytes(count, 128)))
        inner = np.full((count, 16), 32, np.uint8)  # Q6_K: codes 0 to 63 less 32, 16 scales of 32, scale
        return np.hstack((self._bytes(count, 192), inner, _half(STD / 18.5 / 32, count)))


def _half(value: float, count: int) -> NDArray[np.uint8]:
    return np.tile(np.array([value], np.float16).view(np.uint8), (count, 1))


def write(config: Mapping[str, Any], out: Path, mix: str, tokenizer: Path | None = None) -> int:
    """Write the file atomically; return its size in bytes.

    Args:
        config: the model's config.
        out: the file.
        mix: one of MIXES.
        tokenizer: a directory with tokenizer.json, tokenizer_config.json and chat_template.jinja.
    """
    gguf: Any = importlib.import_module("gguf")
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "qwen3next")
    _metadata(writer, config, {"q4_0": 2, "q4_k_m": 15, "bf16": 32}[mix])
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config["vocab_size"])
    else:
        _vocabulary(writer, tokenizer, config["vocab_size"])
    listed = tensors(config, mix)
    for tensor in listed:
        if tensor.format == "F32":
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
        else:
            weights, size = BLOCKS[tensor.format]
            shape = (
                *tensor.shape[:-1],
                tensor.shape[-1] // weights * size,
            )  # of bytes, as the package wants it
            kind = getattr(gguf.GGMLQuantizationType, tensor.format)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    filler = Filler()
    with _body(writer) as file:
        for tensor in listed:
            _pad(file)
            for piece in filler.data(tensor):
                piece.tofile(file)
        _pad(file)
    part.replace(out)
    return out.stat().st_size


def _body(writer: Any) -> Any:
    """The open file of a writer whose headers are written."""
    (file,) = writer.fout
    return file


def _pad(file: Any, alignment: int = 32) -> None:
    file.write(bytes(-file.tell() % alignment))


def _metadata(writer: Any, config: Mapping[str, Any], file_type: int) -> None:
    writer.add_name("random weights")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))


def _vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Tokens and merges in llama.cpp's form of GPT-2's, with the pre-tokenizer of Qwen 2."""
    gguf: Any = importlib.import_module("gguf")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {one["content"]: one for one in raw["added_tokens"]}
    ids = {**raw["model"]["vocab"], **{text: one["id"] for text, one in added.items()}}
    tokens = [f"[unused {id}]" for id in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, id in ids.items():
        tokens[id] = text
        types[id] = gguf.TokenType.CONTROL if text in added else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(ids[settings["pad_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="config.json of a qwen3_next model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--mix", choices=MIXES, default="q4_k_m")
    parser.add_argument(
        "--tokenizer", type=Path, help="a directory with the tokenizer and chat template to embed"
    )
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    print(f"{write(config, args.out, args.mix, args.tokenizer):,} bytes in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
