"""What a server is told when it starts: names, limits, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from godwit.server.thinking import ThinkingSettings

MIN_BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; checked before any work is done for it.

    Attributes:
        body_bytes: of the request's body.
        body_seconds: until the whole body has to be there.
        head_bytes, head_seconds: of the request line and the headers, and until they have to be there.
        depth: how deeply its JSON may be nested.
        messages, tools: in a conversation.
        choices: answers to one request, all prompts together.
        active: answers under way in the whole server; more are refused with 503.
        connections: open at a time.
    """

    body_bytes: int = MIN_BODY_BYTES
    body_seconds: float = 60.0
    head_bytes: int = 16 << 10
    head_seconds: float = 20.0
    depth: int = 64
    messages: int = 4096
    tools: int = 256
    choices: int = 16
    active: int = 512
    connections: int = 1024

    @staticmethod
    def of(context: int) -> Limits:
        """Limits for a model that reads this many tokens."""
        return Limits(body_bytes=max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * context))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server presents itself and its model.

    Attributes:
        names: of the model; one may hold ``*`` and stands for all that it fits. The first that does not is
            shown.
        sampling: arguments of SamplingParams for what a request leaves open.
        thinking: likewise of thinking.
        keys: whoever sends one of these may use the server; none: everyone.
        origins: web pages that may use it besides its own.
        refuse_media: images, sounds and files in a conversation are refused; otherwise a line of text that
            says so takes their place.
        loopback: it listens on this machine only, and so is addressed by one of the machine's own names.
        keep_alive: a stream that is silent for so many seconds says that it is still there.
        drain_seconds: how long answers under way may go on when the server is to end.
    """

    names: tuple[str, ...] = ("godwit",)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: ThinkingSettings = field(default_factory=ThinkingSettings)
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    refuse_media: bool = False
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
    keep_alive: float = 15.0
    drain_seconds: float = 30.0

    @property
    def name(self) -> str:
        return next((name for name in self.names if "*" not in name), "godwit")

    def knows(self, model: str) -> bool:
        """Whether a request may call the model so."""
        return any(fnmatchcase(model, name) for name in self.names)
