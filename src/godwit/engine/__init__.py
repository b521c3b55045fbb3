"""The engine: sampling, caches, sessions, and many requests at a time on top of a model."""

from godwit.engine.answer import Answer, Segmenter, ToolCall, opens_thinking, parse_answer, parse_call
from godwit.engine.cache import CacheSize, HybridCache
from godwit.engine.engine import Engine, EngineStats, Health
from godwit.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from godwit.engine.session import Event, Finish, Piece, Prefill, Session
from godwit.engine.stream import Constraint, GenerationRequest, Stream
from godwit.engine.thinking import ThinkingRules

__all__ = [
    "Answer",
    "CacheSize",
    "Constraint",
    "Engine",
    "EngineStats",
    "Event",
    "Finish",
    "GenerationRequest",
    "Health",
    "HybridCache",
    "Piece",
    "Prefill",
    "Sampler",
    "SamplingParams",
    "Segmenter",
    "Session",
    "Stream",
    "ThinkingRules",
    "TokenLogprobs",
    "ToolCall",
    "opens_thinking",
    "parse_answer",
    "parse_call",
]
