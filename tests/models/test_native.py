"""Packed models on the native kernels: close to PyTorch's, and the same bits however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from godwit import _native
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.generate import generate
from godwit.models.native import Rounding, _assign_all, count_parameters, formats, pack_model
from godwit.qtensor import FORMATS, QuantExperts, QuantTensor
from tests.models.families import FAMILIES, Family
from tests.models.harness import CachedRun, randomize, tokens

#: Root mean square of rounding to bfloat16 (keys, values, queries and probabilities), and of rounding inputs
#: to eight bits by groups of 32; a layer has four products one after the other, and the delta rule's norm may
#: double what reaches it.
ROUNDING = {"bf16": 2.0**-9, "q8": 0.013, "q4": 0.013}


@pytest.fixture(autouse=True)
def _widest() -> Iterator[None]:
    before = _native.instruction_set()
    yield
    _native.set_instruction_set(before)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def model(request: pytest.FixtureRequest) -> CausalLM:
    family: Family = request.param
    raw = {"model_type": family.model_type, **family.fields}
    made = CausalLM(ModelConfig.from_dict(raw)).requires_grad_(False)
    randomize(made)
    return made


def unpacked(packed: CausalLM) -> CausalLM:
    """The same weights as plain parameters."""
    plain = CausalLM(packed.config, int(packed.mtp is not None)).requires_grad_(False)
    into = dict(plain.named_parameters())
    for name, param in packed.named_parameters():
        into[name].copy_(param)
    for name, module in packed.named_modules():
        weight, stack = vars(module).get("weight"), getattr(module, "packed", None)
        if isinstance(weight, QuantTensor):
            into[f"{name}.weight"].copy_(weight.dequantize())
        if isinstance(stack, QuantExperts):
            for index in range(stack.num_experts):
                w13, w2 = stack.expert(index)
                into[f"{name}.w13"][index].copy_(w13.dequantize())
                into[f"{name}.w2"][index].copy_(w2.dequantize())
    return plain


def logits(model: CausalLM, lengths: list[int]) -> Tensor:
    batch = ForwardBatch.packed(torch.tensor(tokens(sum(lengths))), lengths)
    return model.compute_logits(model(batch))


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_those_of_pytorch(model: CausalLM, format: str) -> None:
    packed = pack_model(model, format)
    wanted, got = logits(unpacked(packed), [50, 1, 17]), logits(packed, [50, 1, 17])
    # One token may rightly choose another expert where two are as good as equal: the median tells.
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.median()) < 8 * ROUNDING[format] * len(model.layers) ** 0.5
    assert float(errors.median()) > 0


@pytest.mark.parametrize("instruction_set", _native.available_instruction_sets())
@pytest.mark.parametrize("format", FORMATS)
def test_cuts_and_company_change_no_bit(model: CausalLM, format: str, instruction_set: str) -> None:
    _native.set_instruction_set(instruction_set)
    packed, ids = pack_model(model, format), tokens(40)
    whole = CachedRun(packed).step(ids)
    run = CachedRun(packed)
    assert torch.equal(
        torch.cat([run.step(ids[a:b]) for a, b in ((0, 1), (1, 22), (22, 24), (24, 40))]), whole
    )
    batch = ForwardBatch.packed(torch.tensor([*tokens(9, seed=5), *ids, 3]), [9, 40, 1])
    assert torch.equal(packed(batch)[9:49], whole)


def test_threads_change_no_bit(model: CausalLM) -> None:
    packed, before = pack_model(model, "q4"), _native.num_threads()
    seen = []
    try:
        for count in (1, 2, 5):
            _native.set_num_threads(count)
            seen.append(logits(packed, [30, 20]))
    finally:
        _native.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_router_logits_and_mtp(model: CausalLM) -> None:
    packed = pack_model(model, "bf16")
    plain = unpacked(packed)
    ids = torch.tensor(tokens(33))
    batch = ForwardBatch.packed(ids, [33])
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    hidden, wanted = packed(batch, router_logits=ours), plain(batch, router_logits=theirs)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    for a, b in zip(ours[:1], theirs[:1], strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05
    if packed.mtp is not None:
        deeper = packed.forward_mtp(wanted, ids.roll(-1), batch)
        expected = plain.forward_mtp(wanted, ids.roll(-1), batch)
        assert float((deeper - expected).norm(dim=-1).median() / expected.norm(dim=-1).median()) < 0.05
    assert hidden.shape == wanted.shape


def test_naive_generation_is_cached_generation(model: CausalLM) -> None:
    packed = pack_model(model, "q8")
    made = generate(packed, tokens(12), max_tokens=6)
    run, cached = CachedRun(packed), list[int]()
    step = run.logits(tokens(12))
    while len(cached) < 6:
        token = int(step[-1].argmax())
        cached.append(token)
        step = run.logits([token])
    assert made == cached


def test_counts_and_formats(model: CausalLM) -> None:
    total = sum(param.numel() for param in model.parameters())
    packed = pack_model(model, "q4")
    assert count_parameters(packed) == count_parameters(model) == total
    assert formats(packed)[0] == "q4" and formats(model) == []


def rounding_to_bf16(model: CausalLM) -> Rounding:
    """Of all matrices that packing as bf16 would change the dtype of."""
    found = Rounding()
    for name, param in model.named_parameters():
        packs = param.dim() == 3 or (param.dim() == 2 and name.endswith(".weight"))
        if packs and not name.endswith("shared_gate.weight") and param.dtype != torch.bfloat16:
            for matrix in param if param.dim() == 3 else (param,):
                own = Rounding()
                own.add(matrix)
                found.merge(own)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_bf16_holds_lose_nothing(model: CausalLM, dtype: torch.dtype) -> None:
    """Of other dtypes, and made of bf16 ones: the same bits as from these, and counted as exact."""
    rounded = model.bfloat16()
    wanted = logits(pack_model(rounded, "bf16"), [20])
    other = rounded.to(dtype)
    rounding = rounding_to_bf16(other)
    assert rounding.matrices == rounding.exact > 4 and rounding.error == 0.0
    assert rounding.dtypes == {str(dtype).removeprefix("torch.")}
    packed = pack_model(other, "bf16")
    for name, module in other.named_modules():
        weight = vars(packed.get_submodule(name)).get("weight")
        if isinstance(weight, QuantTensor):
            assert torch.equal(weight.dequantize(), module.get_parameter("weight").float())
    assert float((logits(packed, [20]) - wanted).norm() / wanted.norm()) < 0.01


def test_rounding_is_measured(model: CausalLM) -> None:
    exact = {"embedding.weight"}
    model.embedding.weight.copy_(model.embedding.weight.bfloat16())
    rounding = rounding_to_bf16(model)
    assert rounding.exact == len(exact) < rounding.matrices
    assert 2.0**-11 < rounding.error < 2.0**-9  # half a unit in the last of eight bits at most
    assert rounding_to_bf16(model.bfloat16()).matrices == 0


def test_tensors_that_do_not_fit_are_all_named() -> None:
    family = FAMILIES[0]
    config = ModelConfig.from_dict({"model_type": family.model_type, **family.fields})
    with torch.device("meta"):
        made = CausalLM(config, 0)
    values = [("norm.weight", torch.zeros(3)), ("nothing", torch.zeros(1))]
    with pytest.raises(CheckpointError) as error:
        _assign_all(made, values, "here")
    for part in ("norm.weight is (3,), not", "nothing is not expected", "layers.0.ffn.experts is missing"):
        assert part in str(error.value)
