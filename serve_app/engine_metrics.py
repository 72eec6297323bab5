"""vLLM's metrics of an engine through Ray: ``ray_vllm_*``, and those of our connectors (``ray_epd_ec_*``,
``ray_epd_kv_transfer_mb_per_s``), on Ray's metrics port.

vLLM has the logger. Here it gets Serve's own labels, by which a dashboard tells the stages apart, and the classes that vLLM
leaves out for EC connectors: without them those would be registered with prometheus_client twice.
"""

from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorProm
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import (
    RayCounterWrapper,
    RayGaugeWrapper,
    RayHistogramWrapper,
    RayKVConnectorProm,
    RayPerfMetricsProm,
    RayPrometheusStatLogger,
    RaySpecDecodingProm,
)

from serve_app.gauges import Gauges

SERVE_LABELS = ("application", "deployment", "replica")


def serve_labels() -> dict[str, str]:
    """As Serve labels what it counts itself; empty values outside a replica."""
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return dict.fromkeys(SERVE_LABELS, "")
    return dict(zip(SERVE_LABELS, (context.app_name, context.deployment, context.replica_tag), strict=True))


class _OfReplica:
    """One of vLLM's wrappers around a metric of Ray's, with Serve's labels."""

    metric: Any
    _tags: dict[str, str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tags |= serve_labels()

    @staticmethod
    def _get_tag_keys(labelnames: list[str] | None) -> tuple[str, ...]:
        return (*(labelnames or ()), "ReplicaId", *SERVE_LABELS)

    def _build_tags(self, *labels: Any, **named: Any) -> dict[str, str]:
        named |= dict(zip(self.metric._tag_keys, labels, strict=False))
        return self._tags | {name: str(value) for name, value in named.items()}


class Gauge(_OfReplica, RayGaugeWrapper):
    told = Gauges()

    def set(self, value: float) -> None:
        self.told.set(self.metric, value, self._tags)


class Counter(_OfReplica, RayCounterWrapper): ...


class Histogram(_OfReplica, RayHistogramWrapper): ...


class _Classes:
    _gauge_cls = Gauge
    _counter_cls = Counter
    _histogram_cls = Histogram


class _SpecDecoding(_Classes, RaySpecDecodingProm): ...


class _KVConnector(_Classes, RayKVConnectorProm): ...


class _ECConnector(_Classes, ECConnectorProm): ...


class _Perf(_Classes, RayPerfMetricsProm): ...


class RayStatLogger(_Classes, RayPrometheusStatLogger):
    _spec_decoding_cls = _SpecDecoding
    _kv_connector_cls = _KVConnector
    _ec_connector_cls = _ECConnector
    _perf_metrics_cls = _Perf


STAT_LOGGERS = [RayStatLogger, PrometheusStatLogger]
"""Of an engine that reports to Ray, besides its own page. In this order: each that is made unregisters the vLLM metrics of
the page that was there before."""
