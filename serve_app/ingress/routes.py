"""Routes that answer for all replicas of all stages, and refusals of vLLM's routes that are not served."""

import json
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from serve_app.handoff.errors import EPDError
from serve_app.ingress.replies import error_response
from serve_app.observe.metrics import merge_metrics
from serve_app.observe.status import Status
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

NOT_HERE = {
    "/inference/v1/generate": "it takes features and transfer parameters from outside, and an engine that lacks them dies",
    "/inference/v1/abort_requests": "a request ends everywhere when its client closes the connection",
    "/scale_elastic_ep": "stages scale by `deployments:` in the Serve config",
    "/is_scaling_elastic_ep": "stages scale by `deployments:` in the Serve config",
    "/invocations": "it would generate without the API key: use the routes below /v1",
    "/generative_scoring": "it would generate without the API key: use the routes below /v1",
}
REPLACED = {"/health", "/ping", "/metrics", "/start_profile", "/stop_profile"}


def add_routes(app: FastAPI, stages: Mapping[Stage, StageHandle], status: Status) -> None:
    """Replace vLLM's routes of the same paths."""
    drop = REPLACED | NOT_HERE.keys()
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in drop]

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> JSONResponse:
        """200 if every stage can serve."""
        stages = await status.probe()
        ok = all(state == "healthy" for state in stages.values())
        return JSONResponse({"ingress": "healthy", **stages}, status_code=200 if ok else 503)

    @app.get("/status")
    async def tell_status() -> JSONResponse:
        """Every stage with its replicas and their work."""
        return JSONResponse(await status.tell(), headers={"cache-control": "no-store"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """vLLM's metrics of all engines, labelled with stage and replica."""
        replies = chain.from_iterable((await broadcast("metrics")).values())
        texts = [reply for reply in replies if isinstance(reply, tuple)]
        return PlainTextResponse(merge_metrics(texts), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def broadcast(method: str, *args: Any, timeout_s: float = 10.0) -> dict[str, list[Any]]:
        replies: dict[str, list[Any]] = {}
        for stage, handle in stages.items():
            try:
                replies[stage] = await handle.broadcast(method, *args, timeout_s=timeout_s)
            except EPDError as error:
                replies[stage] = [error]
        return replies

    async def profile(method: str, *args: Any) -> JSONResponse:
        """The ids of all replicas, by stage, or an error with what failed."""
        replies = await broadcast(method, *args, timeout_s=120.0)
        failed = [str(reply) for reply in chain.from_iterable(replies.values()) if isinstance(reply, Exception)]
        if failed:
            return error_response(503, "; ".join(dict.fromkeys(failed)), "ServiceUnavailableError")
        return JSONResponse({stage: [str(reply) for reply in told] for stage, told in replies.items()})

    @app.post("/start_profile")
    async def start_profile(request: Request) -> JSONResponse:
        try:
            overrides = json.loads(await request.body() or b"{}")
        except ValueError:
            overrides = None
        if not isinstance(overrides, dict):
            return error_response(400, "The body must be a JSON object.")
        allowed = ("profile_prefix", "delay_iterations", "max_iterations")
        given = {key: overrides[key] for key in allowed if overrides.get(key) is not None}
        return await profile("start_profile", given)

    @app.post("/stop_profile")
    async def stop_profile() -> JSONResponse:
        return await profile("stop_profile")

    for path, reason in NOT_HERE.items():
        app.add_api_route(path, _refuse(path, reason), methods=["GET", "POST"], include_in_schema=False)


def _refuse(path: str, reason: str) -> Callable[[], Awaitable[JSONResponse]]:
    async def refuse() -> JSONResponse:
        return error_response(400, f"{path} is not served by a disaggregated server: {reason}.")

    return refuse
