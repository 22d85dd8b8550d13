"""What Prometheus reads of a server."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE", "Metrics"]

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server.

    Args:
        waiting: Gives how many pictures wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "imagen_scale_requests",
            "Requests for images by the status of their answer; 499: the caller went away.",
            ["status"],
            registry=registry,
        )
        self.pictures = Counter(
            "imagen_scale_pictures",
            "Pictures by what became of them: made, failed, or dropped with their caller.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("made", "failed", "dropped"):  # zero is told, too
            self.pictures.labels(outcome)
        Gauge("imagen_scale_queue_pictures", "Pictures that wait.", registry=registry).set_function(
            waiting
        )
        self.batch = Histogram(
            "imagen_scale_batch_pictures", "Pictures that were computed together.",
            buckets=BATCHES, registry=registry,
        )  # fmt: skip
        self.waited = Histogram(
            "imagen_scale_waiting_seconds", "From a picture's arrival until it is begun.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.computed = Histogram(
            "imagen_scale_computing_seconds", "Of a batch, all stages.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)
