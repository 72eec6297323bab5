"""deployments.ingress: what it tells of the stages, as Serve's controller and the replicas tell it."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from deployments import ingress
from deployments.ingress import Ingress
from serve_app.config import Stage
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


def deployment(status: str, **replicas: int) -> Any:
    return SimpleNamespace(status=SimpleNamespace(value=status), replica_states=replicas)


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
