"""The multi-token-prediction module, which ``transformers`` does not run: invariants, an independent form."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import export_tensors
from tests.models.families import BY_NAME
from tests.models.harness import CachedRun, error, packed_logits, randomize, tokens

FIELDS = BY_NAME["qwen3_next"].fields
HEADS, KV_HEADS, HEAD_DIM, ROTATED = 6, 2, 24, 6
NUM_EXPERTS, TOP_K = 7, 3
PROMPT = tokens(40, seed=9)


@pytest.fixture
def model() -> CausalLM:
    config = ModelConfig.from_dict({"model_type": "qwen3_next", **FIELDS})
    made = CausalLM(config, num_mtp=1).requires_grad_(False)
    randomize(made)
    return made


def slots(model: CausalLM, ids: list[int]) -> Tensor:
    """MTP states of slots 0 .. len(ids) - 2."""
    hidden = model(ForwardBatch.packed(torch.tensor(ids), [len(ids)]))
    batch = ForwardBatch.packed(torch.tensor(ids[1:]), [len(ids) - 1])
    return model.forward_mtp(hidden[:-1], torch.tensor(ids[1:]), batch)


class Independent:
    """The module from published tensor names, written out slot by slot, in float64."""

    def __init__(self, model: CausalLM) -> None:
        self.w = {name: tensor.double() for name, tensor in export_tensors(model)}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.w[name])

    def rotate(self, x: Tensor, position: int) -> Tensor:
        out = x.clone()
        half = ROTATED // 2
        for i in range(half):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / ROTATED), dtype=torch.float64)
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * angle.cos() - b * angle.sin()
            out[..., i + half] = b * angle.cos() + a * angle.sin()
        return out

    def attend(self, x: Tensor) -> Tensor:
        base = "mtp.layers.0.self_attn."
        rows = []
        packed = (x @ self.w[base + "q_proj.weight"].T).view(-1, HEADS, 2, HEAD_DIM)
        queries, gates = packed[:, :, 0], packed[:, :, 1]
        keys = (x @ self.w[base + "k_proj.weight"].T).view(-1, KV_HEADS, HEAD_DIM)
        values = (x @ self.w[base + "v_proj.weight"].T).view(-1, KV_HEADS, HEAD_DIM)
        keys = self.norm(keys, base + "k_norm.weight")
        turned = torch.stack([self.rotate(key, position) for position, key in enumerate(keys)])
        for position in range(len(x)):
            query = self.rotate(self.norm(queries[position], base + "q_norm.weight"), position)
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = turned[: position + 1, group] @ query[head] / HEAD_DIM**0.5
                mixed = scores.softmax(0) @ values[: position + 1, group]
                heads.append(mixed * gates[position, head].sigmoid())
            rows.append(self.w[base + "o_proj.weight"] @ torch.cat(heads))
        return torch.stack(rows)

    def expert(self, x: Tensor, name: str) -> Tensor:
        base = f"mtp.layers.0.mlp.{name}."
        gate, up = (x @ self.w[base + part + "_proj.weight"].T for part in ("gate", "up"))
        out: Tensor = (F.silu(gate) * up) @ self.w[base + "down_proj.weight"].T
        return out

    def moe(self, x: Tensor) -> Tensor:
        probs = (x @ self.w["mtp.layers.0.mlp.gate.weight"].T).softmax(-1)
        chosen = probs >= probs.sort(descending=True).values[:, TOP_K - 1 : TOP_K]
        weights = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
        routed = sum(weights[:, e : e + 1] * self.expert(x, f"experts.{e}") for e in range(NUM_EXPERTS))
        share = (x @ self.w["mtp.layers.0.mlp.shared_expert_gate.weight"].T).sigmoid()
        return routed + share * self.expert(x, "shared_expert")

    def __call__(self, hidden: Tensor, next_ids: list[int]) -> Tensor:
        embedded = self.w["model.embed_tokens.weight"][next_ids]
        joined = torch.cat(
            (
                self.norm(embedded, "mtp.pre_fc_norm_embedding.weight"),
                self.norm(hidden, "mtp.pre_fc_norm_hidden.weight"),
            ),
            -1,
        )
        x = joined @ self.w["mtp.fc.weight"].T
        x = x + self.attend(self.norm(x, "mtp.layers.0.input_layernorm.weight"))
        x = x + self.moe(self.norm(x, "mtp.layers.0.post_attention_layernorm.weight"))
        return self.norm(x, "mtp.norm.weight")


def test_independent_form(model: CausalLM) -> None:
    hidden = model(ForwardBatch.packed(torch.tensor(PROMPT), [len(PROMPT)]))[:-1]
    expected = Independent(model)(hidden.double(), PROMPT[1:])
    assert error(slots(model, PROMPT), expected) < 1e-5


def test_a_slot_sees_the_next_token_and_no_further(model: CausalLM) -> None:
    slot = 10
    before = slots(model, PROMPT)
    changed = list(PROMPT)
    changed[slot + 2] = (changed[slot + 2] + 1) % 100
    after = slots(model, changed)
    assert torch.equal(after[: slot + 1], before[: slot + 1])
    assert not torch.allclose(after[slot + 1], before[slot + 1])
    assert not torch.allclose(after[-1], before[-1])


@pytest.mark.parametrize("cuts", [(0, 39), (0, 1, 2, 17, 18, 39), tuple(range(40))])
def test_with_caches_as_without(model: CausalLM, cuts: tuple[int, ...]) -> None:
    run = CachedRun(model)
    hidden = run.step(PROMPT)
    parts = [run.mtp(hidden[a:b], PROMPT[a + 1 : b + 1], a) for a, b in pairwise(cuts)]
    assert error(torch.cat(parts), slots(model, PROMPT)) < 1e-5


def test_only_distances_between_positions_matter(model: CausalLM) -> None:
    """Implementations number slots from 0 or from 1."""
    hidden = model(ForwardBatch.packed(torch.tensor(PROMPT), [len(PROMPT)]))[:-1]
    next_ids = torch.tensor(PROMPT[1:])
    batch = ForwardBatch.packed(next_ids, [len(PROMPT) - 1])
    for offset in (1, 100):
        moved = dataclasses.replace(batch, positions=batch.positions + offset)
        assert error(model.forward_mtp(hidden, next_ids, moved), slots(model, PROMPT)) < 1e-4


def test_packed_sequences_do_not_touch(model: CausalLM) -> None:
    both = [PROMPT[:15], PROMPT[15:]]
    hidden = model(ForwardBatch.packed(torch.tensor(PROMPT), [len(ids) for ids in both]))
    starts = torch.cat((hidden[:14], hidden[15:-1]))
    next_ids = torch.tensor(both[0][1:] + both[1][1:])
    packed = model.forward_mtp(starts, next_ids, ForwardBatch.packed(next_ids, [14, 24]))
    assert error(packed, torch.cat([slots(model, ids) for ids in both])) < 1e-5


def test_the_trunk_does_not_know_of_it(model: CausalLM) -> None:
    alone = CausalLM(model.config, num_mtp=0).requires_grad_(False)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(packed_logits(alone, [PROMPT]), packed_logits(model, [PROMPT]))
    assert len(alone.cache_specs()) == len(model.cache_specs()) - 1


def test_its_router_joins_the_balance_loss(model: CausalLM) -> None:
    collected: list[Tensor] = []
    ids = torch.tensor(PROMPT)
    batch = ForwardBatch.packed(ids, [len(PROMPT)])
    hidden = model(batch, router_logits=collected)
    model.forward_mtp(hidden, ids, batch, router_logits=collected)
    assert [logits.shape for logits in collected] == [(len(PROMPT), NUM_EXPERTS)] * 5


def test_a_model_without_it_says_so(model: CausalLM) -> None:
    alone = CausalLM(model.config, num_mtp=0)
    ids = torch.tensor(PROMPT)
    batch = ForwardBatch.packed(ids, [len(PROMPT)])
    with pytest.raises(UsageError, match="no MTP module"):
        alone.forward_mtp(torch.zeros(len(PROMPT), model.config.hidden_size), ids, batch)
