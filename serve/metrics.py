"""What the service counts, for Prometheus. Never any text: labels are names of routes, models and keys."""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.schema import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one process that speaks HTTP, and gauges of the engines behind it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, told: str, labels: Sequence[str]) -> Counter:
            return Counter(f"dpo_ray_{name}", told, labels, registry=self._registry)

        def seconds(name: str, told: str) -> Histogram:
            return Histogram(f"dpo_ray_{name}_seconds", told, ["model"], buckets=SECONDS, registry=self._registry)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(f"dpo_ray_{name}", told, ["model"], registry=self._registry)

        self.requests = counter("requests", "Requests by route and status", ["route", "status"])
        self.refused = counter("refused", "Requests that a limit refused", ["limit"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read", ["model"])
        self.completion_tokens = counter("completion_tokens", "Tokens written", ["model"])
        self.retries = counter("retries", "Requests begun again on another replica", ["model"])
        self.preferences = counter("preferences", "Preferences recorded", ["blind"])
        self.first_token = seconds("time_to_first_token", "From the request to the first text of a stream")
        self.between_tokens = seconds("inter_token", "Mean time between the tokens of a stream")
        self.duration = seconds("request", "Of whole requests for completions")
        self.open = Gauge("dpo_ray_open_requests", "Requests under way", registry=self._registry)
        self._gauges = {
            "replicas": gauge("replicas", "Engines that answered the last question"),
            "running": gauge("running", "Answers in the batch, over all replicas"),
            "waiting": gauge("waiting", "Answers that wait for a place in the batch, over all replicas"),
            "cache_used": gauge("cache_used_ratio", "Share of the cache in use, of the fullest replica"),
            "steps": gauge("steps", "Forward passes since the start, over all replicas"),
            "tokens": gauge("engine_tokens", "Tokens written since the start, over all replicas"),
        }

    def text(self, loads: Mapping[str, Sequence[Load]]) -> bytes:
        """In Prometheus' format; `loads` are the engines' own, by model."""
        for model, replicas in loads.items():
            gauges = self._gauges
            gauges["replicas"].labels(model).set(len(replicas))
            gauges["cache_used"].labels(model).set(max((load.cache_used for load in replicas), default=0.0))
            for name in ("running", "waiting", "steps", "tokens"):
                gauges[name].labels(model).set(sum(getattr(load, name) for load in replicas))
        return generate_latest(self._registry)
