"""Counters of a server in Prometheus' text format."""

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from qlora.serving.answers import Usage
from qlora.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = tuple(2**i for i in range(13))


class Metrics:
    """What :mod:`qlora.serving.app` counts, and what it reads from the engine when it is asked."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        names = ["model"]
        self._requests = Counter("qlora_requests", "Requests by HTTP status", [*names, "status"], registry=registry)
        self._prompt = Counter("qlora_prompt_tokens", "Tokens of prompts", names, registry=registry)
        self._completion = Counter("qlora_completion_tokens", "Tokens of answers", names, registry=registry)
        self._first = Histogram(
            "qlora_first_token_seconds", "Time to the first token", names, buckets=_SECONDS, registry=registry
        )
        self._seconds = Histogram(
            "qlora_request_seconds", "Time of a whole request", names, buckets=_SECONDS, registry=registry
        )
        batch = Histogram("qlora_batch_tokens", "Tokens of a batch", buckets=_TOKENS, registry=registry)
        engine.manager.on_batch = lambda requests, tokens: batch.observe(tokens)
        registry.register(_EngineCollector(engine))

    def finished(self, model: str, usage: Usage, status: int) -> None:
        self._requests.labels(model, str(status)).inc()
        self._prompt.labels(model).inc(usage.prompt)
        self._completion.labels(model).inc(usage.completion)
        self._seconds.labels(model).observe(time.monotonic() - usage.begun)
        if usage.first_token is not None:
            self._first.labels(model).observe(usage.first_token)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Any]:
        engine = self._engine
        entries = list(engine.adapters.entries.values())
        gauges = {
            "qlora_requests_running": ("Requests that have a first token and are not done", engine.running),
            "qlora_requests_waiting": ("Requests without a first token", engine.waiting),
            "qlora_adapters": ("Adapters that can be named", len(entries)),
            "qlora_adapters_in_memory": ("Adapters in a slot", sum(entry.slot is not None for entry in entries)),
            "qlora_cache_free_share": ("Share of the key-value cache that is free", engine.free_cache_share),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(name, what, value)
        counters = {
            "qlora_adapter_loads": ("Adapters brought into a slot", engine.adapters.loads),
            "qlora_adapter_evictions": ("Adapters put out of a slot for another", engine.adapters.evictions),
            "qlora_requests_rejected": ("Requests refused for lack of room", engine.rejected),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(name, what, value)
