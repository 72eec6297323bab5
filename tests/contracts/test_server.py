"""What the ingress leans on in vLLM's server: its arguments, settings and routes."""

import inspect
import re
from typing import Any

import pytest

from serve_app.ingress.seams import InThread, _preprocess_speech, _preprocessing
from tests.contracts.looking import fields


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


def test_frontend_arguments_are_fields() -> None:
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    from serve_app.launch.vllm_args import SERVER_ARGS

    names = fields(FrontendArgs)
    assert names >= {"chat_template", "api_key", "tool_call_parser", "lora_modules"}, "serve_app/ingress/server.py"
    assert names >= SERVER_ARGS - {"grpc_port"}, f"serve_app/launch/vllm_args.py SERVER_ARGS: {SERVER_ARGS - names}"


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


def test_every_route_that_tells_health_speaks_for_the_stages(vllm_routes: set[str]) -> None:
    from serve_app.ingress.routes import REPLACED

    assert {"/health", "/ping"} & vllm_routes <= REPLACED


def test_routes_of_ours_are_none_of_vllms(vllm_routes: set[str]) -> None:
    from serve_app.page import FILES

    assert not {*FILES, "/status"} & vllm_routes, "serve_app/ingress/server.py REPLACED"


def test_beam_search_asks_for_its_watermark_before_anything_else() -> None:
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    source = inspect.getsource(BeamSearchOnlineMixin.beam_search)
    hook = source.index("self.engine_client.input_processor.resolve_watermarking(params)")
    assert hook < source.index("create_sort_beams_key_function("), "serve_app/ingress/guard.py GuardedInputProcessor"
    assert hook < source.index("self.engine_client.generate("), "serve_app/ingress/guard.py GuardedInputProcessor"


def test_every_api_asks_one_method_for_the_session_of_a_request() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    where = "serve_app/ingress/seams.py _session_of"
    assert "session_id=session_id" in inspect.getsource(GenerateBaseServing.beam_search), where
    assert list(inspect.signature(GenerateBaseServing._get_session_id).parameters) == ["request", "raw_request"], where
    for serving in (OpenAIServingChat, OpenAIServingChatBatch, OpenAIServingCompletion, OpenAIServingResponses):
        assert issubclass(serving, GenerateBaseServing), f"{where}: {serving}"
        assert "session_id = self._get_session_id(" in inspect.getsource(serving), f"{where}: {serving}"
    for request in (ChatCompletionRequest, BatchChatCompletionRequest, CompletionRequest):
        assert request.model_config["extra"] == "allow", f"{where}: `prompt_cache_key` is dropped from {request}"
        assert "prompt_cache_key" not in request.model_fields, f"{where}: vLLM checks it now"
    assert "prompt_cache_key" in ResponsesRequest.model_fields, where


def test_messages_become_a_chat_without_their_metadata() -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    from serve_app.ingress.seams import _to_chat

    where = "serve_app/ingress/seams.py _keyed_by_user"
    assert list(inspect.signature(_to_chat).parameters) == [
        "anthropic_request",
        "merge_inline_system",
        "disabled_thinking_effort",
    ], where
    source = inspect.getsource(AnthropicServingMessages.create_messages)
    assert "chat_req = self.to_chat_completion_request(\n            request,\n" in source, where
    assert "self.create_chat_completion(chat_req, raw_request)" in source, where
    assert "metadata" in AnthropicMessagesRequest.model_fields, where
    assert "metadata" not in inspect.getsource(_to_chat), f"{where}: vLLM keeps them now"
    assert ".metadata" not in inspect.getsource(AnthropicServingMessages), f"{where}: vLLM keeps them now"


def test_names_of_adapters_are_where_replicas_share_them() -> None:
    """The route asks the app's models by the method's name, and these load with their client before they tell a name."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.lora import api_router
    from vllm.lora.request import LoRARequest

    where = "serve_app/ingress/adapters.py"
    assert "await handler.unload_lora_adapter(request)" in inspect.getsource(api_router), where
    resolve = inspect.getsource(OpenAIServingModels.resolve_lora)
    assert "for resolver in self.lora_resolvers" in resolve and "add_lora(lora_request)" in resolve, where
    load = inspect.getsource(OpenAIServingModels.load_lora_adapter)
    assert load.index("add_lora(lora_request)") < load.index("self.lora_requests[lora_name] = lora_request"), where
    adapter = LoRARequest("x", 1, "/x")
    adapter.lora_int_id = 2**31 - 1  # ours, in the place of vLLM's count
    assert adapter.adapter_id == 2**31 - 1


def test_prompts_to_pool_are_rendered_by_calls_that_have_an_asynchronous_twin() -> None:
    from vllm.entrypoints.pooling.base import io_processor
    from vllm.entrypoints.pooling.scoring import io_processor as scoring
    from vllm.renderers.base import BaseRenderer

    where = "serve_app/ingress/seams.py install_pooling"
    body = inspect.getsource(_preprocessing)
    assert "requests = io_processor.get_request_factory_online(ctx)" in body, where
    assert "io_processor.render_async(request)" in body, where
    called = inspect.getsource(io_processor.PoolingIOProcessor.render) + inspect.getsource(scoring)
    for name in set(re.findall(r"self\.renderer\.(render_\w+|process_\w+)\(", called)):
        twins = getattr(BaseRenderer, name), getattr(BaseRenderer, f"{name}_async")
        assert len({str(inspect.signature(twin).parameters.keys()) for twin in twins}) == 1, f"{where}: {name}"
        assert hasattr(InThread, name) and name in vars(InThread), f"{where}: {name}"


def test_sounds_to_write_down_reach_the_decoder_through_one_method() -> None:
    from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing

    where = "serve_app/ingress/seams.py install_speech"
    assert list(inspect.signature(_preprocess_speech).parameters)[1:] == ["request", "audio_data", "request_id"], where
    source = inspect.getsource(SpeechToTextBaseServing)
    assert source.count("self._decode_and_chunk_speech_async(audio_data)") == 1, where
    assert "self._preprocess_speech_to_text(" in source, where


def test_only_a_missing_item_ends_a_pooling_request_without_a_result() -> None:
    """Any other end is taken for one of text, and the process of the engine's front end would end with it."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.output_processor import OutputProcessor

    where = "serve_app/stages/tap.py Tap.process_outputs"
    assert "mm_cache_miss_hashes" in EngineCoreOutput.__struct_fields__, where
    source = inspect.getsource(OutputProcessor.process_outputs)
    assert "and engine_core_output.mm_cache_miss_hashes" in source and "error=request_error" in source, where


def test_a_budget_for_thinking_is_taken_where_the_parser_has_its_config() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    where = "serve_app/ingress/server.py ingress_vllm_config"
    args = AsyncEngineArgs(model="m", reasoning_parser="deepseek_r1")
    args._set_default_reasoning_config_args()
    assert args.reasoning_config is not None and args.reasoning_config.reasoning_parser == "deepseek_r1", where
    assert "self.vllm_config.reasoning_config" in inspect.getsource(InputProcessor._validate_params), where


def test_the_model_of_a_request_is_checked_before_its_prompt_is_rendered() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing

    where = "serve_app/ingress/seams.py install_priorities"
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        assert "priority" in request.model_fields, f"{where}: {request}"
    for serving in (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses):
        assert issubclass(serving, BaseServing), f"{where}: {serving}"
        source = inspect.getsource(serving)
        rendering = re.search(r"await self\._render_resolved|await self\.online_renderer\.render_", source)
        assert rendering and -1 < source.find("self._check_model(request)") < source.rfind(rendering[0]), where
    body = inspect.getsource(PoolingBaseServing.__call__)
    assert -1 < body.find("self._init_ctx(") < body.find("self._preprocessing("), where
    assert "self._check_model(request)" in inspect.getsource(PoolingBaseServing._init_ctx), where
