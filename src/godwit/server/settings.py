"""The settings of a server: names, limits, defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any

from godwit.server.keys import Key
from godwit.server.limits import Limits
from godwit.server.thinking import ThinkingSettings

#: Stands for any host name in :attr:`Settings.hosts`.
ANY_HOST = "*"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server.

    Attributes:
        names: of the model; ``*`` in a name is a wildcard. The first without one is shown to clients.
        sampling: default arguments of SamplingParams.
        thinking: defaults for thinking.
        keys: API keys; if there are none, no key is needed.
        hosts: accepted Host headers besides those of this machine, or ANY_HOST. With keys and no hosts, any
            is accepted.
        origins: web origins that may use the server besides its own page.
        refuse_media: refuse images, audio and files; otherwise a line of text takes their place.
        keep_alive: seconds of silence in a stream before a heartbeat is sent.
        clock: seconds, for rate limits.
        drain_seconds: how long answers in progress may go on after the server was told to stop.
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
        """Whether ``model`` is one of the names."""
        return any(fnmatchcase(model, name) for name in self.names)
