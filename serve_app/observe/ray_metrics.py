"""Tells Ray what a process counts with ``prometheus_client``.

A record of ``ray.util.metrics`` costs 4 to 7 µs: with each token, that was a sixth of a decode replica. So a thread reads
the registry now and then and tells Ray the values, at 10 µs per sample:

- a counter: by how much it has grown;
- a gauge: its value, each time anew, because Ray forgets one that it has not been told for two reports;
- a histogram: ``_bucket{le}``, ``_sum`` and ``_count`` under the names that Ray uses, each as a gauge, because Ray takes
  one value at a time. ``rate`` and ``histogram_quantile`` do not mind. All three are exact, where Ray's agent would count
  each value as the middle of its bucket, and engines keep buckets that differ.
"""

import logging
import re
import threading
import time
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util import metrics

logger = logging.getLogger("ray.serve")

SERVE_LABELS = ("application", "deployment", "replica")


def serve_labels() -> dict[str, str]:
    """The labels of Serve's own metrics; their values are empty outside a replica."""
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return dict.fromkeys(SERVE_LABELS, "")
    return dict(zip(SERVE_LABELS, (context.app_name, context.deployment, context.replica_tag), strict=True))


def interval_s() -> float:
    """Half of the time between two reports of this process to Ray's agent, so that each report has all gauges."""
    return max(float(ray._config.metrics_report_interval_ms()), 1000.0) / 1000 / 2


class Teller:
    """Tells Ray a registry's metrics whose names begin with one of ``prefixes``, with ``labels`` added."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str], prefixes: tuple[str, ...] = ("",)) -> None:
        self._registry = registry
        self._labels = labels
        self._prefixes = prefixes
        self._metrics: dict[str, Any] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def start(self) -> None:
        threading.Thread(target=self._run, name="metrics to Ray", daemon=True).start()

    def tell(self) -> None:
        """Not to be called by two threads at once."""
        for family in self._registry.collect():
            if family.name.startswith(self._prefixes):
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        self._tell(family, sample)

    def _tell(self, family: Metric, sample: Sample) -> None:
        tags = {**sample.labels, **self._labels}
        if family.type != "counter":
            self._metric(metrics.Gauge, sample.name, family, tags).set(sample.value, tags)
            return
        series = (sample.name, *tags.values())
        if (more := sample.value - self._told.get(series, 0.0)) > 0:
            self._metric(metrics.Counter, family.name, family, tags).inc(more, tags)
            self._told[series] = sample.value

    def _metric(self, kind: Any, name: str, family: Metric, tags: dict[str, str]) -> Any:
        if name not in self._metrics:
            # As vLLM's RayPrometheusMetric names them: OpenTelemetry takes no colon.
            self._metrics[name] = kind(re.sub(r"[^a-zA-Z0-9_]", "_", name), family.documentation, tuple(tags))
        return self._metrics[name]

    def _run(self) -> None:
        failed = False
        while True:
            try:
                self.tell()
            except Exception:
                if not failed:
                    logger.exception("Ray was not told all metrics; it is tried again, and not said again.")
                failed = True
            time.sleep(interval_s())
