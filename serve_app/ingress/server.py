"""vLLM's OpenAI app around our client, with the routes and the middleware that a pipeline of stages needs."""

import traceback
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.dependencies.utils import request_body_to_args
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp
from vllm import envs
from vllm.config import LoRAConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.ingress.assembly import Parts
from serve_app.ingress.middleware import PipelineMiddleware
from serve_app.ingress.peers import Peers
from serve_app.ingress.replies import error_response, of_route, route_of
from serve_app.ingress.responses import Responses
from serve_app.ingress.routes import add_routes
from serve_app.ingress.seams import install_media, install_pooling, install_priorities, install_sessions, install_speech
from serve_app.media.fetch import Fetcher
from serve_app.observe.status import Status
from serve_app.observe.tracing import tracing
from serve_app.page import add_page


def server_args(config: EPDConfig, engine_args: dict[str, Any]) -> Namespace:
    """The arguments that ``vllm serve`` would have parsed. Raises ``ConfigError``."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for key, value in (engine_args | config.api).items():
        setattr(args, key, value)
    args.lora_modules = [lora_module(each) for each in config.api.get("lora_modules", [])]
    if isinstance(args.api_key, str):
        args.api_key = [args.api_key]
    args.structured_outputs_config = AsyncEngineArgs(**engine_args).create_structured_outputs_config()
    args.disable_log_stats = True  # the engines log their own
    args.enable_flash_late_interaction = False  # a query's vectors would stay in the one replica that made them
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`api:` {error}") from error
    return args


def lora_module(given: Any) -> LoRAModulePath:
    """An entry of ``api.lora_modules``, as `vllm serve --lora-modules` takes it. Raises ``ConfigError``."""
    try:
        return LoRAModulePath(*given.split("=", 1)) if isinstance(given, str) else LoRAModulePath(**given)
    except TypeError as error:
        raise ConfigError(f"`api.lora_modules`: {given!r} is not `name=path` or {{name: …, path: …}}") from error


def ingress_vllm_config(engine_args: dict[str, Any]) -> VllmConfig:
    """The part of vLLM's config that rendering and validation need, made without a device as in vLLM's render server."""
    parsed = AsyncEngineArgs(**engine_args)
    model_config = parsed.create_model_config()
    model_config.quantization = None  # an ingress loads no weights
    parsed._set_default_reasoning_config_args()  # without it no budget for thinking is taken
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    vllm_config = VllmConfig(
        model_config=model_config,
        logging_config=parsed.create_logging_config(),
        structured_outputs_config=parsed.create_structured_outputs_config(),
        reasoning_config=parsed.reasoning_config,
        lora_config=LoRAConfig(default_mm_loras=parsed.default_mm_loras) if parsed.enable_lora else None,
    )
    if model_config.multimodal_config is not None:
        # Prompts are rendered with items' metadata (rendering.py); without `enable_mm_embeds` clients cannot send any.
        model_config.multimodal_config.allow_missing_mm_embeddings = True
    if parsed.max_num_seqs is not None:
        vllm_config.scheduler_config.max_num_seqs = parsed.max_num_seqs
    vllm_config.scheduler_config.stream_interval = parsed.stream_interval
    return vllm_config


async def make_app(config: EPDConfig, args: Namespace, parts: Parts, status: Status, peers: Peers) -> ASGIApp:
    """The ASGI app of an ingress replica. Raises ``ConfigError``."""
    folder = config.media.allowed_local_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"`media.allowed_local_path: {folder}` is no folder on the node of this ingress replica")
    client = parts.client
    if (client.model_config.runner_type == "pooling") != config.pools:
        raise ConfigError(f"{config.model} is a model that pools: set `engine_args: {{runner: pooling}}`")
    fetcher = install_media(config, parts.from_media, client.pipeline.admission, peers)
    install_sessions()
    install_priorities()
    install_pooling()
    install_speech(client.pipeline.admission)
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    _shape_errors(app)
    app.router.lifespan_context = _then_close(app.router.lifespan_context, fetcher)
    await init_app_state(client, app.state, args, tasks)
    # It counts for metrics of this process, which no route serves: /metrics has those of the engines.
    app.user_middleware[:] = [
        each for each in app.user_middleware if each.cls is not PrometheusInstrumentatorMiddleware
    ]
    client.adapters.serve(app.state.openai_serving_models)
    if not config.pools:
        app.state.openai_serving_responses = Responses(
            app.state.openai_serving_responses, peers, config.advanced.answers.response_store_bytes
        )
    add_routes(app, client.pipeline.stages, status)
    if config.page and not config.pools:
        add_page(app)
    return PipelineMiddleware(app, config.media.max_body_bytes, parts.metrics, tracing(config.tracing))


def _shape_errors(app: FastAPI) -> None:
    """Have all error handlers of the app answer in the error format of the route's API.

    vLLM registers its handler for FastAPI's HTTPException. FastAPI itself raises the base class, for a body that it cannot
    read or an unknown route.
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
    app.middleware_stack = None  # `build_app` made it from other handlers; the first request makes it again


async def _unreadable(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 to an error from reading a body: vLLM's validators look into fields before their types are checked. Other
    errors are raised again, and become a 500."""
    if all(frame.f_code is not request_body_to_args.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    return error_response(400, f"A field of the request has a wrong type: {error}.")


def _then_close(lifespan: Callable[[Any], AbstractAsyncContextManager[Any]], fetcher: Fetcher) -> Any:
    """``lifespan``, which then closes the connections to media servers."""

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(fetcher.close)
            yield await stack.enter_async_context(lifespan(app))

    return closing
