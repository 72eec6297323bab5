"""What a replica says of its work."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.stages.workload import HELP, SAMPLE_CALLS, WARM_UP_CALLS, Meter, page
from tests.fakes import FakeClock


def run(
    meter: Meter, clock: FakeClock, calls: int, seconds: float, asked: float = 100, done: float | None = None
) -> None:
    """Calls one after the other."""
    for _ in range(calls):
        with meter.call(asked) as call:
            clock.now += seconds
            call.done = done


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def meter(clock: FakeClock) -> Meter:
    return Meter(clock)


def test_rate_is_work_per_second_with_work_and_idle_time_is_not_in_it(meter: Meter, clock: FakeClock) -> None:
    run(meter, clock, WARM_UP_CALLS, 9.0)
    run(meter, clock, SAMPLE_CALLS, 0.5)
    clock.now += 3600
    run(meter, clock, SAMPLE_CALLS, 0.5)
    assert meter.rate == pytest.approx(200)


def test_warm_up_calls_are_not_in_the_rate(meter: Meter, clock: FakeClock) -> None:
    run(meter, clock, WARM_UP_CALLS, 30.0)
    assert meter.rate is None and meter.stats()["rate"] == 0
    run(meter, clock, SAMPLE_CALLS, 1.0)
    assert meter.rate == pytest.approx(100)


def test_calls_at_the_same_time_share_the_time(meter: Meter, clock: FakeClock) -> None:
    run(meter, clock, WARM_UP_CALLS, 1.0)
    for _ in range(SAMPLE_CALLS):
        with meter.call(50), meter.call(50):
            clock.now += 1.0
    assert meter.rate == pytest.approx(100)


def test_a_rate_follows_what_the_engine_does_now(meter: Meter, clock: FakeClock) -> None:
    run(meter, clock, WARM_UP_CALLS, 1.0)
    run(meter, clock, 100, 1.0)
    run(meter, clock, 100, 0.5)
    assert meter.rate == pytest.approx(200)


def test_a_rate_of_small_calls_says_nothing_about_large_ones(meter: Meter, clock: FakeClock) -> None:
    """A prefill that has seen short texts, when the first prompts with images come."""
    run(meter, clock, WARM_UP_CALLS + 400, 0.0125, asked=12)
    assert meter.rate == pytest.approx(960)
    with meter.call(800), meter.call(800):
        assert meter.rate is None
        clock.now += 0.4
    run(meter, clock, 40, 0.2, asked=800)
    assert meter.rate == pytest.approx(4000)
    with meter.call(12):
        assert meter.rate == pytest.approx(960)
    with meter.call(800):
        assert meter.rate == pytest.approx(4000)


def test_outstanding_is_what_was_asked_less_what_the_cache_has_had_lately(meter: Meter, clock: FakeClock) -> None:
    with meter.call(1000):
        assert meter.stats()["outstanding"] == 1000
    run(meter, clock, 64, 1.0, asked=100, done=25)
    with meter.call(1000), meter.call(200):
        stats = meter.stats()
    assert stats["outstanding"] == pytest.approx(300)
    assert (stats["calls"], stats["mean_work"]) == (2, 25)
    assert meter.stats()["outstanding"] == meter.stats()["calls"] == 0


def test_a_call_that_raises_has_done_nothing_and_is_no_longer_under_way(meter: Meter, clock: FakeClock) -> None:
    with pytest.raises(ValueError), meter.call(100):
        raise ValueError
    assert meter.stats() == {"outstanding": 0, "calls": 0, "mean_work": 0, "done": 0, "rate": 0}


def test_the_page_has_every_signal(meter: Meter) -> None:
    families = list(text_string_to_metric_families(page(meter.stats() | {"kv_use": 0.5, "slots": 8, "gpus": 0.0})))
    assert {family.name for family in families} == {f"epd:work_{name}" for name in HELP}
    assert {s.value for f in families for s in f.samples if f.name == "epd:work_kv_use"} == {0.5}
