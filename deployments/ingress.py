"""Ingress replicas: vLLM's OpenAI app in front of the stages. They have no engine and need no GPU."""

import asyncio
import logging
import os
import time
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import EPDConfig, Stage
from serve_app.errors import CannotStart, EPDError
from serve_app.kv_layout import KVLayout, check_layouts
from serve_app.roles import ingress_args, model_path, replica_env
from serve_app.routing import StageHandle
from serve_app.start_failure import says_why
from serve_app.start_reason import sentence
from serve_app.status import Status

logger = logging.getLogger("ray.serve")

HEALTH_CACHE_S = 1.0
CONTROLLER_S = 5.0
"""For Serve's controller to answer."""

SCALED = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""States of a deployment whose number of replicas, which may be none, is what its autoscaling wants or on its way there."""


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    def __init__(self, config: EPDConfig, **handles: DeploymentHandle[Any]) -> None:
        self._config = config
        self._stages = {Stage(name): StageHandle(Stage(name), handle) for name, handle in handles.items()}
        context = serve.get_replica_context()
        self._app_name, self._replica = context.app_name, context.replica_id.unique_id
        self._health: tuple[float, dict[str, str]] = (-HEALTH_CACHE_S, {})
        self._probing = asyncio.Lock()
        self._asking: asyncio.Task[Any] | None = None
        for key, value in replica_env(config, None).items():
            os.environ.setdefault(key, value)

    async def __serve_build_asgi_app__(self) -> Any:
        """Build the app while the stages load, and take requests only when every stage can serve."""
        with says_why("ingress", str(self._config.model)):
            return await self._app()

    async def _app(self) -> Any:
        began = time.perf_counter()
        # Only now: vLLM reads its environment when it is imported.
        from serve_app import openai_app
        from serve_app.client import EPDClient
        from serve_app.warm_up import warm_up

        args = ingress_args(self._config, model_path(self._config))
        client = EPDClient(self._config, openai_app.ingress_vllm_config(args), self._stages)
        status = Status(self._stages, self._probe, self._census, lambda: {"replica": self._replica, **client.load})
        server_args = openai_app.server_args(self._config, args)
        app = await openai_app.make_app(self._config, server_args, client, status)
        built = time.perf_counter()
        await self._stages_ready()
        await self._stages_agree()
        ready = time.perf_counter()
        encoders = (await self._census()).get("encoder", {}).get("RUNNING", 0)  # none: scaled to zero, not to be woken
        key = next(iter(server_args.api_key or ()), os.environ.get("VLLM_API_KEY"))
        with_image = bool(encoders) and "image" in client.from_media
        await warm_up(app, self._config.model_name, key, with_image, self._config.kv.min_prompt_tokens)
        times = {"app": built - began, "stages": ready - built, "warm_up": time.perf_counter() - ready}
        logger.info("start-up ingress: " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in times.items()))
        return app

    async def _stages_ready(self) -> None:
        """Raises ``CannotStart`` when that takes too long."""
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                # Serve's controller has no event to wait for.
                while any(state != "healthy" for state in (await self._probe()).values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        except TimeoutError:
            states = ", ".join(f"{stage}: {state}" for stage, state in self._health[1].items())
            raise CannotStart(
                f"not ready within `startup_timeout_s: {self._config.startup_timeout_s:g}`: {states}"
            ) from None

    async def _stages_agree(self) -> None:
        """Raises ``CannotStart`` where decode could not take prefill's KV blocks."""
        if Stage.PREFILL not in self._stages or not self._config.kv.connector.startswith("Nixl"):
            return
        layouts = []
        for stage in (Stage.PREFILL, Stage.DECODE):
            try:
                replies = await self._stages[stage].broadcast("kv_layout")
            except EPDError:  # gone since it was ready
                return
            layouts.append([reply for reply in replies if isinstance(reply, KVLayout)])
        check_layouts(*layouts)

    async def _probe(self) -> dict[str, str]:
        """State per stage, as Serve's controller and the replicas themselves tell it; asked at most once a second."""
        async with self._probing:
            asked, states = self._health
            if time.monotonic() - asked >= HEALTH_CACHE_S:
                try:
                    deployments = await self._deployments()
                    asking = (self._state(stage, deployments.get(stage.capitalize())) for stage in self._stages)
                    states = dict(zip(self._stages, await asyncio.gather(*asking), strict=True))
                except TimeoutError:
                    states = dict.fromkeys(self._stages, "unknown: Ray Serve's controller does not answer")
                self._health = (time.monotonic(), states)
            return states

    async def _census(self) -> dict[str, dict[str, int]]:
        try:
            deployments = await self._deployments()
        except TimeoutError:
            deployments = {}
        return {
            name.lower(): {state: count for state, count in deployment.replica_states.items() if count}
            for name, deployment in deployments.items()
        }

    async def _deployments(self) -> dict[str, Any]:
        """Raises ``TimeoutError``. One thread asks, for all who want to know: while the controller is away it cannot be
        ended, and media from URLs need threads too."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(serve.status))
        status = await asyncio.wait_for(asyncio.shield(self._asking), CONTROLLER_S)
        deployments: dict[str, Any] = status.applications[self._app_name].deployments
        return deployments

    async def _state(self, stage: Stage, deployment: Any) -> str:
        if deployment is None:
            return "not deployed"
        if deployment.replica_states.get("RUNNING", 0) == 0:
            # Items do not wait for an encoder that has yet to start: prefill encodes them.
            scaled_to_zero = deployment.status.value in (SCALED if stage is Stage.ENCODER else SCALED[:1])
            why = sentence(deployment.message)
            none = f"no replica ({deployment.status.value})" + (f": {why}" if why else "")
            return "healthy" if scaled_to_zero else none
        return await self._asked(self._stages[stage])

    async def _asked(self, stage: StageHandle) -> str:
        """Whether one replica of a stage answers for its engine. Where one hangs, a broadcast has no answer at all: then
        the router, which prefers those that respond, picks one."""
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
