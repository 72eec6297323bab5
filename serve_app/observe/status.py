"""The replicas of each stage, those that come and go included, and their work: `/status` as JSON."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serve_app.handoff.errors import EPDError
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

UNITS = {Stage.ENCODER: "media tokens", Stage.PREFILL: "prompt tokens", Stage.DECODE: "sequences"}
"""The unit of a stage's work, see ``stages.workload``."""

CACHE_S = 1.0
TIMEOUT_S = 2.0

Probe = Callable[[], Awaitable[dict[str, str]]]
"""The state of each stage: ``healthy`` if it can serve."""

Census = Callable[[], Awaitable[dict[str, dict[str, int]]]]
"""Replicas of each stage and the ingress, by Serve's state: ``{"decode": {"RUNNING": 1, "STARTING": 1}}``."""


class Status:
    """The status as one ingress replica sees it. It asks replicas at most once a second."""

    def __init__(
        self,
        stages: Mapping[Stage, StageHandle],
        probe: Probe,
        census: Census,
        ingress: Callable[[], dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = stages
        self.probe = probe
        self._census = census
        self._ingress = ingress
        self._clock = clock
        self._asking = asyncio.Lock()
        self._told: tuple[float, list[dict[str, Any]]] = (-CACHE_S, [])

    async def tell(self) -> list[dict[str, Any]]:
        """One object per stage in the order of the data, the ingress first.

        The loads are this replica's for the ingress and those of all replicas for a stage (``EngineReplica.load``). A stage
        has none if one of its replicas hangs, as a broadcast has no answer then.
        """
        async with self._asking:
            if self._clock() - self._told[0] >= CACHE_S:
                self._told = (self._clock(), await self._ask())
            return self._told[1]

    async def _ask(self) -> list[dict[str, Any]]:
        states, census, *loads = await asyncio.gather(
            self.probe(), self._census(), *(self._loads(handle) for handle in self._stages.values())
        )
        told = [("ingress", "healthy", "requests", [self._ingress()])]
        told += [
            (stage, states.get(stage, "unknown"), UNITS[stage], load)
            for stage, load in zip(self._stages, loads, strict=True)
        ]
        return [
            {"stage": stage, "state": state, "replicas": census.get(stage, {}), "unit": unit, "loads": load}
            for stage, state, unit, load in told
        ]

    async def _loads(self, handle: StageHandle) -> list[dict[str, Any]]:
        try:
            replies = await handle.broadcast("load", timeout_s=TIMEOUT_S)
        except EPDError:
            return []
        return [reply for reply in replies if isinstance(reply, dict)]
