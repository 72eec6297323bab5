"""benchmarks.autoscale: what it reads of the signals of replicas. Its load runs in tests/integration/test_autoscaling.py."""

import pytest

from benchmarks.autoscale import queue_s, read
from serve_app.observe.metrics import merge_metrics
from serve_app.stages.workload import page


def test_queueing_time_is_work_over_the_rate_of_all() -> None:
    replicas = [{"outstanding": 3000.0, "rate": 1000.0}, {"outstanding": 1000.0, "rate": 1000.0}]
    assert queue_s(replicas) == pytest.approx(2.0)
    assert queue_s([replica | {"rate": 0.0} for replica in replicas]) == 0.0, "not measured"
    assert queue_s([replicas[0] | {"outstanding": 0.0}]) == queue_s([]) == 0.0


def test_signals_are_read_as_replicas_tell_them() -> None:
    told = {"outstanding": 3.0, "rate": 0.5}
    assert read(merge_metrics([("decode", "d1", page(told)), ("decode", "d2", page(told))])) == {
        "decode": {"d1": told, "d2": told}
    }
