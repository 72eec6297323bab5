"""vLLM's metrics of an engine, and those of our connectors: on the page of its replica, and from there to Ray
(``ray_vllm_*``, ``ray_epd_ec_*``, ``ray_epd_kv_transfer_mb_per_s``).

vLLM has a logger for each. Here only the page's counts, and Ray is told what is on the page.
"""

import threading
from typing import Any

import numpy as np
import prometheus_client
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serve_app.observe.metrics import PREFIXES
from serve_app.observe.ray_metrics import Teller, serve_labels

HELD = 4096
"""Most values of a histogram that wait to be sorted: a quarter of a second of a fast card."""


class Histogram(prometheus_client.Histogram):
    """Sorts its values into buckets when it is read: a token costs it an append to a list."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._held: list[float] = []
        self._sorting = threading.Lock()

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._held.append(amount)
        if len(self._held) >= HELD:
            self._sort()

    def _sort(self) -> None:
        """The thread that reads calls this too. What is appended meanwhile stays for the next time."""
        with self._sorting:
            values = self._held[:]
            del self._held[: len(values)]
            if values:
                self._sum.inc(sum(values))
                counts = np.bincount(np.searchsorted(self._upper_bounds, values), minlength=len(self._buckets))
                for bucket, count in zip(self._buckets, counts.tolist(), strict=True):
                    bucket.inc(count)

    def _child_samples(self) -> Any:
        self._sort()
        return super()._child_samples()


class PageLogger(PrometheusStatLogger):
    """vLLM's logger with a cheap histogram. In an engine's ``stat_loggers`` it replaces vLLM's own."""

    _histogram_cls = Histogram


def tell_ray() -> None:
    """Tell Ray the metrics of this process' engine from now on, with the label ``ReplicaId`` of vLLM's logger for Ray."""
    labels = serve_labels()
    Teller(REGISTRY, labels | {"ReplicaId": labels["replica"]}, PREFIXES).start()
