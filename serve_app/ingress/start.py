"""The start of an ingress replica: builds its app while the stages load, and lets requests in when every stage can serve.

To be imported once the replica has set its environment, which vLLM reads when it is imported.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vllm.utils.gc_utils import freeze_gc_heap

from serve_app.config import EPDConfig, Http
from serve_app.ingress import server
from serve_app.ingress.address import Address
from serve_app.ingress.assembly import assemble
from serve_app.ingress.door import Door
from serve_app.ingress.front import Front
from serve_app.ingress.peers import Peers
from serve_app.ingress.readiness import Readiness
from serve_app.ingress.warm_up import warm_up
from serve_app.launch.engine_args import ingress_args, model_path
from serve_app.launch.fingerprint import front_of
from serve_app.observe.status import Status
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Place:
    """Of one ingress replica, as Ray Serve has it."""

    replica: str
    address: Address
    channel_host: str
    """Where decode replicas bring their tokens: an address of this node that the others reach."""
    limit: int
    """Requests that it has under way at most."""


class Serving:
    """What a replica serves: its app behind its door, and with ``http: replicas`` its front, which listens."""

    def __init__(self, config: EPDConfig, place: Place, door: Door) -> None:
        self.door = door
        self.front: Front | None = None
        self._drain_s = config.timeouts.drain_s
        if config.http is Http.REPLICAS:
            limits = config.timeouts
            bounds = {"body_s": limits.request_s, "drain_s": limits.drain_s, "notice_s": limits.drain_notice_s}
            self.front = Front(door, place.address, **bounds)
            self.front.bind()

    @property
    def app(self) -> Door | Front:
        return self.front or self.door

    def close(self) -> tuple[int, float]:
        """Take no more requests, for good. How many are under way, and the seconds that they get to end."""
        if self.front is not None:
            self.front.close()
        return self.door.close(), self._drain_s


async def start(
    config: EPDConfig, place: Place, stages: Mapping[Stage, StageHandle], readiness: Readiness, peers: Peers
) -> Serving:
    """Raises ``CannotStart`` where the stages are not ready in time, or are not of this version."""
    began = time.perf_counter()
    args = ingress_args(config, model_path(config))
    vllm_config = server.ingress_vllm_config(args)
    version = front_of(config, vllm_config.model_config)
    parts = assemble(config, vllm_config, stages, version)
    await parts.client.pipeline.answers.inlet.listen(place.channel_host)
    parts.metrics.tell_ray()
    load = parts.client.pipeline.admission.load
    status = Status(stages, readiness.probe, readiness.census, lambda: {"replica": place.replica, **load()})
    server_args = server.server_args(config, args)
    app = await server.make_app(config, server_args, parts, status, peers)
    built = time.perf_counter()
    await readiness.wait_ready()
    await readiness.wait_agreed(version)
    ready = time.perf_counter()
    encoders = (await readiness.census()).get("encoder", {}).get("RUNNING", 0)  # none: scaled to zero, not to be woken
    key = next(iter(server_args.api_key or ()), os.environ.get("VLLM_API_KEY"))
    with_image = bool(encoders) and "image" in parts.from_media
    await warm_up(app, config.model_name, key, with_image, config.advanced.kv.min_prompt_tokens)
    freeze_gc_heap()  # see `StageEngine`
    times = {"app": built - began, "stages": ready - built, "warm_up": time.perf_counter() - ready}
    logger.info("start-up ingress: " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in times.items()))
    return Serving(config, place, Door(app, place.limit))
