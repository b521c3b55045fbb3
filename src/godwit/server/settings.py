"""What a server is told when it starts: names, limits, defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any

from godwit.server.keys import Key
from godwit.server.thinking import ThinkingSettings

MIN_BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 32
#: Of its JSON: more would keep the interpreter busy for long, and make no sense to the model.
MIN_BODY_VALUES = 1 << 17
BODY_VALUES_PER_TOKEN = 4
#: Stands for every host name in :attr:`Settings.hosts`.
ANY_HOST = "*"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; checked before any work is done for it.

    Attributes:
        body_bytes: of the request's body.
        body_seconds: until the whole body has to be there.
        chunk_bytes: what each piece of a chunked body counts against ``body_bytes`` besides its own bytes.
        head_bytes, head_seconds: of the request line and the headers, and until they have to be there, from
            the connection or, after a response, from their first byte.
        idle_seconds: between a response and the next request on the same connection.
        write_seconds: a client that takes next to nothing of its response for so long is disconnected.
        depth: how deeply its JSON may be nested.
        containers, values: objects and lists in it, and values of any kind.
        messages, tools: in a conversation.
        choices: answers to one request, all prompts together.
        active: answers under way in the whole server; more are refused with 503.
        connections: open at a time.
        per_address: of these from one address (of IPv6, one /64 network) other than this machine's own.
    """

    body_bytes: int = MIN_BODY_BYTES
    body_seconds: float = 60.0
    chunk_bytes: int = 64
    head_bytes: int = 16 << 10
    head_seconds: float = 20.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    depth: int = 64
    containers: int = 1 << 16
    values: int = MIN_BODY_VALUES
    messages: int = 4096
    tools: int = 256
    choices: int = 16
    active: int = 512
    connections: int = 1024
    per_address: int = 256

    @staticmethod
    def of(context: int, **more: Any) -> Limits:
        """Limits for a model that reads this many tokens, with others as given."""
        size = max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)
        return Limits(body_bytes=size, values=max(MIN_BODY_VALUES, BODY_VALUES_PER_TOKEN * context), **more)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server presents itself and its model.

    Attributes:
        names: of the model; one may hold ``*`` and stands for all that it fits. The first that does not is
            shown.
        sampling: arguments of SamplingParams for what a request leaves open.
        thinking: likewise of thinking.
        keys: whoever sends one of these may use the server; none: everyone.
        hosts: names that the server answers to besides those of this machine, or ANY_HOST; without keys no
            others are answered, with keys only if there are any.
        origins: web pages that may use it besides its own.
        refuse_media: images, sounds and files in a conversation are refused; otherwise a line of text that
            says so takes their place.
        keep_alive: a stream that is silent for so many seconds says that it is still there.
        clock: seconds, for the limits of keys.
        drain_seconds: how long answers under way may go on when the server is to end.
    """

    names: tuple[str, ...] = ("godwit",)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: ThinkingSettings = field(default_factory=ThinkingSettings)
    keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    refuse_media: bool = False
    limits: Limits = field(default_factory=Limits)
    keep_alive: float = 15.0
    drain_seconds: float = 30.0
    clock: Callable[[], float] = monotonic

    @property
    def name(self) -> str:
        return next((name for name in self.names if "*" not in name), "godwit")

    def knows(self, model: str) -> bool:
        """Whether a request may call the model so."""
        return any(fnmatchcase(model, name) for name in self.names)
