"""Whether the stages behind an ingress replica can serve, asked of Ray Serve's controller and of the replicas."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve_app.handoff.errors import CannotStart, EPDError
from serve_app.handoff.types import Version
from serve_app.launch.start_reason import sentence
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage
from serve_app.transfer.kv_layout import KVLayout, check_layouts

logger = logging.getLogger("ray.serve")

PROBE_CACHE_S = 1.0
CONTROLLER_S = 5.0
"""Seconds for Serve's controller to answer."""


class Readiness:
    """The readiness of one application's stages for one ingress replica."""

    def __init__(
        self,
        stages: Mapping[Stage, StageHandle],
        deployments: Callable[[], Mapping[str, Any]],
        startup_s: float,
    ) -> None:
        """``deployments`` asks Serve's controller for a ``DeploymentStatusOverview`` per name, and blocks meanwhile."""
        self._stages = stages
        self._ask_controller = deployments
        self._startup_s = startup_s
        self._told: tuple[float, dict[str, str]] = (-PROBE_CACHE_S, {})
        self._probing = asyncio.Lock()
        self._asking: asyncio.Task[Mapping[str, Any]] | None = None

    async def wait_ready(self) -> None:
        """Raises ``CannotStart`` after ``timeouts.startup_s``."""
        try:
            async with asyncio.timeout(self._startup_s):
                # Serve's controller has no event to wait for.
                while any(state != "healthy" for state in (await self.probe()).values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        except TimeoutError:
            states = ", ".join(f"{stage}: {state}" for stage, state in self._told[1].items())
            raise CannotStart(f"not ready within `timeouts.startup_s: {self._startup_s:g}`: {states}") from None

    async def wait_agreed(self, version: Version) -> None:
        """Wait until each stage with replicas has one of this version; during a deploy it may still have to start.

        Raises ``CannotStart`` after ``timeouts.startup_s``, or if decode cannot take prefill's KV blocks."""
        waits_for = ""
        try:
            async with asyncio.timeout(self._startup_s):
                while others := await self._others(version):
                    if others != waits_for:
                        logger.warning(f"waits for stages of its own version: {others}")
                    waits_for = others
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise CannotStart(
                f"{waits_for}: the model's files, the configuration or the release of vLLM are not the same on all nodes"
            ) from None
        prefill, decode = [await self._made_of(stage) for stage in (Stage.PREFILL, Stage.DECODE)]
        check_layouts(*([layout for of, layout in told if layout and of.fits(version)] for told in (prefill, decode)))

    async def probe(self) -> dict[str, str]:
        """State per stage, ``healthy`` if it can serve. The answer is at most a second old."""
        async with self._probing:
            asked, states = self._told
            if time.monotonic() - asked >= PROBE_CACHE_S:
                try:
                    deployments = await self._deployments()
                    asking = (self._state(stage, deployments.get(stage.capitalize())) for stage in self._stages)
                    states = dict(zip(self._stages, await asyncio.gather(*asking), strict=True))
                except TimeoutError:
                    states = dict.fromkeys(self._stages, "unknown: Ray Serve's controller does not answer")
                self._told = (time.monotonic(), states)
            return states

    async def census(self) -> dict[str, dict[str, int]]:
        """Replicas per stage and of the ingress, by Serve's state; empty while the controller does not answer."""
        try:
            deployments = await self._deployments()
        except TimeoutError:
            deployments = {}
        return {
            name.lower(): {state: count for state, count in deployment.replica_states.items() if count}
            for name, deployment in deployments.items()
        }

    async def _deployments(self) -> Mapping[str, Any]:
        """Raises ``TimeoutError``. All callers share one thread: it cannot be ended while the controller does not answer,
        and media from URLs need threads too."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(self._ask_controller))
        return await asyncio.wait_for(asyncio.shield(self._asking), CONTROLLER_S)

    async def _state(self, stage: Stage, deployment: Any | None) -> str:
        if deployment is None:
            return "not deployed"
        if deployment.replica_states.get("RUNNING", 0) == 0:
            # Autoscaling may want none. Prefill encodes items while the first encoder starts.
            wanted = ("HEALTHY", "UPSCALING", "DOWNSCALING") if stage is Stage.ENCODER else ("HEALTHY",)
            if deployment.status.value in wanted:
                return "healthy"
            why = sentence(deployment.message)
            return f"no replica ({deployment.status.value})" + (f": {why}" if why else "")
        return await self._check_health(self._stages[stage])

    async def _check_health(self, stage: StageHandle) -> str:
        """Whether one replica's engine is healthy. If one hangs, the broadcast fails; then the router picks one, and
        it prefers those that respond."""
        try:
            replies = await stage.broadcast("check_health", timeout_s=2.0)
            if any(not isinstance(reply, Exception) for reply in replies):
                return "healthy"
            return f"unhealthy: {replies[0] if replies else 'no replica'}"
        except EPDError:
            pass
        try:
            async with asyncio.timeout(5.0):
                await stage.call("check_health")
            return "healthy"
        except (EPDError, TimeoutError) as error:
            return f"unhealthy: {error or 'no replica answers'}"

    async def _others(self, version: Version) -> str:
        """The stages whose replicas all have another version, and how it differs."""
        others = []
        for stage in self._stages:
            differ = [of.other_than(version) for of, _ in await self._made_of(stage)]
            if differ and all(differ):
                others.append(f"{stage} runs in another version ({', '.join(differ[0])})")
        return ", ".join(others)

    async def _made_of(self, stage: Stage) -> list[tuple[Version, KVLayout | None]]:
        """Version and KV layout of the replicas that answer."""
        try:
            replies = await self._stages[stage].broadcast("made_of") if stage in self._stages else []
        except EPDError:  # the stage was ready, and is gone
            return []
        return [reply for reply in replies if not isinstance(reply, Exception)]
