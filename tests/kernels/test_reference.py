"""The reference ops against their definitions and, where it has them, the modules of ``transformers``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.config import RotarySpec
from godwit.kernels import reference

LENGTHS = (1, 63, 64, 65, 130)


def modeling(family: str) -> Any:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def delta_inputs(
    total: int, ratio: int = 2, dk: int = 8, dv: int = 12, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, g, beta of 3 key heads."""
    heads = 3 * ratio
    return [
        torch.randn(total, 3, dk, dtype=dtype),
        torch.randn(total, 3, dk, dtype=dtype),
        torch.randn(total, heads, dv, dtype=dtype),
        -torch.rand(total, heads, dtype=dtype),
        torch.rand(total, heads, dtype=dtype),
    ]


def chunked(
    inputs: Sequence[Tensor], lengths: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = inputs
    return reference.chunk_gated_delta_rule(q, k, v, g, beta, lengths, state)


def stepped(
    inputs: Sequence[Tensor], lengths: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = inputs
    return reference.recurrent_gated_delta_rule(q, k, v, g, beta, lengths, state)[:2]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class TestDeltaRule:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_chunks_equal_the_recurrence(self, length: int) -> None:
        inputs = delta_inputs(length)
        state = torch.randn(1, 6, 8, 12, dtype=torch.float64)
        fast, fast_final = chunked(inputs, [length], state)
        slow, slow_final = stepped(inputs, [length], state)
        assert fast.dtype == slow.dtype == torch.float64
        assert relative(fast, slow) < 1e-10
        assert relative(fast_final, slow_final) < 1e-10

    @pytest.mark.parametrize("ratio", [1, 3])
    def test_packed_sequences_do_not_touch(self, ratio: int) -> None:
        lengths = [130, 1, 64, 63, 65]
        inputs = delta_inputs(sum(lengths), ratio)
        states = torch.randn(5, 3 * ratio, 8, 12, dtype=torch.float64)
        for packed in (
            chunked(inputs, lengths, states),
            stepped(inputs, lengths, states),
        ):
            for index, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
                alone, final = stepped(
                    [x[start:end] for x in inputs], [end - start], states[index : index + 1]
                )
                assert relative(packed[0][start:end], alone) < 1e-10
                assert relative(packed[1][index], final[0]) < 1e-10

    def test_a_sequence_cut_anywhere_goes_on_as_if_whole(self) -> None:
        inputs = delta_inputs(130)
        whole, final = chunked(inputs, [130])
        state, parts = None, []
        for start, end in pairwise((0, 1, 64, 127, 130)):
            out, state = chunked([x[start:end] for x in inputs], [end - start], state)
            parts.append(out)
        assert state is not None
        assert relative(torch.cat(parts), whole) < 1e-10
        assert relative(state, final) < 1e-10

    def test_by_hand(self) -> None:
        """Two steps, Dk = 2, Dv = 1: q and k are unit vectors, every decay is a half."""
        q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
        k = torch.tensor([[[0.6, 0.8]], [[1.0, 0.0]]], dtype=torch.float64)
        v = torch.tensor([[[2.0]], [[1.0]]], dtype=torch.float64)
        g = torch.full((2, 1), math.log(0.5), dtype=torch.float64)
        beta = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
        out, final, delta = reference.recurrent_gated_delta_rule(q, k, v, g, beta, [2])
        # 1e-6 is added to squared norms, which moves these numbers in the sixth digit
        assert delta.flatten().tolist() == pytest.approx([1.0, 0.7], abs=3e-6)
        assert out.flatten().tolist() == pytest.approx([0.6 / 2**0.5, 0.4 / 2**0.5], abs=3e-6)
        assert final.flatten().tolist() == pytest.approx([1.0, 0.4], abs=3e-6)

    def test_replay_is_bitwise_the_recurrence(self) -> None:
        q, k, v, g, beta = delta_inputs(9, dtype=torch.float32)
        state = torch.randn(1, 6, 8, 12)
        _, final, delta = reference.recurrent_gated_delta_rule(q, k, v, g, beta, [9], state)
        keys = reference.l2_normalize(k).repeat_interleave(2, 1)
        assert torch.equal(reference.replay_delta_rule(state[0], g, keys, delta), final[0])

    def test_no_tokens(self) -> None:
        inputs = delta_inputs(3, dtype=torch.float32)
        state = torch.randn(2, 6, 8, 12)
        for rule in (chunked, stepped):
            out, final = rule(inputs, [0, 3], state)
            assert out.shape == (3, 6, 12) and torch.equal(final[0], state[0])
            out, final = rule([x[:0] for x in inputs], [0], state[:1])
            assert out.shape == (0, 6, 12) and torch.equal(final, state[:1])

    @pytest.mark.parametrize("length", LENGTHS)
    def test_as_transformers(self, length: int) -> None:
        theirs = modeling("qwen3_next")
        inputs = delta_inputs(length, dtype=torch.float32)
        state = torch.randn(1, 6, 8, 12)
        expected, expected_final = theirs.torch_chunk_gated_delta_rule(
            *(x[None] for x in inputs),
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        out, final = chunked(inputs, [length], state)
        assert relative(out, expected[0]) < 1e-5
        assert relative(final, expected_final) < 1e-5


class TestConvolution:
    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_cut_sequences_with_history(self, width: int) -> None:
        x, weight = (
            torch.randn(40, 32),
            torch.randn(32, width),
        )  # whole vectors: SiLU rounds a remainder otherwise
        whole, end = reference.causal_conv1d(x, weight, [40])
        history, parts = None, []
        for start, stop in pairwise((0, 1, 2, 20, 40)):
            out, history = reference.causal_conv1d(x[start:stop], weight, [stop - start], history)
            parts.append(out)
        assert history is not None
        assert torch.equal(torch.cat(parts), whole) and torch.equal(history, end)
        assert torch.equal(end[0], x[40 - (width - 1) :])

    def test_definition(self) -> None:
        x, weight = torch.randn(5, 1), torch.tensor([[2.0, 3.0, 5.0]])
        padded = torch.cat((torch.zeros(2, 1), x))
        expected = F.silu(2 * padded[:-2] + 3 * padded[1:-1] + 5 * padded[2:])
        torch.testing.assert_close(reference.causal_conv1d(x, weight, [5])[0], expected)

    def test_bfloat16_sums_in_float32_and_rounds_once(self) -> None:
        x, weight = torch.randn(50, 6).bfloat16(), torch.randn(6, 4).bfloat16()
        padded = F.pad(x.double(), (0, 0, 3, 0)).t()[None]
        exact = F.conv1d(padded, weight.double()[:, None], groups=6)[0].t()
        out, _ = reference.causal_conv1d(x, weight, [50])
        expected = F.silu(exact.bfloat16())
        # a float32 sum may fall on the other side of a rounding border than the exact one: one bfloat16 step
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
        assert float((out == expected).float().mean()) > 0.99


class TestNorms:
    """The published rounding order, bit for bit."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_zero_centered(self, dtype: torch.dtype) -> None:
        module = modeling("qwen3_next").Qwen3NextRMSNorm(48, eps=1e-6).to(dtype)
        module.weight.data = torch.randn(48).to(dtype)
        x = (torch.randn(99, 48) * 3).to(dtype)
        assert torch.equal(reference.rms_norm(x, module.weight, 1e-6, zero_centered=True), module(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
    def test_plain(self, family: str, dtype: torch.dtype) -> None:
        theirs = modeling(family)
        name = {"llama": "LlamaRMSNorm", "qwen3": "Qwen3RMSNorm", "mixtral": "MixtralRMSNorm"}[family]
        module = getattr(theirs, name)(48, eps=1e-5).to(dtype)
        module.weight.data = torch.randn(48).to(dtype)
        x = (torch.randn(99, 48) * 3).to(dtype)
        assert torch.equal(reference.rms_norm(x, module.weight, 1e-5, zero_centered=False), module(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gated(self, dtype: torch.dtype) -> None:
        module = modeling("qwen3_next").Qwen3NextRMSNormGated(20, eps=1e-6).to(dtype)
        module.weight.data = torch.randn(20).to(dtype)
        x, gate = torch.randn(99, 6, 20).to(dtype), (torch.randn(99, 6, 20) * 2).to(dtype)
        assert torch.equal(reference.rms_norm_gated(x, gate, module.weight, 1e-6), module(x, gate))

    def test_the_kinds_differ_in_bfloat16(self) -> None:
        x, weight = torch.randn(99, 48).bfloat16(), torch.randn(48).bfloat16()
        plain = reference.rms_norm(x, 1 + weight, 1e-6, zero_centered=False)
        assert not torch.equal(reference.rms_norm(x, weight, 1e-6, zero_centered=True), plain)


def test_gates_round_where_published() -> None:
    a, b = (torch.randn(50, 6).bfloat16() * 9 for _ in range(2))
    a_log, dt_bias = torch.randn(6).bfloat16(), torch.randn(6).bfloat16()
    g, beta = reference.gdn_gates(a, b, a_log, dt_bias)
    assert g.dtype == beta.dtype == torch.float32
    assert torch.equal(beta, b.sigmoid().float())
    assert torch.equal(g, -a_log.float().exp() * F.softplus(a.float() + dt_bias))
    assert bool((g <= 0).all())


ROTARY = {
    "default": (RotarySpec(64, 1e7), {"rope_type": "default", "rope_theta": 1e7}),
    "linear": (
        RotarySpec(64, 1e4, "linear", 4.0),
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "yarn": (
        RotarySpec(64, 1e7, "yarn", 4.0, 262144, attention_factor=0.1 * math.log(4.0) + 1.0),
        {
            "rope_type": "yarn",
            "rope_theta": 1e7,
            "factor": 4.0,
            "original_max_position_embeddings": 262144,
        },
    ),
    "yarn, every switch": (
        RotarySpec(
            64, 1e6, "yarn", 3.0, 4096, beta_fast=16, beta_slow=2, attention_factor=1.5, truncate=False
        ),
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 3.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.5,
            "truncate": False,
        },
    ),
    "llama3": (
        RotarySpec(64, 5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


class TestRotary:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ROTARY)
    def test_bitwise_as_transformers(self, name: str, dtype: torch.dtype) -> None:
        """Far out an angle in float32 is off by 1e-2; both sides must be off by the same."""
        theirs = modeling("llama")
        spec, params = ROTARY[name]
        config = importlib.import_module("transformers").LlamaConfig(
            hidden_size=128, num_attention_heads=2, max_position_embeddings=262144, rope_parameters=params
        )
        module = theirs.LlamaRotaryEmbedding(config)
        positions = torch.tensor([0, 1, 2, 63, 4097, 262143])
        cos, sin = module(torch.zeros(1, dtype=dtype), positions[None])
        frequencies = reference.rotary_frequencies(spec)
        assert torch.equal(frequencies, module.inv_freq)
        ours = reference.rotary_cos_sin(positions, frequencies, spec.attention_factor, dtype)
        assert torch.equal(ours[0], cos[0, :, :32]) and torch.equal(ours[1], sin[0, :, :32])
        q, k = torch.randn(6, 3, 64).to(dtype), torch.randn(6, 1, 64).to(dtype)
        turned = theirs.apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
        for x, expected in zip((q, k), turned, strict=True):
            assert torch.equal(reference.apply_rotary_emb(x, *ours), expected[0].transpose(0, 1))

    def test_angles_are_float32_products(self) -> None:
        positions = torch.tensor([0, 1, 262143])
        frequencies = reference.rotary_frequencies(RotarySpec(64, 1e7))
        cos, sin = reference.rotary_cos_sin(positions, frequencies, 1.0, torch.float32)
        for row, position in enumerate(positions.tolist()):
            angle = torch.tensor(float(position)) * frequencies
            assert torch.equal(cos[row], angle.cos()) and torch.equal(sin[row], angle.sin())
        assert torch.equal(cos[0], torch.ones(32)) and torch.equal(sin[0], torch.zeros(32))
        exact = (frequencies.double() * 262143).cos()
        assert float((cos[2] - exact).abs().max()) > 1e-3  # float64 angles would be other numbers

    def test_only_the_first_dimensions_turn_in_halves(self) -> None:
        x = torch.randn(2, 3, 10)
        cos, sin = torch.zeros(2, 2), torch.ones(2, 2)  # a quarter turn
        turned = reference.apply_rotary_emb(x, cos, sin)
        assert torch.equal(turned[..., :2], -x[..., 2:4]) and torch.equal(turned[..., 2:4], x[..., :2])
        assert torch.equal(turned[..., 4:], x[..., 4:])


class TestRouter:
    def test_weights_and_order(self) -> None:
        logits = torch.randn(40, 9)
        weights, ids = reference.topk_softmax(logits, 4, renormalize=False)
        probs = logits.softmax(-1)
        assert torch.equal(ids, logits.topk(4).indices)
        assert torch.equal(weights, probs.gather(1, ids))
        scaled, _ = reference.topk_softmax(logits, 4, renormalize=True)
        torch.testing.assert_close(scaled, logits.gather(1, ids).softmax(-1))

    def test_bfloat16_logits_are_weighed_in_float32(self) -> None:
        logits = torch.randn(40, 9).bfloat16()
        weights, _ = reference.topk_softmax(logits, 9, renormalize=True)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(40))


class TestExperts:
    @staticmethod
    def definition(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for slot in range(ids.shape[1]):
                gate, up = (w13[ids[token, slot]] @ x[token]).chunk(2)
                out[token] += weights[token, slot] * (w2[ids[token, slot]] @ (F.silu(gate) * up))
        return out

    @pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
    def test_definition(self, num_tokens: int) -> None:
        x = torch.randn(num_tokens, 10)
        w13, w2 = torch.randn(7, 12, 10), torch.randn(7, 10, 6)
        logits = torch.randn(num_tokens, 7)
        logits[:, (1, 6)] = -50.0  # experts nobody asks
        weights, ids = reference.topk_softmax(logits, 3, renormalize=True)
        out = reference.moe_experts(x, weights, ids, w13, w2)
        torch.testing.assert_close(out, self.definition(x, weights, ids, w13, w2), rtol=1e-4, atol=1e-4)

    def test_idle_experts_may_hold_anything(self) -> None:
        w13, w2 = torch.full((3, 4, 2), math.nan), torch.full((3, 2, 2), math.nan)
        w13[1], w2[1] = 1.0, 1.0
        out = reference.moe_experts(
            torch.ones(4, 2), torch.ones(4, 1), torch.ones(4, 1, dtype=torch.long), w13, w2
        )
        assert bool(out.isfinite().all())

    def test_results_of_a_token_are_summed_in_float32(self) -> None:
        """256 + 1 + ... + 1 in bfloat16 would stay 256."""
        k = 9
        w13 = torch.ones(k, 2, 1).bfloat16()
        unit = F.silu(torch.ones(1).bfloat16())
        w2 = torch.ones(k, 1, 1).bfloat16() / unit
        weights = torch.tensor([[256.0] + [1.0] * (k - 1)]).bfloat16()
        out = reference.moe_experts(torch.ones(1, 1).bfloat16(), weights, torch.arange(k)[None], w13, w2)
        assert float(out) == 264.0

    def test_float32_weights_are_not_rounded(self) -> None:
        """Mixtral multiplies by the router's float32 weights even where activations are bfloat16."""
        x, weight = torch.ones(1, 1).bfloat16(), 1.0 + 3 * 2.0**-9
        w13, w2 = torch.full((1, 2, 1), 4.0).bfloat16(), torch.ones(1, 1, 1).bfloat16()
        ids = torch.zeros(1, 1, dtype=torch.long)
        for factor in range(1, 200):
            w2[0, 0, 0] = factor
            plain = reference.swiglu(x, w13[0], w2[0])
            out = reference.moe_experts(x, torch.tensor([[weight]]), ids, w13, w2)
            assert torch.equal(out, (plain.float() * weight).bfloat16())


class TestPagedKV:
    def test_stores_and_gathers_across_scattered_blocks(self) -> None:
        cache = torch.full((6, 4, 2, 3), math.nan)
        table, new = torch.tensor([5, 0, 3]), torch.randn(10, 2, 3)
        slots = torch.tensor([int(table[i // 4]) * 4 + i % 4 for i in range(10)])
        reference.store_kv(cache, new, slots)
        for length in (0, 1, 4, 5, 10):
            assert torch.equal(reference.gather_kv(cache, table, length), new[:length])
        assert bool(cache[[1, 2, 4]].isnan().all()) and bool(cache[3, 2:].isnan().all())


def test_recurrences_ignore_autocast() -> None:
    inputs = delta_inputs(70, dtype=torch.float32)
    for rule in (chunked, stepped):
        expected, _ = rule(inputs, [70])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rule(inputs, [70])[0], expected)
