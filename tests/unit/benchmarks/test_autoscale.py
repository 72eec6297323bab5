"""benchmarks.autoscale: what it reads of the signals of replicas. Its load runs in tests/integration/test_autoscaling.py."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.autoscale import Answer, Sample, by_phase, decided_at, decisions, queue_s, read
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


def test_requests_are_told_by_the_phase_that_asked_for_them() -> None:
    def sample(seconds: float, phase: str) -> Sample:
        return Sample(seconds, phase, 0, 0, {}, {})

    samples = [
        sample(0.2, "quiet"),
        sample(10.3, "text"),
        sample(11.3, "text"),
        sample(20.3, "image"),
        sample(30.0, "image"),
    ]
    answers = [
        Answer("text", 10.0, 0.1),
        Answer("text", 12.0, 0.3),
        Answer("image", 20.1, 2.0),
        Answer("text", 20.1, 9.0),
    ]
    text, image = by_phase(samples, answers[:3])

    assert (text["kind"], text["requests"], text["ttft_p50_s"]) == ("text", 2, pytest.approx(0.2))
    assert (image["kind"], image["requests"], image["ttft_p90_s"]) == ("image", 1, pytest.approx(2.0))
    assert by_phase(samples, answers)[0]["requests"] == 3, "asked for before the first look at the next phase"


def test_decisions_have_their_moments(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    log.write_text(
        "INFO 2026-11-29 10:14:47,231 controller 1 -- Upscaling Deployment(name='Encoder', app='epd') "
        "from 1 to 2 replicas. Current ongoing requests: 14.19\n"
        "INFO 2026-11-29 10:14:47,346 controller 1 -- Adding 1 replica to Deployment(name='Encoder')\n"
    )
    server: Any = SimpleNamespace(log=log)
    began = datetime.fromisoformat("2026-11-29 10:14:00").timestamp()

    assert decisions(server) == [("Encoder", 1, 2)]
    assert decided_at(server, began) == [47.2]
