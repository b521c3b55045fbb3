"""Counts and timings for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from godwit.engine import EngineStats
from godwit.server.log import Record

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The server's metrics, in their own registry."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._requests = self._counter("requests", "Requests by route and status.", ["route", "status"])
        self._tokens = {
            name: self._counter(f"{name}_tokens", f"Tokens: {text}.")
            for name, text in (
                ("prompt", "of prompts"),
                ("cached_prompt", "of prompts that were cached"),
                ("completion", "of answers"),
                ("drafted", "drafted"),
                ("accepted", "drafted and accepted"),
            )
        }
        self._answers = self._counter("answers", "Answers by the reason of their end.", ["reason"])
        self._key_requests = self._counter(
            "key_requests", "Requests by API key and status.", ["key", "status"]
        )
        self._key_tokens = self._counter(
            "key_tokens", "Tokens charged to API keys, of prompts and of answers.", ["key", "kind"]
        )
        self.restarts = self._counter("engine_restarts", "Engines that ended and were replaced.")
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._each = self._histogram("time_per_output_token_seconds", "Of the others, mean.", _TOKEN_SECONDS)
        self._whole = self._histogram(
            "request_seconds", "From the request to the end of its response.", _SECONDS
        )

    def observe(self, record: Record, route: str) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(record.status)).inc()
        self._whole.observe(record.seconds)
        if record.key:
            self._key_requests.labels(record.key, str(record.status)).inc()
            self._key_tokens.labels(record.key, "prompt").inc(record.num_prompt)
            self._key_tokens.labels(record.key, "completion").inc(record.num_generated)
        if record.first is not None:
            self._first.observe(record.first)
        if record.left is not None:
            self._answers.labels("cancelled").inc()
        for index, finish in enumerate(record.finishes):
            counts = (
                finish.prompt_tokens if index == 0 else 0,
                finish.cached_tokens if index == 0 else 0,
                finish.completion_tokens,
                finish.drafted,
                finish.accepted,
            )
            for counter, count in zip(self._tokens.values(), counts, strict=True):
                counter.inc(count)
            self._answers.labels(finish.reason).inc()
            if rate := finish.decode_tokens_per_second:
                self._each.observe(1 / rate)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()) -> Counter:
        return Counter(f"godwit_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"godwit_{name}", text, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats: Any = self._stats()
        yield GaugeMetricFamily(
            "godwit_engine_up", "Whether the engine runs.", value=float(stats is not None)
        )
        for part in fields(EngineStats) if stats is not None else ():
            text = f"{part.name.replace('_', ' ')} of the engine."
            yield GaugeMetricFamily(f"godwit_engine_{part.name}", text, value=getattr(stats, part.name))
