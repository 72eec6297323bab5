"""Each stage is scaled by its own work, by real engines and Ray Serve's controller; no request is lost on the way."""

from pathlib import Path

from benchmarks.autoscale import changes, deployments, run
from serve_app.config import Stage
from tests.integration.servers import serve_run

PHASES = [("text", 20.0), ("image", 70.0), ("text", 45.0)]


def test_images_double_the_encoder_only_and_text_brings_it_back(tmp_path: Path) -> None:
    with serve_run(tmp_path, {}, deployments()) as server:
        samples, failures = run(server, PHASES)
    assert failures == []
    counts = {stage: [count for _, count in changes(samples, stage)] for stage in Stage}
    assert counts == {Stage.ENCODER: [1, 2, 1], Stage.PREFILL: [1], Stage.DECODE: [1]}, (counts, samples)
