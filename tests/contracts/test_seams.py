"""Every row of docs/seams.md has a test here that says what broke on an upgrade of vLLM, Ray or NIXL."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| `(.+?)` \| (.+?) \|", (ROOT / "docs" / "seams.md").read_text(), re.M)
"""What is changed, and by what."""

TESTS = {
    "BaseRenderer._process_mm_uuids": "test_renderer_processes_media_through_the_hooks_that_are_guarded",
    "BaseRenderer._process_multimodal_async": "test_renderer_processes_media_through_the_hooks_that_are_guarded",
    "BaseRenderer.render_chat_async": "test_renderer_of_a_chat_is_told_its_cache_salt",
    "BaseRenderer._process_tokens_async": "test_every_prompt_becomes_an_engine_input_in_one_method",
    "MEDIA_CONNECTOR_REGISTRY": "test_media_connectors_are_made_by_name_with_these_arguments",
    "AsyncMultiModalContentParser.parse_image": "test_every_part_with_a_url_and_its_name_pass_three_methods_of_the_parser",
    "AsyncMultiModalContentParser.parse_image_pil": "test_renderer_processes_media_through_the_hooks_that_are_guarded",
    "BaseServing._check_model": "test_the_model_of_a_request_is_checked_before_its_prompt_is_rendered",
    "PoolingBaseServing._preprocessing": "test_prompts_to_pool_are_rendered_by_calls_that_have_an_asynchronous_twin",
    "SpeechToTextBaseServing._preprocess_speech_to_text": "test_sounds_to_write_down_reach_the_decoder_through_one_method",
    "vllm.envs.VLLM_MAX_…, Image.MAX_IMAGE_PIXELS": "test_settings_that_the_ingress_writes_exist",
    "GenerateBaseServing._get_session_id": "test_every_api_asks_one_method_for_the_session_of_a_request",
    "AnthropicServingMessages.to_chat_completion_request": "test_messages_become_a_chat_without_their_metadata",
    "InputProcessor.resolve_watermarking": "test_beam_search_asks_for_its_watermark_before_anything_else",
    "MultiModalConfig, CPU_KVCACHE_SPACE": "test_metadata_alone_is_taken_where_the_ingress_says_so_and_not_from_clients",
    "FastAPI.router.routes, .user_middleware": "test_what_a_request_passes_on_its_way_into_vllms_app_is_known",
    "FastAPI.exception_handlers": "test_bodies_are_read_where_the_ingress_looks_for_it",
    "OpenAIServingModels": "test_names_of_adapters_are_where_replicas_share_them",
    "OpenAIServingResponses": "test_responses_are_stored_where_they_are_counted",
    "FIFOMixin._fulfill_next_pending_request": "test_a_request_router_chooses_in_tiers_and_knows_how_long_queues_are",
    "vllm.v1.engine.utils.get_mp_context": "test_core_of_an_engine_is_started_by_a_context_that_can_be_another",
    "py_executable": "test_ray_runs_a_worker_with_the_command_that_takes_the_place_of_python",
    "threading.excepthook": "test_thread_that_listens_for_nixl_has_the_name_that_is_looked_for",
    'logging.getLogger("vllm"), excepthook': "test_vllm_logs_the_end_of_a_start_in_these_words",
    "vllm.utils.network_utils.tempfile": "test_process_group_of_an_engine_meets_in_a_file_of_the_temporary_folder",
    "nixl_agent_config.__init__": "test_nixl_takes_the_progress_thread_first_and_hides_its_delay",
    "OutputProcessor.process_outputs": "test_each_step_goes_through_the_processors_method_as_it_is_then",
    "WorkerBase": "test_methods_of_workers_are_called_by_name",
    "NixlBaseConnectorWorker.__init__": "test_worker_on_a_cpu_moves_its_thread_to_the_last_core",
    "NixlPullConnector, NixlPushConnector": "test_transfers_are_looked_at_once_per_step_and_their_statistics_asked_for_next",
    "ECCPUConnector": "test_connector_has_the_seams_that_ours_uses",
    "ECConnectorBase": "test_hook_of_our_connector_is_one_that_vllm_calls",
    "torch.ops.torchvision, torchaudio, torchcodec": "test_plugins_are_registered_where_vllm_and_torch_look",
    "Serve's HTTP proxy": "test_proxy_takes_middleware_of_ours",
}


def test_page_and_tests_are_of_the_same_seams() -> None:
    assert {what for what, _ in ROWS} == TESTS.keys()


@pytest.mark.parametrize("name", sorted(set(TESTS.values())))
def test_seam_has_its_test(name: str) -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert f"def {name}(" in text


@pytest.mark.parametrize("by", [by for _, by in ROWS])
def test_what_installs_a_seam_is_where_the_page_says(by: str) -> None:
    """`file.py name`, the file below ``serve_app``."""
    places = re.findall(r"`([\w/]+\.py) ?(\w*)`", by)
    assert places, by
    for file, name in places:
        text = (ROOT / "serve_app" / file).read_text()
        assert not name or re.search(rf"^(async def|def|class) {name}\b", text, re.M), (file, name)


def test_every_prompt_becomes_an_engine_input_in_one_method() -> None:
    from vllm.renderers.base import BaseRenderer

    where = "serve_app/ingress/seams.py install_rendering"
    assert list(inspect.signature(BaseRenderer._process_tokens_async).parameters) == [
        "self",
        "prompt",
        "skip_mm_cache",
    ], where
    assert "await self._process_tokens_async(" in inspect.getsource(BaseRenderer._process_singleton_async), where
    for name in ("render_chat_async", "render_cmpl_async"):
        assert "self.process_for_engine_async(" in inspect.getsource(getattr(BaseRenderer, name)), where


def test_prompts_are_rendered_in_the_context_of_their_request_or_a_copy() -> None:
    """Why ``Sources`` is one object that contexts share: the prompts of a request are rendered in tasks of their own."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.serve.utils import api_utils
    from vllm.renderers.base import BaseRenderer

    where = "serve_app/ingress/sources.py"
    for function in (
        api_utils.with_cancellation,
        BaseRenderer.render_chat_async,
        OpenAIServingResponses.create_responses,
    ):
        assert "context=" not in re.sub(r"\bcontext=context\b", "", inspect.getsource(function)), where


def test_responses_are_stored_where_they_are_counted() -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    where = "serve_app/ingress/responses.py Responses"
    made = inspect.getsource(OpenAIServingResponses.__init__)
    for name in ("response_store", "msg_store", "event_store", "background_tasks", "enable_store"):
        assert re.search(rf"self\.{name}\b", made), f"{where}: {name}"
    created = inspect.getsource(OpenAIServingResponses)
    assert "self.background_tasks[response_id] = task" in created, where
    assert "asyncio.create_task(" in created, f"{where}: a task of its own, whose context is a copy of the request's"


def test_thread_that_listens_for_nixl_has_the_name_that_is_looked_for() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler

    from serve_app.hooks.vllm_plugin import NIXL_LISTENER

    assert f'name="{NIXL_LISTENER}"' in inspect.getsource(base_scheduler), (
        "serve_app/hooks/vllm_plugin.py NIXL_LISTENER"
    )


def test_vllm_logs_the_end_of_a_start_in_these_words() -> None:
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    from serve_app.hooks.start_failure import STARTING

    functions: list[Any] = [EngineCoreProc.run_engine_core, WorkerProc.worker_main]
    for function in functions:
        assert f'{STARTING}."' in inspect.getsource(function), "serve_app/hooks/start_failure.py STARTING"


def test_process_group_of_an_engine_meets_in_a_file_of_the_temporary_folder() -> None:
    from vllm.utils import network_utils

    source = inspect.getsource(network_utils)
    assert source.count("tempfile.") == source.count("tempfile.gettempdir()") == 1, (
        "serve_app/hooks/vllm_plugin.py _process_group_meets_in"
    )


def test_methods_of_workers_are_called_by_name() -> None:
    from vllm.v1.serial_utils import run_method
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    where = "serve_app/transfer/kv_lease.py answer_replica"
    assert issubclass(Worker, WorkerBase), where
    assert run_method(Named(), "name", (1,), {}) == 1, where


class Named:
    def name(self, value: int) -> int:
        return value


def test_proxy_takes_middleware_of_ours() -> None:
    from ray.serve._private import constants, http_util

    from serve_app.hooks.proxy import middlewares

    assert hasattr(constants, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"), "serve_app/hooks/proxy.py"
    assert http_util.validate_http_proxy_callback_return(middlewares()), "serve_app/hooks/proxy.py"
