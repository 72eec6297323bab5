"""What `/status` tells of every stage."""

import asyncio
from typing import Any

from serve_app.handoff.errors import StageUnavailable
from serve_app.observe.status import CACHE_S, Status
from serve_app.stage import Stage
from tests.fakes import FakeClock, FakeStage


class Watched:
    """A prefill stage that does not answer, and decode with two replicas of which one answers; another is starting."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        failed = StageUnavailable(Stage.DECODE, "is gone")

        async def load() -> list[Any]:
            return [{"replica": "d1", "calls": 2.0, "outstanding": 2.0}, failed]

        async def silent() -> list[Any]:
            raise StageUnavailable(Stage.PREFILL, "did not answer")

        self.stages = {
            Stage.PREFILL: FakeStage(Stage.PREFILL, load=silent),
            Stage.DECODE: FakeStage(Stage.DECODE, load=load),
        }

        async def probe() -> dict[str, str]:
            return {"prefill": "unhealthy: gone", "decode": "healthy"}

        async def census() -> dict[str, dict[str, int]]:
            return {"ingress": {"RUNNING": 1}, "prefill": {"RUNNING": 1}, "decode": {"RUNNING": 2, "STARTING": 1}}

        ingress = {"replica": "i1", "calls": 3.0, "outstanding": 3.0}
        self.status = Status(self.stages, probe, census, lambda: ingress, self.clock)  # type: ignore[arg-type]


def test_every_stage_is_told_with_the_replicas_that_answer_and_those_that_come() -> None:
    ingress, prefill, decode = asyncio.run(Watched().status.tell())
    assert (ingress["stage"], ingress["state"], ingress["unit"]) == ("ingress", "healthy", "requests")
    assert [load["replica"] for load in ingress["loads"]] == ["i1"]
    assert (prefill["state"], prefill["loads"], prefill["unit"]) == ("unhealthy: gone", [], "prompt tokens")
    assert [load["replica"] for load in decode["loads"]] == ["d1"]
    assert decode["replicas"] == {"RUNNING": 2, "STARTING": 1}


def test_many_who_look_at_once_ask_each_replica_once() -> None:
    async def main() -> None:
        watched = Watched()
        await asyncio.gather(*(watched.status.tell() for _ in range(5)))
        assert len(watched.stages[Stage.DECODE].calls) == 1
        watched.clock.now += CACHE_S
        await watched.status.tell()
        assert len(watched.stages[Stage.DECODE].calls) == 2

    asyncio.run(main())
