"""What is tried again, how often, and how long after."""

import asyncio

import pytest

from serve_app.config import RetryConfig
from serve_app.handoff.errors import BadRequest, ConfigError, HandoffLost, StageError, StageTimeout, StageUnavailable
from serve_app.ingress.retry import Retries, RetryBudget
from serve_app.stage import Stage
from tests.fakes import FakeClock

GONE = StageUnavailable(Stage.PREFILL, "is gone")
LOST = HandoffLost(Stage.DECODE, "lost it")


def spent(budget: RetryBudget) -> int:
    """Retries that were there."""
    count = 0
    while budget.spend():
        count += 1
    return count


# ---- the budget


@pytest.mark.parametrize(("floor", "there"), [(3.0, 30), (0.5, 5), (0.05, 1), (0.0, 1)])
def test_budget_begins_with_ten_seconds_worth_and_at_least_one(floor: float, there: int) -> None:
    assert spent(RetryBudget(0.2, floor, FakeClock())) == there


def test_requests_earn_a_fraction_of_a_retry_each() -> None:
    budget = RetryBudget(0.25, 0.0, FakeClock())
    spent(budget)
    for _ in range(3):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    assert not budget.spend()


def test_budget_fills_with_time() -> None:
    clock = FakeClock()
    budget = RetryBudget(0.0, 2.0, clock)
    spent(budget)
    clock.now += 0.25
    assert not budget.spend()
    clock.now += 0.25
    assert spent(budget) == 1
    clock.now += 3
    assert spent(budget) == 6


@pytest.mark.parametrize(("requests", "seconds"), [(1000, 0), (0, 1000), (1000, 1000)])
def test_neither_requests_nor_time_fill_it_above_its_limit(requests: int, seconds: int) -> None:
    clock = FakeClock()
    budget = RetryBudget(0.5, 1.0, clock)
    clock.now += seconds
    for _ in range(requests):
        budget.earn()
    assert spent(budget) == 10


def test_nothing_earned_is_nothing_to_spend() -> None:
    clock = FakeClock()
    budget = RetryBudget(0.0, 0.0, clock)
    spent(budget)
    clock.now += 1000
    budget.earn()
    assert not budget.spend()


# ---- what may be tried again


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (GONE, True),
        (LOST, True),
        (StageTimeout(Stage.PREFILL, "did not answer"), False),
        (StageError(Stage.DECODE, "ended its stream"), False),
        (BadRequest("no such thing"), False),
        (ConfigError("broken"), False),
        (KeyError("ours"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_failures_that_say_nothing_about_the_request_are_tried_again(error: Exception, again: bool) -> None:
    assert Retries(RetryConfig()).allow(error, 1) is again


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_request_is_tried_so_many_times(attempts: int) -> None:
    retries = Retries(RetryConfig(attempts=attempts))
    assert [retries.allow(GONE, attempt) for attempt in range(1, attempts + 1)] == [True] * (attempts - 1) + [False]


def test_all_requests_share_one_budget() -> None:
    retries = Retries(RetryConfig(ratio=0.5, floor_per_s=0))
    assert retries.allow(GONE, 1)
    assert not retries.allow(LOST, 1)
    retries.accepted()
    retries.accepted()
    assert retries.allow(LOST, 1)
    assert not retries.allow(GONE, 1)


def test_what_is_not_tried_again_costs_nothing() -> None:
    retries = Retries(RetryConfig(attempts=2, ratio=0, floor_per_s=0))
    assert not retries.allow(BadRequest("no"), 1)
    assert not retries.allow(GONE, 2)
    assert retries.allow(GONE, 1)


# ---- the pause


def test_bounds_of_the_pause_double_with_each_attempt() -> None:
    bounds: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    async def main() -> None:
        retries = Retries(RetryConfig(backoff_s=0.05), jitter)
        for attempt in (1, 2, 3):
            await retries.pause(attempt)

    asyncio.run(main())
    assert bounds == [(0, 0.05), (0, 0.1), (0, 0.2)]


def test_pause_is_as_long_as_was_drawn() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await Retries(RetryConfig(), lambda low, high: 0.1).pause(1)
        return loop.time() - began

    assert asyncio.run(main()) >= 0.09


def test_pause_without_backoff_is_none() -> None:
    async def main() -> None:
        async with asyncio.timeout(5):
            await Retries(RetryConfig(backoff_s=0)).pause(30)

    asyncio.run(main())
