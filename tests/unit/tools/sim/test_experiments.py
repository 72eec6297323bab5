"""Traffic and the experiments."""

import pytest

from serve_app.stage import Stage
from tests.unit.tools.sim.parts import ONE_IMAGE, TIMES
from tools.sim import experiments
from tools.sim.traffic import Kind, burst, day


def test_a_burst_and_a_day_have_images_in_their_hours_only() -> None:
    kinds = Kind(), ONE_IMAGE
    for traffic, first, last in (
        (burst(5.0, 5.0, kinds, 100.0, 200.0, 300.0), 100.0, 200.0),
        (day(20.0, kinds, 400.0), 100.0, 300.0),
    ):
        images = [request.at for request in traffic.requests(1) if request.embeds]
        assert images and first <= min(images) and max(images) < last


def test_cards_are_split_by_need() -> None:
    need = {Stage.ENCODER: 1.0, Stage.PREFILL: 2.0, Stage.DECODE: 3.0}

    assert list(experiments.split(need, 12).values()) == [2, 4, 6]
    assert list(experiments.split(need | {Stage.ENCODER: 0.0}, 3).values()) == [1, 1, 1]


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_each_experiment_runs(experiment: str) -> None:
    size = 1 if experiment in ("routing", "scale") else 4 if experiment == "prefix" else 6
    traffic = "no reuse" if experiment == "prefix" else ""
    for strategy in experiments.STRATEGIES[experiment][-3:]:
        job, result, _ = experiments.do(experiments.Job(experiment, size, strategy, 0, True, traffic), TIMES)
        assert sum(result.outcomes.values()) == result.requests > 0
        drawn = experiment in ("burst", "day") and strategy in experiments.OVER_TIME
        assert ("timeline" in experiments.row_of(job, result, 1.0)) == drawn
