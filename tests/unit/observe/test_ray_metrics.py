"""What Ray is told of a registry, and that it is told again."""

import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.exporter import prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
from ray.dashboard.modules.reporter.reporter_agent import ReporterAgent
from ray.util import metrics

from serve_app.observe import ray_metrics
from serve_app.observe.ray_metrics import SERVE_LABELS, Teller, interval_s, serve_labels
from tests.unit.metrics_of import Told, names_of, watched


@pytest.fixture
def told() -> Iterator[Told]:
    with watched() as told:
        yield told


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_counter_is_told_by_how_much_it_has_grown(told: Told, registry: CollectorRegistry) -> None:
    counter, teller = Counter("a:b", "what", ["of"], registry=registry), Teller(registry, {"replica": "r"})
    counter.labels("x").inc(2)
    teller.tell()
    teller.tell()
    counter.labels("x").inc(3)
    counter.labels("y").inc()
    teller.tell()
    x, y = {"of": "x", "replica": "r"}, {"of": "y", "replica": "r"}
    assert told.samples == [("a_b", x, 2), ("a_b", x, 3), ("a_b", y, 1)]


def test_gauge_is_told_again_though_it_does_not_change(told: Told, registry: CollectorRegistry) -> None:
    gauge, teller = Gauge("a", "what", registry=registry), Teller(registry, {})
    gauge.set(5)
    teller.tell()
    teller.tell()
    gauge.set(0)
    teller.tell()
    assert told.values("a") == [5, 5, 0]


def test_histogram_is_told_as_its_buckets_sum_and_count(told: Told, registry: CollectorRegistry) -> None:
    histogram, teller = Histogram("a", "what", buckets=[0.005, 1.0, 50], registry=registry), Teller(registry, {})
    for value in (0.005, 0.3, 1.5, 1000):
        histogram.observe(value)
    teller.tell()
    histogram.observe(2)
    teller.tell()
    buckets = {bound: told.values("a_bucket", le=bound) for bound in ("0.005", "1.0", "50.0", "+Inf")}
    assert buckets == {"0.005": [1, 1], "1.0": [2, 2], "50.0": [3, 4], "+Inf": [4, 5]}
    assert told.values("a_count") == [4, 5]
    assert told.values("a_sum") == pytest.approx([1001.805, 1003.805])


def test_names_are_those_of_rays_own_kinds(told: Told, registry: CollectorRegistry) -> None:
    """Of which dashboards ask: a histogram of Ray's has these three, a counter `_total`."""
    Counter("some:counts_total", "what", registry=registry).inc()
    Gauge("some:gauge", "what", registry=registry)
    Histogram("some:seconds", "what", registry=registry)
    Teller(registry, {}).tell()
    seconds = {f"ray_some_seconds_{suffix}" for suffix in ("bucket", "sum", "count")}
    assert told.shown() == {"ray_some_counts_total", "ray_some_gauge"} | seconds == names_of(registry).keys()
    bounds = {tags["le"] for name, tags, _ in told.samples if name == "some_seconds_bucket"}
    assert bounds == {le for le, _ in prometheus._convert_buckets([0] * 15, Histogram.DEFAULT_BUCKETS[:-1])}


def test_only_what_begins_as_wanted_is_told(told: Told, registry: CollectorRegistry) -> None:
    for name in ("vllm:a", "epd:b", "process_c"):
        Gauge(name, "what", registry=registry)
    Teller(registry, {}, ("vllm:", "epd:")).tell()
    assert [name for name, _, _ in told.samples] == ["vllm_a", "epd_b"]


class Enough(BaseException): ...


class Broken:
    """A collector that fails a few times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def collect(self) -> Any:
        self.times -= 1
        raise ValueError("broken") if self.times >= 0 else Enough


def test_a_failure_is_said_once_and_telling_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(ray_metrics, "interval_s", lambda: 0.01)
    monkeypatch.setattr(ray_metrics.logger, "exception", said.append)
    with pytest.raises(Enough):
        Teller(Broken(times=3), {})._run()  # type: ignore[arg-type]
    assert said == ["Ray was not told all metrics; it is tried again, and not said again."]


def test_it_is_told_in_a_thread_that_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = threading.Event()
    daemon: list[bool] = []

    def run(self: Teller) -> None:
        daemon.append(threading.current_thread().daemon)
        ran.set()

    monkeypatch.setattr(Teller, "_run", run)
    Teller(CollectorRegistry(), {}).start()
    assert ran.wait(10)
    assert daemon == [True]


def test_labels_are_those_of_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(app_name="epd", deployment="Prefill", replica_tag="p1")
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    assert serve_labels() == {"application": "epd", "deployment": "Prefill", "replica": "p1"}


def test_outside_a_replica_labels_are_empty() -> None:
    assert serve_labels() == dict.fromkeys(SERVE_LABELS, "")


# ---- contracts


def test_ray_is_told_before_it_forgets() -> None:
    """Ray's agent keeps a gauge for two reports, and each report has only what was told since the one before."""
    kept_s = OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds
    assert kept_s(None) >= 4 * interval_s()
    assert "metrics_report_interval_ms(), 1000" in inspect.getsource(kept_s)


def test_ray_cannot_be_told_many_values_at_once() -> None:
    """Why a histogram goes as gauges. Gone, or a `_record` that takes counts: Ray's own Histogram may do."""
    replays = inspect.getsource(OpenTelemetryMetricRecorder.record_histogram_aggregated_batch)
    assert "for _ in range(bucket_count):\n                        instrument.record(midpoint" in replays
    assert "record_histogram_aggregated_batch" in inspect.getsource(ReporterAgent._export_histogram_data)
    assert list(inspect.signature(metrics.Histogram.observe).parameters) == ["self", "value", "tags"]
