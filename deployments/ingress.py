"""Ingress replicas: vLLM's OpenAI app in front of the stages. They have no engine and need no GPU."""

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments._http import check_scaling, public_address
from serve_app.config import EPDConfig, Http
from serve_app.handoff.errors import CannotStart, EPDError
from serve_app.handoff.types import Version
from serve_app.ingress.peers import Peers
from serve_app.launch.engine_args import ingress_args, model_path, replica_env
from serve_app.launch.placement import is_elastic
from serve_app.launch.start_failure import says_why
from serve_app.launch.start_reason import sentence
from serve_app.observe.status import Status
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage
from serve_app.transfer.kv_layout import KVLayout, check_layouts

if TYPE_CHECKING:
    from serve_app.ingress.front import Front

logger = logging.getLogger("ray.serve")

HEALTH_CACHE_S = 1.0
AGREE_POLL_S = 0.5
CONTROLLER_S = 5.0
"""For Serve's controller to answer."""

SCALED = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""States of a deployment whose number of replicas, which may be none, is what its autoscaling wants or on its way there."""


def channel_host() -> str:
    """Where decode replicas bring their tokens: an address of this node that the others reach."""
    return "127.0.0.1" if len(ray.nodes()) == 1 and not is_elastic() else str(ray.util.get_node_ip_address())


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    def __init__(self, config: EPDConfig, **handles: DeploymentHandle[Any]) -> None:
        self._config = config
        self._stages = {Stage(name): StageHandle(Stage(name), handle) for name, handle in handles.items()}
        context = serve.get_replica_context()
        self._app_name, self._replica = context.app_name, context.replica_id.unique_id
        self._deployment = context._deployment_config
        own = serve.get_deployment_handle(context.deployment, context.app_name, _check_exists=False)
        self._peers = Peers(self._replica, own)
        self._health: tuple[float, dict[str, str]] = (-HEALTH_CACHE_S, {})
        self._probing = asyncio.Lock()
        self._asking: asyncio.Task[Any] | None = None
        self._front: Front | None = None
        for key, value in replica_env(config, None).items():
            os.environ.setdefault(key, value)

    async def __serve_build_asgi_app__(self) -> Any:
        """Build the app while the stages load, and take requests only when every stage can serve."""
        with says_why("ingress", str(self._config.model)):
            return await self._app()

    async def _app(self) -> Any:
        began = time.perf_counter()
        address = await asyncio.to_thread(public_address, self._config.http, self._app_name)
        check_scaling(self._config.http, self._deployment)
        # Only now: vLLM reads its environment when it is imported.
        from vllm.utils.gc_utils import freeze_gc_heap

        from serve_app.ingress import server
        from serve_app.ingress.assembly import assemble
        from serve_app.ingress.door import Door
        from serve_app.ingress.front import Front
        from serve_app.ingress.warm_up import warm_up
        from serve_app.launch.fingerprint import front_of

        args = ingress_args(self._config, model_path(self._config))
        vllm_config = server.ingress_vllm_config(args)
        version = front_of(self._config, vllm_config.model_config)
        parts = assemble(self._config, vllm_config, self._stages, version)
        await parts.client.pipeline.answers.inlet.listen(channel_host())
        parts.metrics.tell_ray()
        load = parts.client.pipeline.admission.load
        status = Status(self._stages, self._probe, self._census, lambda: {"replica": self._replica, **load()})
        server_args = server.server_args(self._config, args)
        app = await server.make_app(self._config, server_args, parts, status, self._peers)
        built = time.perf_counter()
        await self._stages_ready()
        await self._stages_agree(version)
        ready = time.perf_counter()
        encoders = (await self._census()).get("encoder", {}).get("RUNNING", 0)  # none: scaled to zero, not to be woken
        key = next(iter(server_args.api_key or ()), os.environ.get("VLLM_API_KEY"))
        with_image = bool(encoders) and "image" in parts.from_media
        await warm_up(app, self._config.model_name, key, with_image, self._config.kv.min_prompt_tokens)
        freeze_gc_heap()  # see `StageEngine`
        times = {"app": built - began, "stages": ready - built, "warm_up": time.perf_counter() - ready}
        logger.info("start-up ingress: " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in times.items()))
        self._door = Door(app, self._deployment.max_ongoing_requests)
        if self._config.http is Http.PROXY:
            return self._door
        bounds = {"body_s": self._config.request_timeout_s, "drain_s": self._config.drain_timeout_s}
        self._front = Front(self._door, address, **bounds, notice_s=self._config.drain_notice_s)
        self._front.bind()
        return self._front

    async def close(self) -> tuple[int, float]:
        """Take no more requests, for good. How many are under way, and the seconds that they get to end."""
        if self._front is not None:
            self._front.close()
        return self._door.close(), self._config.drain_timeout_s

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve brings to ``IngressPolicy``."""
        return {"requests": float(self._door.inside)}

    async def tell_peer(self, asker: str, what: str, key: str, *args: Any) -> Any | None:
        """What another ingress replica asks this one for, see ``Peers``."""
        return await self._peers.tell(asker, what, key, *args)

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

    async def _stages_agree(self, version: Version) -> None:
        """Wait for a replica of this version in each stage that has any: while a deploy goes on, the last may be about to
        start. Raises ``CannotStart`` when that takes too long, or where decode could not take prefill's KV blocks."""
        waits_for = ""
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                while others := await self._others(version):
                    if others != waits_for:
                        logger.warning(f"waits for stages of its own version: {others}")
                    waits_for = others
                    await asyncio.sleep(AGREE_POLL_S)
        except TimeoutError:
            raise CannotStart(
                f"{waits_for}: the model's files, the configuration or the release of vLLM are not the same on all nodes"
            ) from None
        prefill, decode = [await self._made_of(stage) for stage in (Stage.PREFILL, Stage.DECODE)]
        check_layouts(*([layout for of, layout in told if layout and of.fits(version)] for told in (prefill, decode)))

    async def _others(self, version: Version) -> str:
        """Stages whose replicas are all of another version, and in which respects."""
        others = []
        for stage in self._stages:
            differ = [of.other_than(version) for of, _ in await self._made_of(stage)]
            if differ and all(differ):
                others.append(f"{stage} runs in another version ({', '.join(differ[0])})")
        return ", ".join(others)

    async def _made_of(self, stage: Stage) -> list[tuple[Version, KVLayout | None]]:
        """What the replicas of a stage are made of, as far as they tell."""
        try:
            replies = await self._stages[stage].broadcast("made_of") if stage in self._stages else []
        except EPDError:  # gone since it was ready
            return []
        return [reply for reply in replies if not isinstance(reply, Exception)]

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
