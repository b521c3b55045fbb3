"""The engine: sampling, caches and sessions on top of a model."""

from godwit.engine.answer import Answer, Segmenter, ToolCall, opens_thinking, parse_answer, parse_call
from godwit.engine.cache import CacheSize, HybridCache
from godwit.engine.sampling import Sampler, SamplingParams
from godwit.engine.session import Event, Finish, Piece, Prefill, Session

__all__ = [
    "Answer",
    "CacheSize",
    "Event",
    "Finish",
    "HybridCache",
    "Piece",
    "Prefill",
    "Sampler",
    "SamplingParams",
    "Segmenter",
    "Session",
    "ToolCall",
    "opens_thinking",
    "parse_answer",
    "parse_call",
]
