"""serve_app.gauges: what Ray is told, and that it is told again."""

import inspect
import threading
from typing import Any

import pytest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

from serve_app.gauges import TELL_S, Gauges


class Told:
    """In the place of a gauge of Ray's: keeps what it is told."""

    def __init__(self) -> None:
        self.values: list[tuple[float, str]] = []
        self._told = threading.Semaphore(0)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags["of"]))
        self._told.release()

    def wait(self, times: int) -> None:
        for _ in range(times):
            assert self._told.acquire(timeout=10)


@pytest.fixture
def gauge() -> Any:
    return Told()


def test_value_that_does_not_change_is_told_again(gauge: Any) -> None:
    Gauges(interval_s=0.01).set(gauge, 5, {"of": "a"})
    gauge.wait(3)
    assert gauge.values[:3] == [(5, "a")] * 3


def test_latest_value_of_each_label_is_told(gauge: Any) -> None:
    gauges = Gauges(interval_s=1000)
    gauges.set(gauge, 1, {"of": "a"})
    gauge.wait(1)
    for value in (2, 3):
        gauges.set(gauge, value, {"of": "a"})
        gauges.set(gauge, -value, {"of": "b"})
    gauges.tell()
    assert gauge.values == [(1, "a"), (3, "a"), (-3, "b")]


def test_ray_is_told_before_it_forgets() -> None:
    """A contract: Ray keeps a gauge that long. Where that is set to its least, a telling is still well within it."""
    assert OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds(None) >= 2 * TELL_S
    assert "metrics_report_interval_ms(), 1000" in inspect.getsource(
        OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds
    )
