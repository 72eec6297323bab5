"""What waits at the ingress for decode keeps its KV blocks at prefill."""

import asyncio
from typing import Any

import pytest

from serve_app.handoff.errors import EngineDead, HandoffLost
from serve_app.ingress.pipeline import leases
from serve_app.stage import Stage

SOON_S = 0.01


class FakePrefill:
    """Two replicas, one of which does not answer."""

    def __init__(self) -> None:
        self.renewed: list[str] = []

    async def broadcast(self, method: str, request_ids: list[str], timeout_s: float) -> list[Any]:
        assert method == "renew"
        self.renewed = request_ids
        return [{"c", "of another ingress"}, EngineDead(Stage.PREFILL, "is dead")]


def test_leases_of_what_waits_are_renewed_and_what_has_none_any_more_is_lost() -> None:
    async def scenario() -> None:
        prefill: Any = FakePrefill()
        waits = leases(prefill, 6 * SOON_S)
        held = asyncio.create_task(waits.wait("a", asyncio.Event().wait()))
        with pytest.raises(HandoffLost, match="lease"):
            await waits.wait("c", asyncio.Event().wait())
        assert sorted(prefill.renewed) == ["a", "c"]
        assert not held.done()
        held.cancel()

    asyncio.run(scenario())
