"""vLLM's OpenAI app around our client, with the routes and the middleware that a pipeline of stages needs.

- the status line of a response waits for the first token, so whatever fails before it is a real 4xx or 5xx with OpenAI's
  error body, streaming or not;
- ``/health``, ``/metrics``, ``/start_profile`` and ``/stop_profile`` speak for all replicas of all stages;
- routes that would hand a client's own features or transfer parameters to an engine answer 400.
"""

import asyncio
import json
import logging
import re
import traceback
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.dependencies.utils import request_body_to_args
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError, EPDError
from serve_app.ingress import media
from serve_app.ingress.client import EPDClient
from serve_app.ingress.peers import Peers
from serve_app.ingress.responses import Responses
from serve_app.media.fetch import Fetcher
from serve_app.observe import trace
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.metrics import merge_metrics
from serve_app.observe.status import Status
from serve_app.observe.trace import Trace
from serve_app.observe.tracing import Tracing, tracing
from serve_app.page import add_page

logger = logging.getLogger("ray.serve")  # Serve's own: it knows the replica and writes to its files

SERVER_ARGS = frozenset(
    {"host", "port", "uds", "grpc_port", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"}
)
"""Arguments of vLLM's server for what Ray Serve does here (``http_options:``)."""

NOT_HERE = {
    "/inference/v1/generate": "it takes features and transfer parameters from outside, and an engine that lacks them dies",
    "/inference/v1/abort_requests": "a request ends everywhere when its client closes the connection",
    "/v1/load_lora_adapter": "LoRA adapters are not passed on to the stages",
    "/v1/unload_lora_adapter": "LoRA adapters are not passed on to the stages",
    "/scale_elastic_ep": "stages scale by `deployments:` in the Serve config",
    "/is_scaling_elastic_ep": "stages scale by `deployments:` in the Serve config",
    "/invocations": "it would generate without the API key: use the routes below /v1",
    "/generative_scoring": "it would generate without the API key: use the routes below /v1",
}
REPLACED = {"/health", "/ping", "/metrics", "/start_profile", "/stop_profile"}


def check_api_args(api: dict[str, Any]) -> None:
    """Refuse names under ``api:`` that vLLM's server does not know, before anything is started."""
    for key in api:
        if key in SERVER_ARGS:
            raise ConfigError(f"`api.{key}` is Ray Serve's here: set `http_options:` in the Serve config")
        if key == "lora_modules":
            raise ConfigError("`api.lora_modules`: LoRA adapters are not passed on to the stages; serve a merged model")
        if key not in FrontendArgs.__dataclass_fields__:
            raise ConfigError(
                f"`api.{key}` is not an argument of this vLLM's API server (`vllm serve --help` lists them)"
            )


def server_args(config: EPDConfig, engine_args: dict[str, Any]) -> Namespace:
    """The arguments that ``vllm serve`` would have parsed."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for key, value in (engine_args | config.api).items():
        setattr(args, key, value)
    if isinstance(args.api_key, str):
        args.api_key = [args.api_key]
    args.structured_outputs_config = AsyncEngineArgs(**engine_args).create_structured_outputs_config()
    args.disable_log_stats = True  # the engines log theirs
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`api:` {error}") from error
    return args


def ingress_vllm_config(engine_args: dict[str, Any]) -> VllmConfig:
    """What rendering and validation need, made without a device as vLLM's own render server does it."""
    parsed = AsyncEngineArgs(**engine_args)
    model_config = parsed.create_model_config()
    model_config.quantization = None  # weights are the engines' business
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    vllm_config = VllmConfig(
        model_config=model_config,
        logging_config=parsed.create_logging_config(),
        structured_outputs_config=parsed.create_structured_outputs_config(),
    )
    if model_config.multimodal_config is not None:
        # Prompts are rendered around metadata of items (from_media.py); clients still cannot send any (enable_mm_embeds).
        model_config.multimodal_config.allow_missing_mm_embeddings = True
    if parsed.max_num_seqs is not None:
        vllm_config.scheduler_config.max_num_seqs = parsed.max_num_seqs
    vllm_config.scheduler_config.stream_interval = parsed.stream_interval
    return vllm_config


async def make_app(
    config: EPDConfig, args: Namespace, client: EPDClient, status: Status, peers: Peers | None = None
) -> ASGIApp:
    """The ASGI app of an ingress replica."""
    folder = config.media.allowed_local_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"`media.allowed_local_path: {folder}` is no folder on the node of this ingress replica")
    fetcher = media.install(config.media, client.from_media, client.admission, peers)
    app = build_app(args, ("generate",), client.model_config)
    _shape_errors(app)
    app.router.lifespan_context = _then_close(app.router.lifespan_context, fetcher)
    await init_app_state(client, app.state, args, ("generate",))
    drop = REPLACED | NOT_HERE.keys()
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in drop]
    # It counts for this process' own page, which nobody can read: /metrics here is that of the engines.
    app.user_middleware[:] = [
        each for each in app.user_middleware if each.cls is not PrometheusInstrumentatorMiddleware
    ]
    app.state.openai_serving_responses = Responses(
        app.state.openai_serving_responses, peers or Peers(), config.response_store_bytes
    )
    _add_routes(app, client, status)
    if config.page:
        add_page(app)
    return PipelineMiddleware(app, config.media.max_body_bytes, client.metrics, tracing(config.tracing))


def _shape_errors(app: FastAPI) -> None:
    """Every error that a handler of the app answers has the body that the route's API has for errors.

    vLLM's handler of HTTP errors is registered for FastAPI's class; what FastAPI raises itself, for a body that it cannot
    read or a route that is not there, is the base class.
    """
    app.exception_handler(AnyHTTPException)(http_exception_handler)
    for mistake in (AttributeError, LookupError, AssertionError):
        app.exception_handler(mistake)(_unreadable)

    def shaped(handler: Any) -> Any:
        async def answer(request: Request, error: Exception) -> JSONResponse:
            return of_route(route_of(request.scope), await handler(request, error))

        return answer

    for kind, handler in app.exception_handlers.items():
        if kind is not WebSocketRequestValidationError:
            app.exception_handlers[kind] = shaped(handler)
    app.middleware_stack = None  # built again with the first request; build_app has built it from other handlers


async def _unreadable(request: Request, error: Exception) -> JSONResponse:
    """What fails while a body is read is the body's fault: vLLM's validators look into fields before it is checked that they
    are objects. Everything else is raised again, and a 500."""
    if all(frame.f_code is not request_body_to_args.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    return error_response(400, f"A field of the request has a wrong type: {error}.")


def _then_close(lifespan: Callable[[Any], AbstractAsyncContextManager[Any]], fetcher: Fetcher) -> Any:
    """The app's life, with its connections to media servers closed at the end of it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[Any]:
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            await fetcher.close()

    return life


def _add_routes(app: FastAPI, client: EPDClient, status: Status) -> None:
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> JSONResponse:
        """200 only when every stage can serve."""
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
        texts = [
            text for replies in (await broadcast("metrics")).values() for text in replies if isinstance(text, tuple)
        ]
        return PlainTextResponse(merge_metrics(texts), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def broadcast(method: str, *args: Any, timeout_s: float = 10.0) -> dict[str, list[Any]]:
        replies: dict[str, list[Any]] = {}
        for stage, handle in client.stages.items():
            try:
                replies[stage] = await handle.broadcast(method, *args, timeout_s=timeout_s)
            except EPDError as error:
                replies[stage] = [error]
        return replies

    async def profile(method: str, *args: Any) -> JSONResponse:
        """Every replica of every stage: the ids of those that did it, or what hindered the others."""
        replies = await broadcast(method, *args, timeout_s=120.0)
        failed = [str(reply) for stage in replies.values() for reply in stage if isinstance(reply, Exception)]
        body = {stage: [str(reply) for reply in stage_replies] for stage, stage_replies in replies.items()}
        if failed:
            return error_response(503, "; ".join(dict.fromkeys(failed)), "ServiceUnavailableError")
        return JSONResponse(body)

    @app.post("/start_profile")
    async def start_profile(request: Request) -> JSONResponse:
        try:
            overrides = json.loads(await request.body() or b"{}")
        except ValueError:
            overrides = None
        if not isinstance(overrides, dict):
            return error_response(400, "The body must be a JSON object.")
        allowed = ("profile_prefix", "delay_iterations", "max_iterations")
        return await profile(
            "start_profile", {key: overrides[key] for key in allowed if overrides.get(key) is not None}
        )

    @app.post("/stop_profile")
    async def stop_profile() -> JSONResponse:
        return await profile("stop_profile")

    for path, reason in NOT_HERE.items():
        app.add_api_route(path, _refuse(path, reason), methods=["GET", "POST"], include_in_schema=False)


def _refuse(path: str, reason: str) -> Callable[[], Awaitable[JSONResponse]]:
    async def refuse() -> JSONResponse:
        return error_response(400, f"{path} is not served by a disaggregated server: {reason}.")

    return refuse


def error_response(status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """OpenAI's error body."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status
    )


def route_of(scope: Scope) -> str:
    """The path within the application: Serve's has its ``route_prefix`` before it, and names that as ``root_path``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def of_route(path: str, response: JSONResponse) -> JSONResponse:
    """OpenAI's error, in Anthropic's shape on Anthropic's routes."""
    if not path.startswith("/v1/messages"):
        return response
    translated: JSONResponse = translate_error_response(ErrorResponse.model_validate_json(response.body))
    return translated


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def clean_id(request_id: str) -> str:
    """A client's id of a request as it may go on to engines and logs.

    NIXL sends ids joined by commas to renew the leases of KV blocks: one with a comma would not be renewed, and decode would
    read blocks that are another request's by then.
    """
    return re.sub(r"[^A-Za-z0-9._:-]", "_", request_id)[:128]


class BodyTooLarge(HTTPException):
    """An HTTPException, because FastAPI makes a 400 of whatever else ``receive`` raises."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"The request body is larger than the {limit_bytes} bytes that this server takes.")


class PipelineMiddleware:
    """Outermost: key, request id, body limit, the trace with its log line, metrics and span, and the status line that waits
    for the first token.

    A streaming response starts before its generator has asked the engine for anything. Its start is held back here until
    the trace is decided: by the first token it goes out as it is; by a failure it is replaced by that error's own response.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: IngressMetrics, tracing: Tracing) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        # Where Anthropic's clients send the key; vLLM reads OpenAI's header alone.
        if (key := headers.get("x-api-key")) and "authorization" not in headers:
            headers["authorization"] = f"Bearer {key}"
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = route_of(scope)
        request_id = clean_id(headers.get("x-request-id") or "") or uuid.uuid4().hex
        headers["x-request-id"] = request_id  # vLLM's servings read it from there; Serve's proxy echoes it
        with self.tracing.request(f"POST {path}", headers) as span:
            record = Trace(request_id, span, credentials=headers.get("authorization") or "")
            reply = _HeldReply(send, record, path)
            try:
                with record.holds:
                    await self._answer(scope, receive, reply, record)
            finally:
                self._ended(record, reply.status or "failed")

    async def _answer(self, scope: Scope, receive: Receive, reply: "_HeldReply", record: Trace) -> None:
        headers = Headers(scope=scope)
        timeout = headers.get("x-request-timeout-s")
        if timeout is not None:
            try:
                record.timeout_s = positive(timeout)
            except ValueError:
                message = f"The header x-request-timeout-s must be a positive number of seconds, not {timeout[:40]!r}."
                return await of_route(route_of(scope), error_response(400, message))(scope, receive, reply)
        too_large = of_route(
            route_of(scope), error_response(413, BodyTooLarge(self.max_body_bytes).detail, "RequestEntityTooLarge")
        )
        if int(headers.get("content-length") or 0) > self.max_body_bytes:
            return await too_large(scope, receive, reply)
        token = trace.current.set(record)
        try:
            await self.app(scope, self._limited(receive, reply), reply)
        except BodyTooLarge:
            await too_large(scope, receive, reply)
        except asyncio.CancelledError:
            reply.status = "cancelled"
            raise
        except Exception as error:
            if not await reply.abandoned(error):
                raise
        finally:
            trace.current.reset(token)

    def _ended(self, record: Trace, status: int | str) -> None:
        if record.rendered is not None:
            logger.info(record.line(status))
        self.metrics.finished(record, status)
        if record.error is not None:
            record.span.fail(record.error)
        record.span.set(
            request_id=record.request_id,
            status=str(status),
            items=record.items.total(),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.output_tokens,
        )

    def _limited(self, receive: Receive, reply: "_HeldReply") -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.disconnect":
                reply.client_left()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            return message

        return limited


STAGE_OF = {
    "encode": "encoder",
    "ec_transfer": "prefill",
    "prefill": "prefill",
    "kv_transfer": "decode",
    "first_token": "decode",
}
"""Whose replicas work on a step; of a transfer those that receive."""

ITEMS_TOLD = 32
"""Of a request, in a header: many HTTP clients take no more than 8 KiB of them."""


class _HeldReply:
    """``send`` of one response: holds the start of an event stream, and what follows, until the trace is decided."""

    def __init__(self, send: Send, record: Trace, path: str) -> None:
        self._send = send
        self._path = path
        self._trace = record
        self._held: list[Message] = []
        self._streaming = False
        self._holding = False
        self._replaced = False
        self._over = False
        """It has been sent, or nobody is there to send it to."""
        self.status: int | str | None = None

    def client_left(self) -> None:
        if not self._over:
            self._over, self.status = True, "cancelled"

    async def __call__(self, message: Message) -> None:
        if self._replaced or self._over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._tell(MutableHeaders(raw=message["headers"]), message["status"])
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self._streaming = content_type.startswith("text/event-stream")
            self._holding = self._streaming and self._trace.first_token is None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._streaming, self._over = False, True
        if self._holding:
            self._held.append(message)
            if not self._trace.decided.is_set() and not self._over:
                return
            self._holding = False
            if self._trace.error is not None and self._trace.first_token is None:
                return await self._replace()
            held, self._held = self._held, []
            self._tell(MutableHeaders(raw=held[0]["headers"]), held[0]["status"])
            for earlier in held:
                await self._send(earlier)
            return
        await self._send(message)

    async def abandoned(self, error: Exception) -> bool:
        """The app gave up an event stream midway, as vLLM's ``/v1/responses`` does whatever fails: end it with the failure.
        False where there is nothing to end."""
        if not self._streaming:
            return False
        # Starlette raises a RuntimeError from what it has no answer for any more.
        failure = self._trace.error or (error.__cause__ if isinstance(error.__cause__, Exception) else error)
        self._trace.fail(failure)
        if self._trace.first_token is None:
            await self._replace()
        else:
            event = f"event: error\ndata: {create_error_response(failure).model_dump_json()}\n\n"
            for message in [*self._held, {"type": "http.response.body", "body": event.encode()}]:
                await self._send(message)
        return True

    def _tell(self, headers: MutableHeaders, status: int) -> None:
        """Where the time went, which rungs of the failure ladder ran, and when to come again. Called again when more is
        known: the start of a stream is held until its first token."""
        if times := self._trace.stage_times():
            headers["server-timing"] = ", ".join(
                [f"{name};dur={seconds * 1000:.2f}" + self._who(name) for name, seconds in times.items()]
                + self._items()
            )
        if self._trace.rungs:
            headers["x-epd-rungs"] = self._trace.rungs_told()
        if status in (429, 503):
            headers["retry-after"] = "1"

    def _who(self, step: str) -> str:
        """The replicas that worked on a step, as the header writes it."""
        names = self._trace.replicas.get(STAGE_OF.get(step, ""))
        return f';desc="{" ".join(names)}"' if names else ""

    def _items(self) -> list[str]:
        """``encode`` item by item, where there are several: all at the same time, so no steps that add up."""
        items = sorted(self._trace.by_item.items())[:ITEMS_TOLD]
        if len(items) == 1:
            return []
        return [f'encode.{index + 1};dur={seconds * 1000:.2f};desc="{replica}"' for index, (seconds, replica) in items]

    async def _replace(self) -> None:
        """Answer with the failure's own status instead of the stream that had not begun."""
        assert self._trace.error is not None
        self._replaced = True
        error = create_error_response(self._trace.error)
        self.status = error.error.code
        start = next(message for message in self._held if message["type"] == "http.response.start")
        self._tell(MutableHeaders(raw=start["headers"]), error.error.code)
        kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-type", b"content-length")]
        content = of_route(self._path, JSONResponse(error.model_dump())).body
        await self._send(
            {
                "type": "http.response.start",
                "status": error.error.code,
                "headers": [*kept, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))],
            }
        )
        await self._send({"type": "http.response.body", "body": content})
