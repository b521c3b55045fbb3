"""The same numbers from ``transformers`` and from Godwit, for the parity tests and ``benchmarks/parity.py``.

Both sides compute in float32, ``transformers`` with its plain ("eager") attention and experts. An error is
the largest absolute difference over the largest absolute value of the reference.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from godwit.config import MoeSpec
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import Caches, PagedKV
from godwit.models.causal_lm import CausalLM, cross_entropy
from godwit.models.generate import generate
from godwit.models.loader import load_model, save_model
from godwit.train.losses import load_balancing_loss
from tests.models.families import VOCAB, Family

#: Largest accepted error of float32 logits and losses.
LIMIT = 1e-4
#: Of gradients. Where a delta layer's output is small, above all at a first token, its norm divides by a
#: small number, forward and again backward, and the last bits of both sides grow with it.
GRADIENT_LIMIT = 5e-4
PROMPT_TOKENS = 200
#: The prompt in pieces: single tokens, one chunk of the delta rule and its neighbours, and an arbitrary cut.
CUTS = ((1, 63, 1, 64, 65, 6), (65, 1, 1, 1, 63, 69), (17, 100, 3, 80))
PACKED_LENGTHS = (5, 64, 1, 65, 31)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Pair:
    """One set of weights in both implementations; ``directory`` is what ``transformers`` saved."""

    family: Family
    directory: Path
    reference: Any
    model: CausalLM


def transformers() -> Any:
    """The library, kept quiet."""
    library = importlib.import_module("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def make_pair(family: Family, directory: Path) -> Pair:
    """Random weights, saved by ``transformers`` and loaded by Godwit."""
    reference = build_reference(family)
    randomize(reference)
    reference.save_pretrained(directory)
    return Pair(family, directory, reference, load_model(directory, dtype=torch.float32))


def build_reference(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """The ``transformers`` model of a family."""
    library = transformers()
    config = library.AutoConfig.for_model(family.model_type, **copy.deepcopy(dict(family.fields)))
    kind = "AutoModelForImageTextToText" if "text_config" in family.fields else "AutoModelForCausalLM"
    made = getattr(library, kind).from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    )
    return made.eval()


def load_reference(pair: Pair, directory: Path) -> Any:
    """A saved directory in the ``transformers`` class for text of the family."""
    return (
        transformers()
        .AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )
        .eval()
    )


@torch.no_grad()
def randomize(module: Any, seed: int = 0) -> None:
    """Leave no parameter at a neutral value: matrices keep the scale of their input, the rest wanders."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "conv" in name:
            parameter.copy_(noise * 0.5)
        elif "A_log" in name:  # half-lives from one token to hundreds
            parameter.copy_(noise * 1.5 - 3.0)
        elif parameter.ndim == 1:
            parameter.add_(noise * 0.2)
        elif "embed" in name:  # a tied head reads it too
            parameter.copy_(noise * 0.3)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; infinite where a NaN leaked in."""
    worst = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    return worst if worst == worst else float("inf")


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ordinary ids (the last few of the vocabulary mean images in the wrappers)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 5, (count,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(reference: Any, ids: Sequence[int]) -> Tensor:
    """``[T, V]`` of one whole sequence."""
    logits: Tensor = reference(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits


@torch.no_grad()
def packed_logits(model: CausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    """``[T, V]`` of whole sequences, packed, without caches."""
    flat = torch.tensor([token for ids in sequences for token in ids])
    return model.compute_logits(model(ForwardBatch.packed(flat, [len(ids) for ids in sequences])))


class CachedRun:
    """One sequence through caches whose blocks lie scattered and whose every unwritten number is NaN."""

    def __init__(self, model: CausalLM, capacity: int = 320, max_rollback: int = 0) -> None:
        self.model = model
        num_blocks = -(-capacity // BLOCK_SIZE)
        self.caches = model.allocate_caches(num_blocks + 3, 3, max_rollback)
        poison(self.caches)
        self.row = 1
        self.caches.reset_row(self.row)
        order = torch.randperm(num_blocks + 3, generator=torch.Generator().manual_seed(1))
        self.blocks: list[int] = order[:num_blocks].tolist()
        self.length = 0

    def batch(self, ids: Sequence[int], start: int, tentative: int = 0) -> ForwardBatch:
        return ForwardBatch.cached([ids], [start], [self.blocks], [self.row], [tentative])

    @torch.no_grad()
    def step(self, ids: Sequence[int], tentative: int = 0) -> Tensor:
        """Hidden states ``[T, H]`` of the next tokens."""
        hidden: Tensor = self.model(self.batch(ids, self.length, tentative), self.caches)
        self.length += len(ids)
        return hidden

    def logits(self, ids: Sequence[int], tentative: int = 0) -> Tensor:
        return self.model.compute_logits(self.step(ids, tentative))

    def rollback(self, count: int) -> None:
        self.caches.rollback(self.row, count)
        self.length -= count

    @torch.no_grad()
    def mtp(self, hidden: Tensor, next_ids: Sequence[int], start: int) -> Tensor:
        """MTP states of the slots from ``start`` on."""
        batch = self.batch(next_ids, start)
        return self.model.forward_mtp(hidden, torch.tensor(list(next_ids)), batch, self.caches)


def poison(caches: Caches) -> None:
    """Fill every number of the caches with NaN."""
    for cache in (*caches.layers, *caches.mtp):
        held = (
            (cache.k, cache.v)
            if isinstance(cache, PagedKV)
            else (cache.conv, cache.state, cache.journal_g, cache.journal_k, cache.journal_delta)
        )
        for tensor in held:
            tensor.fill_(float("nan"))


def whole(pair: Pair) -> float:
    """Logits of one prompt."""
    ids = tokens(PROMPT_TOKENS)
    return error(packed_logits(pair.model, [ids]), reference_logits(pair.reference, ids))


def pieces(pair: Pair) -> float:
    """Logits of the prompt fed in pieces through caches."""
    ids = tokens(PROMPT_TOKENS)
    theirs = reference_logits(pair.reference, ids)
    return max(error(torch.cat(list(_in_pieces(pair.model, ids, cuts))), theirs) for cuts in CUTS)


def _in_pieces(model: CausalLM, ids: Sequence[int], cuts: Sequence[int]) -> Iterator[Tensor]:
    run, start = CachedRun(model), 0
    for length in cuts:
        yield run.logits(ids[start : start + length])
        start += length


def packed(pair: Pair) -> float:
    """Logits of sequences of different lengths in one pack, with the reference run on each alone."""
    sequences = [tokens(length, seed=length) for length in PACKED_LENGTHS]
    theirs = torch.cat([reference_logits(pair.reference, ids) for ids in sequences])
    return error(packed_logits(pair.model, sequences), theirs)


@torch.no_grad()
def padded(pair: Pair) -> float:
    """The same, but the reference runs them as one batch padded on the left."""
    sequences = [tokens(length, seed=length) for length in PACKED_LENGTHS]
    longest = max(PACKED_LENGTHS)
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    theirs = pair.reference(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    return error(packed_logits(pair.model, sequences), theirs)


def decoded(pair: Pair) -> float:
    """Logits of greedy steps, one token at a time through the caches of both; infinite if a token differs."""
    prompt = tokens(41, seed=2)
    chosen, theirs = reference_greedy(pair.reference, prompt)
    run = CachedRun(pair.model)
    ours = [run.logits(prompt)[-1]]
    for _ in range(NEW_TOKENS - 1):
        ours.append(run.logits([int(ours[-1].argmax())])[-1])
    same = [int(logits.argmax()) for logits in ours] == chosen == generate_plainly(pair.model, prompt)
    return error(torch.stack(ours), theirs) if same else float("inf")


def reference_greedy(reference: Any, prompt: Sequence[int]) -> tuple[list[int], Tensor]:
    """What ``transformers`` generates greedily, with the logits ``[N, V]`` of each step."""
    ids = torch.tensor([list(prompt)])
    made = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[0, len(prompt) :].tolist(), torch.cat(made.logits)


def generate_plainly(model: CausalLM, prompt: Sequence[int]) -> list[int]:
    """What Godwit generates greedily when it computes everything again at each step."""
    return generate(model, prompt, max_tokens=NEW_TOKENS)


_ROWS, _ROW_TOKENS = 2, 97


def training_loss(model: CausalLM, ids: Tensor) -> Tensor:
    """Next-token loss plus the weighted balance loss of rows ``[R, T]``."""
    router_logits: list[Tensor] = []
    batch = ForwardBatch.packed(ids.flatten(), [ids.shape[1]] * ids.shape[0])
    logits = model.compute_logits(model(batch, router_logits=router_logits))
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    loss = cross_entropy(logits, targets.flatten())
    top_k = [layer.ffn.top_k for layer in model.config.layers if isinstance(layer.ffn, MoeSpec)]
    if router_logits:
        balance = load_balancing_loss(router_logits, top_k[0], pooled=True)
        loss = loss + model.config.router_aux_coef * balance
    return loss


def reference_loss(pair: Pair, ids: Tensor) -> Tensor:
    """The same from ``transformers``."""
    extra = {"output_router_logits": True} if pair.family.is_sparse else {}
    loss: Tensor = pair.reference(input_ids=ids, labels=ids, **extra).loss
    return loss


def _training_ids() -> Tensor:
    return torch.tensor(tokens(_ROWS * _ROW_TOKENS, seed=3)).view(_ROWS, _ROW_TOKENS)


@torch.no_grad()
def loss(pair: Pair) -> float:
    """Training loss, balance loss included."""
    ids = _training_ids()
    return error(training_loss(pair.model, ids), reference_loss(pair, ids))


def gradients(pair: Pair, directory: Path) -> float:
    """Gradients of the training loss, the worst parameter; theirs are saved like weights and loaded."""
    ids = _training_ids()
    ours = copy.deepcopy(pair.model).requires_grad_()
    training_loss(ours, ids).backward()  # type: ignore[no-untyped-call]
    theirs = copy.deepcopy(pair.reference)
    reference_loss(replace(pair, reference=theirs), ids).backward()  # type: ignore[no-untyped-call]
    for parameter in theirs.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = grad
    theirs.save_pretrained(directory)
    expected = dict(load_model(directory, dtype=torch.float32).named_parameters())
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    return max(error(grad, expected[name]) for name, grad in found.items() if grad is not None)


def saved(pair: Pair, directory: Path) -> float:
    """Logits of ``transformers`` before and after Godwit loaded and saved the weights."""
    save_model(pair.model, directory)
    ids = tokens(50)
    return error(
        reference_logits(load_reference(pair, directory), ids), reference_logits(pair.reference, ids)
    )


Case = Callable[[Pair, Path], float]


def _no_directory(case: Callable[[Pair], float]) -> Case:
    return lambda pair, directory: case(pair)


def limit(case: str) -> float:
    """Largest accepted error of a case."""
    return GRADIENT_LIMIT if case == "gradients" else LIMIT


#: Name of a case -> its error, given a pair and an unused directory.
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "whole": _no_directory(whole),
        "pieces": _no_directory(pieces),
        "packed": _no_directory(packed),
        "padded": _no_directory(padded),
        "decoded": _no_directory(decoded),
        "loss": _no_directory(loss),
        "gradients": gradients,
        "saved": saved,
    }
)
