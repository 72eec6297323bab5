"""What serve_app leans on in vLLM's server and connectors, in Ray and in NIXL. A failure names the file to look at."""

import dataclasses
import importlib.metadata
import inspect
from types import SimpleNamespace
from typing import Any

import pytest


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def fields(cls: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", ["NIXL", "EC"])
def test_side_channel_addresses_are_read_from_the_environment(name: str) -> None:
    from vllm import envs

    for part in ("HOST", "PORT"):
        assert f"VLLM_{name}_SIDE_CHANNEL_{part}" in envs.environment_variables, (
            "serve_app/launch/connectors.py side_channel_env"
        )


@pytest.mark.parametrize(
    "name",
    [
        "MEDIA_CONNECTOR",
        "MAX_IMAGE_PIXELS",
        "MAX_AUDIO_DECODE_DURATION_S",
        "MAX_AUDIO_CLIP_FILESIZE_MB",
        "CPU_KVCACHE_SPACE",
    ],
)
def test_settings_that_the_ingress_writes_exist(name: str) -> None:
    from vllm import envs

    assert f"VLLM_{name}" in envs.environment_variables, (
        "serve_app/ingress/seams.py install_media, media/check.py install_limits, ingress/server.py ingress_vllm_config"
    )


@pytest.mark.parametrize(
    "hook",
    [
        "save_caches",
        "ensure_cache_available",
        "take_unavailable_requests",
        "update_state_after_alloc",
        "get_ec_connector_stats",
        "build_ec_connector_stats",
        "build_prom_metrics",
        "has_cache_item",
        "build_connector_meta",
        "request_finished",
        "start_load_caches",
        "get_finished",
        "start_save_caches",
        "shutdown",
    ],
)
def test_hook_of_our_connector_is_one_that_vllm_calls(hook: str) -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

    from serve_app.transfer.ec_connector import SharedFolderECConnector

    where = f"serve_app/transfer/ec_connector.py {hook}: ECConnectorBase"
    assert hasattr(ECConnectorBase, hook), where
    theirs, ours = parameters(getattr(ECConnectorBase, hook)), parameters(getattr(SharedFolderECConnector, hook))
    assert list(ours) == list(theirs), where


def test_item_without_pixels_is_known_by_its_fields(demo_vllm_config: Any) -> None:
    from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver

    declared = PlaceholderMetadataResolver(demo_vllm_config.model_config).fields_for("image")
    assert declared == {"image_grid_thw"}, "serve_app/transfer/ec_connector.py _can_encode: fields_for"


def test_scheduler_reports_a_lost_embedding_too_late_for_its_step() -> None:
    """Why the scheduler's half reads the files. Where this changes, the workers could read them and report."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.update_from_output)
    steps = [
        "output_is_stale and request.drop_stale_output",
        "self._update_request_with_output(",
        "take_unavailable_requests()",
        "update_connector_output(ec_connector_output)",
    ]
    places = [source.index(step) for step in steps]
    assert places == sorted(places), "serve_app/transfer/ec_connector.py: its docstring, _spoil"


def test_model_declares_the_fields_of_its_placeholders(make_client: Any) -> None:
    from serve_app.media.items import declared_fields

    renderer = make_client({}).renderer
    declared = declared_fields(renderer)
    assert declared("image") == {"image_grid_thw"}, "serve_app/media/items.py: placeholder_metadata_fields"
    assert declared("audio") == frozenset()
    assert hasattr(renderer, "_mm_executor"), "serve_app/media/items.py in_turn: vLLM's thread for its processors"


def test_metadata_alone_is_taken_where_the_ingress_says_so_and_not_from_clients(demo_vllm_config: Any) -> None:
    multimodal = demo_vllm_config.model_config.multimodal_config
    assert multimodal.allow_missing_mm_embeddings, "serve_app/ingress/server.py ingress_vllm_config"
    assert not multimodal.enable_mm_embeds, "clients could send metadata of items that nobody has encoded"


def test_frontend_arguments_are_fields() -> None:
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    from serve_app.ingress.server import SERVER_ARGS

    names = fields(FrontendArgs)
    assert names >= {"chat_template", "api_key", "tool_call_parser", "lora_modules"}, "serve_app/ingress/server.py"
    assert names >= SERVER_ARGS - {"grpc_port"}, f"serve_app/ingress/server.py SERVER_ARGS: {SERVER_ARGS - names}"


def test_engine_arguments_that_we_set_exist() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from serve_app.config import OWN_KEYS, SHARED_ARGS, EPDConfig
    from serve_app.launch.engine_args import engine_args
    from serve_app.launch.placement import Cluster, resolve
    from serve_app.stage import Stage

    ours = set(OWN_KEYS) | SHARED_ARGS
    for stage in Stage:
        ours |= engine_args(resolve(EPDConfig(), Cluster(0, 2)).config, stage, "m").keys()
    missing = ours - fields(AsyncEngineArgs)
    assert not missing, f"serve_app/launch/engine_args.py, serve_app/config OWN_KEYS and SHARED_ARGS: {missing}"


@pytest.fixture
def vllm_routes(demo_vllm_config: Any) -> set[str]:
    from vllm.entrypoints.launchers import app

    from serve_app.config import EPDConfig
    from serve_app.ingress.server import server_args

    args = server_args(EPDConfig(), {"model": demo_vllm_config.model_config.model})
    built = app.build_app(args, ("generate",), demo_vllm_config.model_config)
    return {getattr(route, "path", "") for route in built.routes}


def test_what_a_request_passes_on_its_way_into_vllms_app_is_known(demo_vllm_config: Any) -> None:
    """What each costs was measured: the Prometheus one, which is left out, 19 µs per request and 0.1 per chunk; CORS 5 and
    0.3; the rest next to nothing. One of another kind (BaseHTTPMiddleware) would cost tens of µs per chunk."""
    from vllm.entrypoints.launchers import app

    from serve_app.config import EPDConfig
    from serve_app.ingress.server import server_args

    args = server_args(EPDConfig(), {"model": demo_vllm_config.model_config.model})
    built = app.build_app(args, ("generate",), demo_vllm_config.model_config)
    names = {each.cls.__name__ for each in built.user_middleware}
    known = {"PrometheusInstrumentatorMiddleware", "CORSMiddleware", "ScalingMiddleware"}
    assert names == known, "serve_app/ingress/server.py make_app: measure what is new, leave out what does nothing here"


def test_routes_that_we_serve_or_refuse_are_vllms(vllm_routes: set[str]) -> None:
    known = {"/v1/chat/completions", "/v1/completions", "/health", "/metrics", "/inference/v1/generate"}
    assert vllm_routes >= known, "serve_app/ingress/server.py NOT_HERE, REPLACED"


def test_every_route_that_reaches_past_the_stages_is_refused(vllm_routes: set[str]) -> None:
    from serve_app.ingress.routes import NOT_HERE

    assert not {path for path in vllm_routes if path.startswith("/inference")} - NOT_HERE.keys()


OPEN = {"/", "/tokenize", "/detokenize", "/ping", "/start_profile", "/stop_profile", "/status", "/health", "/metrics"}
OPEN |= {
    "/version",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/openapi.json",
    "/load",
    "/tokenizer_info",
    "/kv_event_sources",
}


def test_no_route_without_the_key_generates(vllm_routes: set[str]) -> None:
    """What vLLM's key guards, what is refused, and these, which ask no stage for tokens."""
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    from serve_app.ingress.routes import NOT_HERE

    open_routes = {path for path in vllm_routes if not path.startswith(GUARDED_PREFIX)}
    assert open_routes - NOT_HERE.keys() <= OPEN, "serve_app/ingress/server.py NOT_HERE"


def test_leases_of_kv_blocks_are_renewed_by_ids_joined_by_commas() -> None:
    """Why a client's request id goes on without commas (`clean_id`)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    source = inspect.getsource(NixlBaseConnectorWorker)
    assert '",".join(' in source and 'split(",")' in source


def test_nixl_hashes_what_engines_agree_on_when_its_caches_are_registered_and_tells_it_then() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, connector, pull_worker, push_worker

    where = "serve_app/transfer/kv_transport.py register_kv_caches"
    source = inspect.getsource(base_worker.NixlBaseConnectorWorker)
    assert source.count("self.compat_hash = compute_nixl_compatibility_hash(") == 1, where
    assert source.count("self.xfer_handshake_metadata = NixlHandshakePayload(") == 1, where
    registers = inspect.getsource(base_worker.NixlBaseConnectorWorker.register_kv_caches)
    assert "compute_nixl_compatibility_hash(" in registers and "self.xfer_handshake_metadata = " in registers, where
    assert "handshake_payload.compatibility_hash != self.compat_hash" in source, where
    for module in (pull_worker, push_worker):
        assert "compat_hash" not in inspect.getsource(module), where
    assert "return self.connector_worker.xfer_handshake_metadata" in inspect.getsource(connector), where


def test_every_route_that_tells_health_speaks_for_the_stages(vllm_routes: set[str]) -> None:
    from serve_app.ingress.routes import REPLACED

    assert {"/health", "/ping"} & vllm_routes <= REPLACED


def test_routes_of_ours_are_none_of_vllms(vllm_routes: set[str]) -> None:
    from serve_app.page import FILES

    assert not {*FILES, "/status"} & vllm_routes, "serve_app/ingress/server.py REPLACED"


def test_media_connectors_are_made_by_name_with_these_arguments() -> None:
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
    from vllm.renderers import chat_utils

    assert "MEDIA_CONNECTOR_REGISTRY.load(" in inspect.getsource(chat_utils), "serve_app/ingress/seams.py install_media"
    taken = {name for name in parameters(MediaConnector.__init__) if name not in ("self", "connection")}
    assert taken == {"media_io_kwargs", "allowed_local_media_path", "allowed_media_domains"}, (
        "serve_app/ingress/media.py"
    )
    assert hasattr(MEDIA_CONNECTOR_REGISTRY, "name2class"), "tests/unit/ingress/test_media.py"


def test_video_loaders_ask_one_method_which_frames_to_take() -> None:
    """``media/check.py _limited`` overrides it to count them."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    without = [
        name
        for name, loader in VIDEO_LOADER_REGISTRY.name2class.items()
        if not hasattr(loader, "compute_frames_index_to_sample")
    ]
    assert not without, "serve_app/media/check.py _limited"


def test_nixl_takes_the_progress_thread_first_and_hides_its_delay() -> None:
    from nixl._api import nixl_agent_config

    names = list(parameters(nixl_agent_config.__init__))
    assert names[1] == "enable_prog_thread", "serve_app/hooks/vllm_plugin.py: first argument of nixl_agent_config"
    assert not any("delay" in name for name in names), (
        "serve_app/hooks/vllm_plugin.py: nixl_agent_config takes a delay now, so the patch can go"
    )


def test_ray_serves_an_app_that_the_replica_builds() -> None:
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from deployments.ingress import Ingress

    name = "__serve_build_asgi_app__"
    assert name == SERVE_BUILD_ASGI_APP_METHOD, "deployments/ingress.py"
    assert hasattr(Ingress.func_or_class, name), "deployments/ingress.py"  # type: ignore[attr-defined]


def test_ray_broadcasts_to_all_replicas_and_keeps_their_exceptions() -> None:
    from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle, DeploymentResponseGenerator

    assert {"timeout_s", "return_exceptions"} <= parameters(DeploymentBroadcastResponse.results_async).keys(), (
        "serve_app/routing/handles.py broadcast"
    )
    assert "_by_reference" in parameters(DeploymentHandle.options), "serve_app/routing/handles.py: calls by gRPC"
    assert not hasattr(DeploymentResponseGenerator, "aclose"), (
        "serve_app/routing/handles.py stream: aclose() may do now"
    )


def test_replicas_that_are_asked_all_at_once_can_be_awaited_one_by_one() -> None:
    from ray.serve._private.replica_result import ReplicaResult
    from ray.serve.handle import DeploymentBroadcastResponse

    for method in (DeploymentBroadcastResponse._fetch_replica_results_async, ReplicaResult.get_async):
        assert list(parameters(method)) == ["self"] and inspect.iscoroutinefunction(method), (
            "serve_app/ingress/peers.py find"
        )


def test_plugins_are_registered_where_vllm_and_torch_look() -> None:
    for group, name, value in (
        ("vllm.general_plugins", "epd", "serve_app.hooks.vllm_plugin:register"),
        ("torch.backends", "epd_torchvision", "serve_app.hooks.torch_backend:register"),
    ):
        (found,) = [e for e in importlib.metadata.entry_points(group=group) if e.name == name]
        assert found.value == value, f"pyproject.toml: {group}"


def test_beam_search_asks_for_its_watermark_before_anything_else() -> None:
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    source = inspect.getsource(BeamSearchOnlineMixin.beam_search)
    hook = source.index("self.engine_client.input_processor.resolve_watermarking(params)")
    assert hook < source.index("create_sort_beams_key_function("), "serve_app/ingress/guard.py GuardedInputProcessor"
    assert hook < source.index("self.engine_client.generate("), "serve_app/ingress/guard.py GuardedInputProcessor"


def test_renderer_processes_media_through_the_hooks_that_are_guarded() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.chat_utils import AsyncMultiModalContentParser

    assert "await self._process_multimodal_async(" in inspect.getsource(BaseRenderer._process_tokens_async), (
        "serve_app/ingress/seams.py install_renderer_guard"
    )
    assert list(parameters(BaseRenderer._process_mm_uuids)) == [
        "self",
        "mm_data",
        "mm_data_items",
        "mm_uuid_items",
        "mm_req_id",
    ], "serve_app/ingress/seams.py install_renderer_guard"
    assert list(parameters(AsyncMultiModalContentParser.parse_image_pil)) in (
        ["self", "image_pil", "uuid"],
        ["parser", "image_pil", "uuid"],  # ours, where another test has installed it
    ), "serve_app/ingress/seams.py install_media"


def test_every_part_with_a_url_and_its_name_pass_three_methods_of_the_parser() -> None:
    from vllm.renderers.chat_utils import AsyncMultiModalContentParser

    from serve_app.ingress.seams import PARSE  # vLLM's own, where another test has installed ours

    assert {name: list(parameters(parse)) for name, parse in PARSE.items()} == {
        "parse_image": ["self", "image_url", "uuid"],
        "parse_video": ["self", "video_url", "uuid"],
        "parse_audio": ["self", "audio_url", "uuid"],
    }, "serve_app/ingress/seams.py naming"
    assert "return self.parse_audio(audio_url, uuid)" in inspect.getsource(
        AsyncMultiModalContentParser.parse_input_audio
    ), "serve_app/ingress/seams.py PARSE"


def test_renderer_of_a_chat_is_told_its_cache_salt() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer

    assert "prompt_extras" in parameters(BaseRenderer.render_chat_async), (
        "serve_app/ingress/seams.py install_renderer_guard"
    )
    rendered = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert "renderer.render_chat_async(" in rendered and '"cache_salt"' in rendered, (
        "serve_app/ingress/seams.py install_renderer_guard"
    )


def test_video_loaders_read_frames_by_a_method_of_theirs() -> None:
    from vllm.multimodal.video_decoders.opencv import decode_opencv

    source = inspect.getsource(decode_opencv)
    for method in ("_prepare_source", "compute_frames_index_to_sample", "read_frames"):
        assert f"loader_cls.{method}(" in source, "serve_app/media/check.py _limited"


def test_bodies_are_read_where_the_ingress_looks_for_it() -> None:
    from fastapi.dependencies import utils

    assert "await request_body_to_args(" in inspect.getsource(utils.solve_dependencies), (
        "serve_app/ingress/server.py _unreadable"
    )


# ---- HTTP at the ingress


def test_controller_tells_where_to_listen() -> None:
    from ray.serve._private.controller import ServeController
    from ray.serve.context import ReplicaContext, _get_global_client

    assert callable(_get_global_client), "deployments/_http.py public_address"
    for name in ("get_http_config", "get_proxy_location", "get_all_endpoints"):
        assert hasattr(ServeController, name), f"deployments/_http.py public_address: {name}"
    assert "_deployment_config" in fields(ReplicaContext), "deployments/ingress.py __init__"


def test_serve_ends_the_life_of_the_app_before_anything_else_of_a_replica() -> None:
    """In which the ingress waits for what is under way (``Front.drain``)."""
    from ray import serve
    from ray.serve._private import http_util, replica

    wrapper = inspect.getsource(http_util.ASGIAppReplicaWrapper.__del__)
    assert "await self._serve_asgi_lifespan.shutdown()" in wrapper, "serve_app/ingress/front.py Front._live"
    steps = ["await ASGIAppReplicaWrapper.__del__(self)", "await cls.__del__(self)"]
    source = inspect.getsource(serve.ingress)
    assert source.index(steps[0]) < source.index(steps[1]), "serve_app/ingress/front.py Front._live"
    ending = inspect.getsource(replica.Replica._perform_graceful_shutdown)
    assert "await self.shutdown()" in ending, "serve_app/ingress/front.py Front.drain"


def test_uvicorn_has_what_the_front_bounds() -> None:
    from uvicorn import Server
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    where = "serve_app/ingress/front.py"
    for name in ("on_message_begin", "on_headers_complete", "data_received", "pause_writing", "connection_lost"):
        assert name in vars(HttpToolsProtocol), f"{where} Connection.{name}"
    assert "self.response_complete" in inspect.getsource(RequestResponseCycle.__init__), f"{where} data_received"
    assert "scope=self.scope" in inspect.getsource(HttpToolsProtocol.on_headers_complete), f"{where} on_message_begin"
    assert hasattr(FlowControl, "resume_reading"), f"{where} Front._in_time"
    for name in ("startup", "main_loop", "shutdown"):
        assert inspect.iscoroutinefunction(getattr(Server, name)), f"{where} Front.listen, _serve"
    source = inspect.getsource(Server.shutdown)
    assert source.index("server.close()") < source.index("connection.shutdown()"), f"{where} Front.drain"
    state = inspect.getsource(importlib.import_module("uvicorn.server").ServerState)
    assert "self.connections" in state and "self.tasks" in state, f"{where} Front._cut"


def test_vllm_cancels_a_handler_whose_client_has_left_and_not_one_whose_request_is_cancelled() -> None:
    """Why ``Connection`` waits before it cancels. Where this changes, it need not."""
    import asyncio

    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    async def main() -> None:
        begun, never = asyncio.Event(), asyncio.Event()
        request = SimpleNamespace(receive=never.wait, app=SimpleNamespace(state=SimpleNamespace()))
        handlers: list[Any] = []

        async def handler(_: Any, raw_request: Any) -> None:
            handlers.append(asyncio.current_task())
            begun.set()
            await never.wait()

        asking = asyncio.create_task(with_cancellation(handler)({}, request))
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        assert not handlers[0].done(), "serve_app/ingress/front.py LEFT_S"
        handlers[0].cancel()

    asyncio.run(main())
