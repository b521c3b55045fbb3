"""The engine: sampling, caches, and many requests at a time on top of a model."""

from godwit.engine.cache import CacheSize, HybridCache
from godwit.engine.chat_prompt import ChatRenderer, Prompt
from godwit.engine.engine import Engine, EngineStats, Health
from godwit.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from godwit.engine.stream import Constraint, Event, Finish, GenerationRequest, Piece, Stream
from godwit.engine.thinking import ThinkingRules

__all__ = [
    "CacheSize",
    "ChatRenderer",
    "Constraint",
    "Engine",
    "EngineStats",
    "Event",
    "Finish",
    "GenerationRequest",
    "Health",
    "HybridCache",
    "Piece",
    "Prompt",
    "Sampler",
    "SamplingParams",
    "Stream",
    "ThinkingRules",
    "TokenLogprobs",
]
