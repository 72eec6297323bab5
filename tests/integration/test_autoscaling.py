"""Each stage is scaled by its own work, by real engines and Ray Serve's controller; no request is lost on the way."""

from pathlib import Path

from benchmarks.autoscale import Phase, changes, decisions, deployments, run
from serve_app.config import Stage
from tests.integration.servers import serve_run

PHASES = [
    Phase("text", 15),
    Phase("image", 180, until=lambda sample: sample.replicas[Stage.ENCODER] == 2),
    Phase("text", 120, until=lambda sample: sample.replicas[Stage.ENCODER] == 1),
]


def test_images_double_the_encoder_only_and_text_brings_it_back(tmp_path: Path) -> None:
    with serve_run(tmp_path, {}, deployments()) as server:
        samples, failures = run(server, PHASES)
        wanted = decisions(server)
    assert failures == []
    assert samples[-1].completed > 100
    assert wanted == [("Encoder", 1, 2), ("Encoder", 2, 1)], [(s.phase, s.queue_s) for s in samples[::5]]
    counts = {stage: [count for _, count in changes(samples, stage)] for stage in Stage}
    assert counts == {Stage.ENCODER: [1, 2, 1], Stage.PREFILL: [1], Stage.DECODE: [1]}, [
        (s.phase, s.queue_s) for s in samples[::5]
    ]
