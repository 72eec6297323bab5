"""The start of an ingress replica: it builds its app while the stages load, and accepts requests when they can serve.

Import it after the replica has set its environment, which vLLM reads when it is imported.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from PIL import Image
from starlette.types import ASGIApp
from vllm.multimodal.utils import encode_image_url
from vllm.utils.gc_utils import freeze_gc_heap

from serve_app.config import EPDConfig, Http
from serve_app.ingress import server
from serve_app.ingress.assembly import assemble
from serve_app.ingress.door import Door
from serve_app.ingress.front import Address, Front
from serve_app.ingress.peers import Peers
from serve_app.ingress.readiness import Readiness
from serve_app.launch.engine_args import ingress_args, model_path
from serve_app.launch.fingerprint import front_of
from serve_app.observe.status import Status
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

logger = logging.getLogger("ray.serve")

WARM_UP_S = 60.0


@dataclass(frozen=True)
class Place:
    """What Ray Serve knows of one ingress replica."""

    replica: str
    address: Address
    channel_host: str
    """An address of this node that decode replicas can send output tokens to."""
    limit: int
    """Requests at a time."""


async def start(
    config: EPDConfig, place: Place, stages: Mapping[Stage, StageHandle], readiness: Readiness, peers: Peers
) -> Door | Front:
    """Returns the app behind its door, and with ``http: replicas`` behind a front that listens.

    Raises ``CannotStart`` if the stages are not ready in time, or run another version.
    """
    began = time.perf_counter()
    args = ingress_args(config, model_path(config))
    vllm_config = server.ingress_vllm_config(args)
    version = front_of(config, vllm_config.model_config)
    parts = assemble(config, vllm_config, stages, version, peers)
    await parts.client.pipeline.answers.inlet.listen(place.channel_host)
    parts.metrics.tell_ray()
    load = parts.client.pipeline.admission.load
    status = Status(stages, readiness.probe, readiness.census, lambda: {"replica": place.replica, **load()})
    server_args = server.server_args(config, args)
    if config.pools:  # its routes depend on what the engine's model is for
        await readiness.wait_ready()
    app = await server.make_app(config, server_args, parts, status, peers)
    built = time.perf_counter()
    await readiness.wait_ready()
    await readiness.wait_agreed(version)
    await parts.client.adapters.begin()
    ready = time.perf_counter()
    encoders = (await readiness.census()).get("encoder", {}).get("RUNNING", 0)  # none: scaled to zero, not to be woken
    key = next(iter(server_args.api_key or ()), os.environ.get("VLLM_API_KEY"))
    with_image = bool(encoders) and "image" in parts.from_media
    route = "/pooling" if config.pools else "/v1/chat/completions"
    await warm_up(app, route, config.model_name, key, with_image, config.advanced.kv.min_prompt_tokens)
    freeze_gc_heap()  # see `StageEngine`
    times = {"app": built - began, "stages": ready - built, "warm_up": time.perf_counter() - ready}
    logger.info("start-up ingress: " + " ".join(f"{name}={seconds:.1f}s" for name, seconds in times.items()))
    door, limits = Door(app, place.limit), config.timeouts
    if config.http is Http.PROXY:
        return door
    bounds = {"body_s": limits.request_s, "drain_s": limits.drain_s, "notice_s": limits.drain_notice_s}
    front = Front(door, place.address, **bounds)
    front.bind()
    return front


async def warm_up(app: ASGIApp, route: str, model: str, api_key: str | None, with_image: bool, tokens: int = 1) -> None:
    """Send the app a prompt of at least ``tokens``, so that no client waits for what happens once: imports, tokenizer,
    processors, connections to replicas, and NIXL's handshake of a prefill and a decode replica. A failure is only logged."""
    content: list[dict[str, object]] = [{"type": "text", "text": " ".join(["Hello"] * max(tokens, 1))}]
    if with_image:
        picture = encode_image_url(Image.new("RGB", (224, 224), "grey"))
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    body: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": content}]}
    if route != "/pooling":
        body |= {"max_tokens": 2, "stream": True}
    headers = {"x-request-id": "warm-up"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        transport = httpx.ASGITransport(app=app)
        async with (
            asyncio.timeout(WARM_UP_S),
            httpx.AsyncClient(transport=transport, base_url="http://ingress") as client,
        ):
            answer = await client.post(route, json=body, headers=headers)
        if answer.status_code != 200:
            logger.warning(f"The request to warm up was answered {answer.status_code}: {answer.text[:300]}")
    except Exception as error:  # Starlette raises an error again after it has answered it
        logger.warning(f"The request to warm up failed: {type(error).__name__}: {error}")
