"""`godwit serve`: serve a model through the OpenAI and Anthropic APIs."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from godwit.cli import common
from godwit.cli.options import DtypeName, EngineOptions, QuantizeName, SamplingOptions, ServedThinkingOptions
from godwit.errors import UsageError
from godwit.measure.machine import memory

if TYPE_CHECKING:
    from godwit.engine import Engine
    from godwit.models.causal_lm import CausalLM
    from godwit.server.thinking import ThinkingSettings

_log = logging.getLogger("godwit.server")


def run(
    model: str | None,
    *,
    host: str,
    port: int,
    names: Sequence[str],
    api_key_file: Path | None,
    cors_origins: Sequence[str],
    refuse_media: bool,
    hosts: Sequence[str],
    per_address: int,
    engine: EngineOptions,
    thinking: ServedThinkingOptions,
    threads: int | None,
    dtype: DtypeName,
    quantize: QuantizeName | None,
) -> None:
    """Serve until stopped by a signal.

    Raises: GodwitError of any kind, before the server starts.
    """
    try:
        from godwit.server.app import make_app
        from godwit.server.host import EngineHost
        from godwit.server.keys import read_keys
        from godwit.server.limits import Limits
        from godwit.server.run import allow_open_files, is_loopback, listen, make_server
        from godwit.server.service import Service
        from godwit.server.settings import Settings
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serving needs the package {error.name}; install it with pip install 'godwit-llm[serve]'"
        ) from None

    keys, origins = read_keys(api_key_file, os.environ), checked_origins(cors_origins)
    allowed = checked_hosts(hosts)
    opened = common.open_model(model)
    opened.check_context(engine.context)
    sampling = common.recommended(opened.tokenizer.generation_defaults)
    common.sampling_params(SamplingOptions(), opened.tokenizer.generation_defaults)
    with listen(host, port) as listener:  # before loading weights, to fail early if the port is taken
        if not (keys or allowed or is_loopback(listener)):
            raise UsageError(
                f"anyone who can reach {host} could use this server; set API keys with --api-key-file, or "
                "the host names that clients may use with --allow-host"
            )
        num_threads = common.use_threads(threads)
        with common.loading(opened.name) as progress:
            weights = common.load_weights(opened.source, dtype, quantize, progress)
        engines = EngineHost(lambda: make_engine(weights, opened, engine))
        settings = Settings(
            names=tuple(names) or (shown_name(opened.name),),
            sampling=sampling,
            thinking=thinking_settings(thinking),
            keys=keys,
            origins=origins,
            refuse_media=refuse_media,
            hosts=allowed,
            limits=Limits.of(engines.context, per_address=per_address),
        )
        service = Service(engines, settings)
        log_to_stderr()
        threads_used = f"{num_threads} thread{'s' * (num_threads > 1)}"
        _log.info("%s: %s, %s", opened.name, common.described(weights), threads_used)
        if not keys and not is_loopback(listener):
            _log.warning(
                "warning: anyone who can reach this address can use the server; --api-key-file requires keys"
            )
        allow_open_files(settings.limits)
        address, bound = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        place = f"http://{shown}:{bound}"
        _log.info(
            "serving %s at %s with a context of %d (Ctrl-C to stop)", settings.name, place, service.context
        )
        make_server(make_app(service), settings).run([listener])


def thinking_settings(options: ServedThinkingOptions) -> ThinkingSettings:
    """A server's defaults for thinking, which requests can override.

    Raises:
        UsageError: the message cannot be used.
    """
    from godwit.server.thinking import ThinkingSettings

    rules = common.thinking_rules(options, opened=False)
    return ThinkingSettings(
        effort=options.reasoning_effort,
        budget=options.thinking_budget,
        message=rules.message,
        effort_budgets=options.effort_budgets,
        never_empty=options.no_empty_answers,
    )


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Check that origins have the form that browsers send.

    Raises:
        UsageError: an origin that no browser would send, so that it would never match.
    """
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(
                f"--cors-origin {origin!r:.100} is not an origin; give one such as https://example.org"
            )
    return tuple(origins)


def checked_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Host names as in a Host header, without a port and with IPv6 addresses in brackets; or ``*``.

    Raises:
        UsageError: one that cannot occur in the header, so that it would never match.
    """
    return tuple(_checked_host(host) for host in hosts)


def _checked_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if host == "*" or re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", host):
            return host
        raise UsageError(
            f"--allow-host {host!r:.100} is not a host name; give one such as llm.example.org, without a port"
        ) from None
    return f"[{address}]" if address.version == 6 else str(address)


def make_engine(model: CausalLM, opened: common.OpenedModel, options: EngineOptions) -> Engine:
    """An engine within its memory limit, by default half of the free memory.

    Raises:
        UsageError: invalid options.
        MemoryBudgetError: the limit is too low.
    """
    from godwit.engine import Engine

    budget, snapshots = shares(model, options.memory_gib)
    return Engine(
        model,
        opened.tokenizer,
        max_context=options.context or common.resolve_context(model, budget),
        max_bytes=budget,
        max_sequences=options.max_sequences,
        snapshot_bytes=snapshots,
        cache_dir=options.cache_dir,
        debug=options.self_check,
        speculate=options.speculate,
    )


def shares(model: CausalLM, memory_gib: float | None) -> tuple[int | None, int]:
    """Bytes for the caches of running sequences, and for state snapshots (a quarter, at most 1 GiB)."""
    from godwit.engine.cache import CacheSize
    from godwit.engine.engine import DEFAULT_SNAPSHOT_BYTES

    available = memory()["available"]
    budget = None if available is None else available // 2
    if memory_gib is not None:
        budget = int(memory_gib * 2**30)
    if budget is None or not CacheSize.of(model).per_row:
        return budget, DEFAULT_SNAPSHOT_BYTES
    snapshots = min(DEFAULT_SNAPSHOT_BYTES, budget // 4)
    return budget - snapshots, snapshots


def shown_name(name: str) -> str:
    """The model's name for clients: the last part of its path or repository name."""
    if name == common.BUILT_IN:
        return "godwit"
    return name.rstrip("/").rpartition("/")[2].removesuffix(".godwit") or "godwit"


def log_to_stderr() -> None:
    """Log one line per request and event to stderr; events that any client can cause are rate-limited."""
    from godwit.server.connections.pace import BoundedRate
    from godwit.server.log import OneLine

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("godwit", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("godwit.server.connections").addFilter(BoundedRate())
