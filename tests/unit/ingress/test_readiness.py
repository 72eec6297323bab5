"""What an ingress replica knows of the stages, as Serve's controller and the replicas tell it."""

import asyncio
import math
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.handoff.errors import CannotStart, StageUnavailable
from serve_app.handoff.types import Version
from serve_app.ingress import readiness
from serve_app.ingress.readiness import Readiness
from serve_app.stage import Stage
from serve_app.transfer.kv_layout import KVLayout
from tests.fakes import FakeStage


def made(stages: Mapping[Stage, Any] | None = None, startup_s: float = 60.0) -> Readiness:
    return Readiness(stages or {stage: FakeStage(stage) for stage in Stage}, dict, startup_s)


def deployment(status: str, message: str = "", **replicas: int) -> Any:
    return SimpleNamespace(status=SimpleNamespace(value=status), message=message, replica_states=replicas)


@pytest.mark.parametrize(
    ("status", "encoder", "others"),
    [
        ("HEALTHY", "healthy", "healthy"),
        ("UPSCALING", "healthy", "no replica (UPSCALING)"),
        ("DOWNSCALING", "healthy", "no replica (DOWNSCALING)"),
        ("UPDATING", "no replica (UPDATING)", "no replica (UPDATING)"),
        ("UNHEALTHY", "no replica (UNHEALTHY)", "no replica (UNHEALTHY)"),
    ],
)
def test_encoders_on_their_way_from_or_to_none_keep_nothing_from_being_served(
    status: str, encoder: str, others: str
) -> None:
    """A load balancer would take text away from a service whose encoder is loading its model."""
    states = [asyncio.run(made()._state(stage, deployment(status, STARTING=1))) for stage in Stage]
    assert states == [encoder, others, others]


def test_stage_that_cannot_start_says_why() -> None:
    message = (
        "A replica failed to start with exception. Error:\nserve_app.handoff.errors.CannotStart: decode cannot: no.\n"
    )
    state = asyncio.run(made()._state(Stage.DECODE, deployment("UNHEALTHY", message)))
    assert state == "no replica (UNHEALTHY): decode cannot: no."


def test_ingress_whose_stages_take_too_long_says_which() -> None:
    one = made(startup_s=0.01)
    one._told = (math.inf, {Stage.DECODE: "no replica (UPDATING)"})
    with pytest.raises(CannotStart, match=r"`timeouts.startup_s: 0.01`: decode: no replica \(UPDATING\)"):
        asyncio.run(one.wait_ready())


HOPPER = KVLayout("a", "FLASH_ATTN", "NVIDIA H100")
BLACKWELL = KVLayout("b", "FLASHINFER", "NVIDIA B200")
DEAD = StageUnavailable(Stage.PREFILL, "died")
MINE = Version("front")


def telling(stage: Stage, replies: Any) -> FakeStage:
    """A stage whose replicas tell what they are made of."""

    async def made_of() -> list[Any]:
        if isinstance(replies, Exception):
            raise replies
        return list(replies)

    return FakeStage(stage, made_of=made_of)


@pytest.mark.parametrize(
    ("prefill", "decode", "refused"),
    [
        ([HOPPER, HOPPER], [HOPPER], False),
        ([HOPPER, BLACKWELL], [HOPPER], True),
        ([DEAD, BLACKWELL], [HOPPER], True),
        ([DEAD], [HOPPER], False),
        (DEAD, [HOPPER], False),
        ([None], [HOPPER], False),
    ],
)
def test_ingress_does_not_start_where_decode_could_not_take_prefills_blocks(
    prefill: Any, decode: Any, refused: bool
) -> None:
    def told(layouts: Any) -> Any:
        return layouts if layouts is DEAD else [each if each is DEAD else (MINE, each) for each in layouts]

    one = made({stage: telling(stage, told(of)) for stage, of in ((Stage.PREFILL, prefill), (Stage.DECODE, decode))})
    if not refused:
        return asyncio.run(one.wait_agreed(MINE))
    with pytest.raises(CannotStart, match="NVIDIA B200, FLASHINFER"):
        asyncio.run(one.wait_agreed(MINE))


def test_ingress_whose_stages_run_in_another_version_waits_for_one_of_its_own() -> None:
    replies = [(Version("old"), None)]
    stages = {Stage.ENCODER: [], Stage.PREFILL: replies, Stage.DECODE: [(MINE, None), (Version("old"), None)]}
    one = made({stage: telling(stage, of) for stage, of in stages.items()}, startup_s=5)

    async def main() -> None:
        waiting = asyncio.create_task(one.wait_agreed(MINE))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        replies.append((MINE, None))
        await waiting

    asyncio.run(main())


def test_ingress_that_finds_no_stage_of_its_version_says_in_what_they_differ() -> None:
    one = made({Stage.DECODE: telling(Stage.DECODE, [(Version("old"), None)])}, startup_s=0.1)
    with pytest.raises(CannotStart, match=r"decode runs in another version \(front\): the model's files"):
        asyncio.run(one.wait_agreed(MINE))


def test_layouts_of_versions_that_hand_nothing_to_each_other_may_differ() -> None:
    old, new = (Version("old"), BLACKWELL), (MINE, HOPPER)
    one = made({stage: telling(stage, [old, new]) for stage in (Stage.PREFILL, Stage.DECODE)})
    asyncio.run(one.wait_agreed(MINE))


def test_controller_that_is_away_takes_one_thread_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    back, asked = threading.Event(), []

    def deployments() -> dict[str, Any]:
        asked.append(1)
        back.wait(30)
        return {"Decode": deployment("HEALTHY")}

    monkeypatch.setattr(readiness, "CONTROLLER_S", 0.05)
    monkeypatch.setattr(readiness, "PROBE_CACHE_S", 0.0)

    async def main() -> None:
        stages: Any = {stage: FakeStage(stage) for stage in Stage}
        one = Readiness(stages, deployments, 60.0)
        for _ in range(3):
            assert set((await one.probe()).values()) == {"unknown: Ray Serve's controller does not answer"}
        assert await one.census() == {}
        assert len(asked) == 1
        back.set()
        monkeypatch.setattr(readiness, "CONTROLLER_S", 10.0)
        assert (await one.probe())[Stage.DECODE] == "healthy"

    asyncio.run(main())
