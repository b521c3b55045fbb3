"""One answer by itself, token by token on caches of its own: what the engine has to agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from godwit.engine import HybridCache, Sampler, SamplingParams, ThinkingRules
from godwit.engine.cache import num_blocks
from godwit.engine.ending import Ending
from godwit.engine.stop_matcher import StopMatcher
from godwit.engine.thinking import ThinkingEnd, ThinkingGuide, shown
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer


class Steps:
    """A text that grows, and the logits ``[V]`` after it."""

    def __init__(self, model: CausalLM, max_tokens: int) -> None:
        self.model = model
        self.cache = HybridCache(model, num_blocks(max_tokens))
        self.seq = self.cache.add_sequence()

    def read(self, ids: Sequence[int]) -> Tensor:
        self.cache.extend(self.seq, len(ids))
        batch = self.cache.batch({self.seq: ids})
        with torch.inference_mode():
            hidden = self.model(batch, self.cache.caches)
            return self.model.compute_logits(hidden, batch.last_rows)[0]


@dataclass
class AloneAnswer:
    """What came; the attributes are those of a ``Finish``."""

    seed: int
    pieces: list[str] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    reason: str = "length"
    stop: str | None = None
    thinking_tokens: int = 0
    thinking_ended: ThinkingEnd | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def answer_alone(
    model: CausalLM,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    max_context: int = 256,
    thinking: ThinkingRules | None = None,
) -> AloneAnswer:
    """The answer to a prompt that leaves room for one."""
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    room = max_context - len(ids)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    sampler, ending = Sampler(params, vocab_size, ids), Ending(params, tokenizer.stop_ids, vocab_size)
    decoder, matcher = tokenizer.stream(), StopMatcher(params.stop)
    guide = None if thinking is None else ThinkingGuide(thinking, tokenizer, limit)
    steps, made, answer = Steps(model, max_context), list[int](), AloneAnswer(sampler.seed)
    logits = steps.read(ids)

    def sample() -> int:
        return sampler.sample(logits, ending.allowed(len(made), None))

    while len(made) < limit:
        if made:
            logits = steps.read(made[-1:])
        token = sample() if guide is None else guide.choose(sample)
        sampler.record(token)
        made.append(token)
        if ending.ends(token):
            answer.reason = "stop"
            if guide is not None:
                guide.stop()
            break
        looked_for = None if ending.too_early(len(made)) else matcher
        text = shown(guide, looked_for, decoder.push(token), complete=decoder.complete)
        answer.pieces += [text] if text else []
        if matcher.matched is not None:
            answer.reason = "stop"
            break
    rest = matcher.push(decoder.flush()) + matcher.flush()
    answer.pieces += [rest] if rest else []
    answer.token_ids, answer.stop = tuple(made), matcher.matched
    if guide is not None:
        answer.thinking_tokens, answer.thinking_ended = guide.num_tokens, guide.ended
    return answer


def logits_after(model: CausalLM, ids: Sequence[int]) -> Tensor:
    """Scores ``[V]`` of the token after a text, read in one go."""
    return Steps(model, len(ids)).read(ids)
