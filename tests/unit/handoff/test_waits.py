"""Waits for hand-offs end when these are lost."""

import asyncio
from asyncio import run
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.handoff.errors import HandoffLost, StageUnavailable
from serve_app.handoff.waits import HandOffs, pulls
from serve_app.stage import Stage

SOON_S = 0.01


def hand_offs(lost: Callable[[list[str]], Awaitable[Any]], after_s: float = 0.0) -> HandOffs[str]:
    return HandOffs(after_s, SOON_S, lost, "waited in vain")


async def none(waiting: list[str]) -> list[str]:
    return []


async def forever() -> None:
    await asyncio.Event().wait()


async def answer() -> str:
    return "answer"


def test_a_wait_gives_what_it_waited_for() -> None:
    assert run(hand_offs(none).wait("a", answer())) == "answer"


def test_what_is_lost_ends_its_wait_and_no_other() -> None:
    async def scenario() -> str:
        async def lost(waiting: list[str]) -> list[str]:
            return ["a", "of another ingress"]

        waits = hand_offs(lost)
        other = asyncio.create_task(waits.wait("b", asyncio.sleep(10 * SOON_S, "b's answer")))
        with pytest.raises(HandoffLost, match="waited in vain"):
            await waits.wait("a", forever())
        return await other

    assert run(scenario()) == "b's answer"


def test_it_is_asked_for_waits_that_are_long_enough_and_while_there_are_any() -> None:
    asked: list[list[str]] = []

    async def scenario() -> None:
        async def lost(waiting: list[str]) -> list[str]:
            asked.append(waiting)
            return waiting

        waits = hand_offs(lost, after_s=5 * SOON_S)
        with pytest.raises(HandoffLost):
            await waits.wait("long", forever())
        await waits.wait("short", asyncio.sleep(SOON_S))
        looking = waits._looking
        assert looking is not None
        await looking

    run(scenario())
    assert asked == [["long"]]


def test_a_wait_goes_on_while_nobody_can_tell() -> None:
    tries = 0

    async def scenario() -> None:
        async def lost(waiting: list[str]) -> list[str]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise StageUnavailable(Stage.PREFILL, "is not there")
            return waiting

        with pytest.raises(HandoffLost):
            await hand_offs(lost).wait("a", forever())

    run(scenario())
    assert tries == 3


def test_errors_and_cancellations_of_the_work_are_its_own() -> None:
    async def scenario() -> None:
        waits = hand_offs(none)

        async def fails() -> None:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await waits.wait("a", fails())
        task = asyncio.create_task(waits.wait("a", forever()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not waits._waits

    run(scenario())


def test_a_pull_that_takes_longer_than_the_lease_ends_the_wait_at_decode() -> None:
    seconds: list[float] = []

    async def scenario() -> list[str]:
        async def overdue(longer_than_s: float) -> set[str]:
            seconds.append(longer_than_s)
            return {"a"}

        waits = pulls(overdue, 3 * SOON_S)
        queued = asyncio.create_task(waits.wait("queued", asyncio.sleep(10 * SOON_S, "one")))
        with pytest.raises(HandoffLost, match="did not come"):
            await waits.wait("a", forever())
        return [await queued, await waits.wait(None, answer())]

    assert run(scenario()) == ["one", "answer"]
    assert set(seconds) == {3 * SOON_S}


def test_work_whose_blocks_have_come_is_not_waited_for_any_more() -> None:
    """The first token tells; what is said of the blocks from then on does not end the answer."""
    asked: list[list[str]] = []

    async def scenario() -> str:
        come, looked = asyncio.Event(), asyncio.Event()

        async def lost(waiting: list[str]) -> list[str]:
            asked.append(waiting)
            looked.set()
            return ["a"] if come.is_set() else []

        async def answered() -> str:
            await looked.wait()
            waits.over("a")
            waits.over("a")  # once is enough, and no more than nothing
            waits.over(None)
            come.set()
            await waits.wait("b", asyncio.sleep(10 * SOON_S))
            return "answer"

        waits = hand_offs(lost)
        return await waits.wait("a", answered())

    assert run(scenario()) == "answer"
    assert ["b"] in asked and all("a" not in waiting for waiting in asked[asked.index(["b"]) :])
