"""The autoscaling loop in simulated time, with Ray's and production's policies."""

import random

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from serve_app.stage import Stage
from tests.unit.tools.sim.parts import TIMES, request
from tools.sim import experiments
from tools.sim.app import App, Shape
from tools.sim.control import Controller, record_s
from tools.sim.loop import Loop
from tools.sim.pools import TwoChoices
from tools.sim.replicas import Call


def controlled(config: AutoscalingConfig, gpus: float | None = None) -> tuple[Loop, App]:
    loop = Loop()
    app = App(loop, TIMES, Shape(), 1)
    for stage_pool in app.pools.values():
        stage_pool.scale(1, at_once=True)
    configs = {Stage.ENCODER: config}
    Controller(loop, app.pools, configs, gpus).start(200.0)
    return loop, app


def keep_busy(app: App, calls: int) -> None:
    for number in range(calls):
        call = Call(request(number), 50_000, lambda _: None)  # a second each
        app.pools[Stage.ENCODER].call(call, TwoChoices(random.Random(0)))


def targets(loop: Loop, app: App) -> dict[float, int]:
    """When the target became what."""
    found: dict[float, int] = {}
    while loop.now < 200.0:
        loop.run(loop.now + 1.0)
        target = app.pools[Stage.ENCODER].target
        if not found or target != list(found.values())[-1]:
            found[loop.now] = target
    return found


@pytest.mark.parametrize("delay_s", [5.0, 25.0])
def test_more_replicas_are_asked_for_when_the_delay_is_over_in_simulated_time(delay_s: float) -> None:
    loop, app = controlled(AutoscalingConfig(max_replicas=4, target_ongoing_requests=2, upscale_delay_s=delay_s))
    loop.at(0.5, lambda: keep_busy(app, 1000))
    changed = targets(loop, app)

    # The push at 10 s is the first that knows of the calls: 10 s and the delay.
    assert list(changed.values())[:2] == [1, 4]
    assert list(changed)[1] == pytest.approx(10 + delay_s, abs=1.5)


def test_rays_clock_is_real_again_afterwards() -> None:
    import time

    loop, app = controlled(AutoscalingConfig(max_replicas=4))
    targets(loop, app)

    assert autoscaling_policy.time is time


def test_the_policies_of_a_config_decide_by_work_and_within_the_budget() -> None:
    for gpus, expected in ((None, 8), (3, 3)):
        config = experiments.by_work(8)[Stage.ENCODER]
        loop, app = controlled(config, gpus)
        loop.at(0.5, lambda app=app: keep_busy(app, 1000))
        assert max(targets(loop, app).values()) == expected


def test_signals_come_as_often_as_the_config_says() -> None:
    config = AutoscalingConfig(
        max_replicas=4, target_ongoing_requests=2, upscale_delay_s=3.0, metrics_interval_s=1.0, look_back_period_s=6.0
    )
    loop, app = controlled(config)
    loop.at(50.5, lambda: keep_busy(app, 1000))
    changed = targets(loop, app)

    assert list(changed)[1] == pytest.approx(51 + 3, abs=1.5)
    assert [record_s(AutoscalingConfig()), record_s(config)] == pytest.approx([6.0, 1.0])
