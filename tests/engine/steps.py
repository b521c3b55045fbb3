"""An engine's core without its thread, to be driven step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from godwit.engine.cache.disk import DiskCache
from godwit.engine.core import CoreSettings, Drafter, EngineCore
from godwit.engine.generation import Generation
from godwit.engine.sampling import Sampler, SamplingParams
from godwit.engine.scheduler import Sequence
from godwit.engine.stream import Channel, Event, Finish, GenerationRequest, Piece
from godwit.models.causal_lm import CausalLM
from tests.engine.tiny import VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Run:
    """One request in a :class:`Core`, its events collected."""

    def __init__(self, generation: Generation) -> None:
        self.sequence, self.channel = generation.sequence, generation.channel
        self.events: list[Event] = []
        self.channel.listen(self.events.append)

    @property
    def finish(self) -> Finish | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Finish) else None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def made(self) -> list[int]:
        return self.sequence.ids[self.sequence.num_prompt :]


class Core(EngineCore):
    """Runs prompts, and checks the engine's consistency after every step."""

    def __init__(
        self,
        model: CausalLM,
        num_blocks: int = 64,
        num_rows: int = 8,
        drafter: Drafter | None = None,
        disk: DiskCache | None = None,
        **how: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "max_rollback": 0,
            "snapshot_bytes": 1 << 24,
            "chunk_size": 512,
            "step_seconds": 1000.0,
        }
        super().__init__(model, CoreSettings(num_blocks, num_rows, **(defaults | how)), drafter, disk)
        self._numbers = itertools.count()

    def submit(
        self,
        ids: list[int],
        params: SamplingParams | None = None,
        *,
        cuts: tuple[int, ...] = (),
        **request: Any,
    ) -> Run:
        params = params or SamplingParams(temperature=0, max_tokens=10)
        asked = GenerationRequest(tuple(ids), params, **request)
        length = 1000 if params.max_tokens is None else params.max_tokens
        limit = min(len(ids) + length, 16 * self.settings.num_blocks)
        number = next(self._numbers)
        seq = Sequence(number, list(ids), len(ids), limit, asked.salt, asked.priority, list(cuts))
        seq.scored = asked.score_prompt
        sampler = Sampler(params, min(VOCAB, self.model.config.vocab_size), ids)
        generation = Generation(asked, seq, sampler, TOKENIZER, Channel(lambda: None), self.masks)
        self.add(generation)
        return Run(generation)

    def turn(self) -> None:
        super().turn()
        self.check_integrity()

    def run(self, most: int = 2000) -> int:
        """Turns until all is done."""
        return self.run_until(lambda: not self.busy, most)

    def run_until(self, done: Callable[[], bool], most: int = 2000) -> int:
        """Turns until ``done``; how many it took."""
        for count in range(most):
            if done():
                return count
            self.turn()
        raise AssertionError(f"not done after {most} steps")
