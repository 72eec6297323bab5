"""What one ingress replica holds is found by the others."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.ingress.peers import Peers
from tests.fakes import FakePeers


async def holds_x(key: str) -> str | None:
    return "it" if key == "x" else None


async def fails(key: str) -> str:
    raise RayActorError


async def hangs(key: str) -> str:
    await asyncio.Event().wait()
    return "never"


async def cancelled(key: str) -> str:
    raise asyncio.CancelledError  # as Ray tells that the task at the other side was cancelled


def found(key: str, *others: Callable[[str], Awaitable[Any]], timeout_s: float = 5.0) -> Any:
    """What a replica finds where each of the others offers an answer."""
    fellows = FakePeers(1 + len(others))
    for peers, answer in zip(fellows[1:], others, strict=True):
        peers.offer("thing", answer)
    return asyncio.run(fellows[0].find("thing", key, timeout_s=timeout_s))


def test_what_another_replica_holds_is_found() -> None:
    assert found("x", holds_x) == "it"
    assert found("y", holds_x, holds_x) is None


@pytest.mark.parametrize("bad", [fails, hangs, cancelled])
def test_replica_that_fails_or_hangs_takes_nothing_away_from_what_others_have(bad: Any) -> None:
    assert found("x", bad, holds_x) == "it"
    assert found("x", holds_x, bad) == "it"
    assert found("y", bad, holds_x, timeout_s=0.01) is None


def test_replica_does_not_answer_itself() -> None:
    """It has looked before it asks, and a broadcast goes to all."""
    (alone,) = FakePeers(1)
    alone.offer("thing", holds_x)
    assert asyncio.run(alone.find("thing", "x")) is None


def test_nothing_is_found_where_nobody_offers_or_nobody_is_there() -> None:
    one, _ = FakePeers(2)
    assert asyncio.run(one.find("thing", "x")) is None
    assert asyncio.run(Peers().find("thing", "x")) is None

    class Gone:
        def broadcast(self, *args: Any) -> Any:
            raise DeploymentUnavailableError("Ingress")

    assert asyncio.run(Peers("a", Gone()).find("thing", "x")) is None


def test_who_asks_and_is_cancelled_stops_asking() -> None:
    async def main() -> None:
        asked, ended = asyncio.Event(), asyncio.Event()

        async def waits(key: str) -> None:
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        one, other = FakePeers(2)
        other.offer("thing", waits)
        asking = asyncio.create_task(one.find("thing", "x"))
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(main())


def test_arguments_besides_the_key_are_passed_on() -> None:
    async def after(key: str, start: int) -> str:
        return key[start:]

    one, other = FakePeers(2)
    other.offer("tail", after)
    assert asyncio.run(one.find("tail", "abc", 1)) == "bc"
