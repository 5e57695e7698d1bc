"""Numbers for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from smidgen.serving.server import Server

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Measures:
    """Counts of requests, and what a server says of itself when it is asked."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "smidgen_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "smidgen_request_seconds", "Seconds of a request", ["route"], registry=self.registry, buckets=BUCKETS
        )
        self.open = Gauge("smidgen_requests_open", "Requests that are here and not answered", registry=self.registry)
        self.registry.register(_OfServer(server))


class _OfServer(Collector):
    """What a server counts itself."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        bank, engine = self.server.bank, self.server.engine
        counts = engine.counts
        for name, text, value in (
            ("deltas", "Deltas that are known", len(bank)),
            ("deltas_loaded", "Deltas in memory", bank.loaded),
            ("deltas_bytes", "Bytes of their values", bank.nbytes),
            ("deltas_dropped", "Deltas let go of for others since the start", bank.dropped),
            ("waiting", "Rows and texts that wait", engine.waiting),
            ("writing", "Texts that are being written", engine.writing),
            ("passes", "Passes of the model since the start", counts.passes),
            ("rows", "Rows computed since the start", counts.rows),
            ("tokens", "Tokens written since the start", counts.tokens),
        ):
            yield GaugeMetricFamily(f"smidgen_{name}", text, value=value)
