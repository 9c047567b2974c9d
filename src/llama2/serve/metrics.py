"""Metrics for Prometheus. Labels are limited: names of served models, routes, finish reasons."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llama2.engine.request import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST

_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class CountedHistogram(Collector):
    """A histogram by model that adds equal values at once, as the tokens of a step have them; times in seconds."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry, buckets: Sequence[float]) -> None:
        self._about = name, documentation
        self._limits = buckets
        self._counts: dict[str, list[int]] = {}  # in each bucket
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, model: str, seconds: float, count: int) -> None:
        """Add a value `count` times."""
        counts = self._counts.setdefault(model, [0] * (len(self._limits) + 1))
        counts[bisect_left(self._limits, seconds)] += count
        self._sums[model] = self._sums.get(model, 0.0) + seconds * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The metric family, for the library."""
        family = HistogramMetricFamily(*self._about, labels=["model"])
        names = [*map(floatToGoString, self._limits), "+Inf"]
        for model, counts in self._counts.items():
            family.add_metric([model], list(zip(names, accumulate(counts), strict=True)), self._sums[model])
        yield family


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        model = ["model"]
        self.queue = Histogram(
            "llama2_queue_seconds", "From arrival to the first step.", model, registry=r, buckets=_WAITS
        )
        self.prefill = Histogram(
            "llama2_prefill_seconds", "From the first step to the first token.", model, registry=r, buckets=_WAITS
        )
        self.first = Histogram(
            "llama2_time_to_first_token_seconds", "From arrival to the first token.", model, registry=r, buckets=_WAITS
        )
        self.between = CountedHistogram("llama2_inter_token_seconds", "Between two tokens of an answer.", r, _TOKENS)
        self.whole = Histogram(
            "llama2_request_seconds", "From arrival to the last token of a request.", model, registry=r, buckets=_WAITS
        )
        self.prompt = Counter("llama2_prompt_tokens", "Tokens of prompts.", model, registry=r)
        self.cached = Counter(
            "llama2_cached_prompt_tokens", "Tokens of prompts that were prefix hits in the cache.", model, registry=r
        )
        self.generated = Counter("llama2_generated_tokens", "Tokens of answers.", model, registry=r)
        self.embedded = Counter("llama2_embeddings", "Inputs that were embedded.", model, registry=r)
        self.finished = Counter("llama2_answers", "Answers that ended, by reason.", ["model", "finish"], registry=r)
        self.refused = Counter("llama2_refused", "Requests that admission refused.", model, registry=r)
        self.moderated = Counter(
            "llama2_moderated",
            "Prompts and parts of answers on which the policy acted.",
            ["model", "side", "action"],
            registry=r,
        )
        self.http = Counter("llama2_http_requests", "HTTP requests.", ["route", "status"], registry=r)
        self.running = Gauge("llama2_running", "Running answers.", model, registry=r)
        self.waiting = Gauge("llama2_waiting", "Answers that wait for a slot.", model, registry=r)
        self.cache = Gauge(
            "llama2_kv_cache_used_ratio", "Share of the key/value cache that running answers use.", model, registry=r
        )
        self.kept = Gauge(
            "llama2_kv_cache_kept_ratio",
            "Share that is cached for later prompts, and evictable.",
            model,
            registry=r,
        )
        self.preemptions = Gauge("llama2_preemptions", "Preempted answers, since loading.", model, registry=r)

    def text(self, loads: Mapping[str, EngineStats | None]) -> bytes:
        """All metrics in Prometheus' format; `loads` by model, None for one that is not loaded."""
        for name, load in loads.items():
            self.running.labels(name).set(load.running if load else 0)
            self.waiting.labels(name).set(load.waiting if load else 0)
            self.cache.labels(name).set(load.held_blocks / load.blocks if load else 0)
            self.kept.labels(name).set(load.evictable_blocks / load.blocks if load else 0)
            self.preemptions.labels(name).set(load.preemptions if load else 0)
        return generate_latest(self.registry)
