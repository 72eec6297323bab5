"""deployments.ingress: what it tells of the stages, as Serve's controller and the replicas tell it."""

import asyncio
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from deployments import ingress
from deployments.ingress import Ingress
from serve_app.config import EPDConfig, Stage
from serve_app.errors import CannotStart, StageUnavailable
from serve_app.kv_layout import KVLayout
from tests.fakes import FakeStage

pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited"
)  # Serve awaits an ASGI replica's __del__


def made() -> Any:
    one = object.__new__(Ingress.func_or_class)  # type: ignore[attr-defined]
    stages = {stage: FakeStage(stage) for stage in Stage}
    state = {"_stages": stages, "_app_name": "epd", "_health": (-10.0, {}), "_asking": None}
    one.__dict__.update(state)
    return one


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
        "A replica failed to start with exception. Retrying. Error:\nserve_app.errors.CannotStart: decode cannot: no.\n"
    )
    state = asyncio.run(made()._state(Stage.DECODE, deployment("UNHEALTHY", message)))
    assert state == "no replica (UNHEALTHY): decode cannot: no."


def test_ingress_whose_stages_take_too_long_says_which() -> None:
    one = made()
    one._config = EPDConfig(startup_timeout_s=0.01)
    one._probing, one._health = asyncio.Lock(), (math.inf, {Stage.DECODE: "no replica (UPDATING)"})
    with pytest.raises(CannotStart, match=r"`startup_timeout_s: 0.01`: decode: no replica \(UPDATING\)"):
        asyncio.run(one._stages_ready())


HOPPER = KVLayout("a", "FLASH_ATTN", "NVIDIA H100")
BLACKWELL = KVLayout("b", "FLASHINFER", "NVIDIA B200")
DEAD = StageUnavailable(Stage.PREFILL, "died")


@pytest.mark.parametrize(
    ("prefill", "decode", "args", "refused"),
    [
        ([HOPPER, HOPPER], [HOPPER], {}, False),
        ([HOPPER, BLACKWELL], [HOPPER], {}, True),
        ([DEAD, BLACKWELL], [HOPPER], {}, True),
        ([DEAD], [HOPPER], {}, False),
        (DEAD, [HOPPER], {}, False),
        ([BLACKWELL], [HOPPER], {"kv": {"connector": "Mine", "module_path": "mine"}}, False),
    ],
)
def test_ingress_does_not_start_where_decode_could_not_take_prefills_blocks(
    prefill: Any, decode: Any, args: dict[str, Any], refused: bool
) -> None:
    def stage(of: Stage, replies: Any) -> FakeStage:
        async def kv_layout() -> list[Any]:
            if isinstance(replies, Exception):
                raise replies
            return list(replies)

        return FakeStage(of, kv_layout=kv_layout)

    one = made()
    one._config = EPDConfig(**args)
    one._stages = {Stage.PREFILL: stage(Stage.PREFILL, prefill), Stage.DECODE: stage(Stage.DECODE, decode)}
    if not refused:
        return asyncio.run(one._stages_agree())
    with pytest.raises(CannotStart, match="NVIDIA B200, FLASHINFER"):
        asyncio.run(one._stages_agree())


def test_controller_that_is_away_takes_one_thread_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    back, asked = threading.Event(), []

    def status() -> Any:
        asked.append(1)
        back.wait(30)
        return SimpleNamespace(applications={"epd": SimpleNamespace(deployments={"Decode": deployment("HEALTHY")})})

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(ingress, "CONTROLLER_S", 0.05)
    monkeypatch.setattr(ingress, "HEALTH_CACHE_S", 0.0)

    async def main() -> None:
        one = made()
        one._probing = asyncio.Lock()
        for _ in range(3):
            assert set((await one._probe()).values()) == {"unknown: Ray Serve's controller does not answer"}
        assert await one._census() == {}
        assert len(asked) == 1
        back.set()
        monkeypatch.setattr(ingress, "CONTROLLER_S", 10.0)
        assert (await one._probe())[Stage.DECODE] == "healthy"

    asyncio.run(main())
