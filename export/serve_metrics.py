"""What the embedded server counts, as Prometheus metrics; each application has a registry of its own."""

from typing import Any


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        seconds = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        here: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "patchrank_requests_total", "Answers by model and HTTP status", ["model", "code"], **here
        )
        self.latency = Histogram(
            "patchrank_request_seconds", "From request to answer", ["model"], buckets=seconds, **here
        )
        self.compute = Histogram("patchrank_compute_seconds", "One call of a graph", ["model"], buckets=seconds, **here)
        self.batch = Histogram(
            "patchrank_batch_images", "Rows of one call", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64, 128), **here
        )
        self.queue = Gauge("patchrank_queue_images", "Rows inside the server, waiting or computed", **here)

    def saw_call(self, model: str, rows: int, seconds: float) -> None:
        """One call of a graph."""
        self.batch.labels(model).observe(rows)
        self.compute.labels(model).observe(seconds)

    def saw_answer(self, model: str, code: int, seconds: float) -> None:
        """One answer to a client; `model` must be a served name, or "", never text of a request."""
        self.requests.labels(model, str(code)).inc()
        self.latency.labels(model).observe(seconds)

    def page(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
