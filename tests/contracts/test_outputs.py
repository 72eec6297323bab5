"""Raw outputs: engines without vLLM's front end of their requests, and the ingress with it."""

import asyncio
import inspect
import re
from typing import Any

import pytest

from tests.contracts.looking import fields, find, parameters


def test_the_last_output_of_a_request_has_what_we_read_of_it() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.metrics.stats import RequestStateStats

    read = {"outputs", "num_cached_tokens", "kv_transfer_params", "ec_transfer_params", "metrics", "finished"}
    missing = read - parameters(RequestOutput).keys()
    assert not missing, f"deployments/prefill.py, decode.py, encoder.py: RequestOutput lacks {missing}"
    assert "finish_reason" in fields(CompletionOutput), "stages/engine.py: StageEngine.run"
    assert {"queued_ts", "scheduled_ts"} <= fields(RequestStateStats), "serve_app/stages/tap.py queued_s"


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


def test_ends_of_requests_are_those_that_we_know() -> None:
    from vllm.v1.engine import FinishReason

    assert {reason.name for reason in FinishReason} == {"STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"}, (
        f"{TAP} UNHEARD"
    )
    assert str(FinishReason.ERROR) == "error", RUN


def test_what_a_prefix_cache_had_is_told_with_the_first_token_and_not_read_for_logprobs_of_the_prompt() -> None:
    from vllm import SamplingParams
    from vllm.config import ModelConfig
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import PrefillStats

    assert "prefill_stats" in EngineCoreOutput.__struct_fields__, "serve_app/ingress/pipeline.py _decode"
    assert "num_cached_tokens" in fields(PrefillStats), "serve_app/ingress/pipeline.py _decode"
    assert SamplingParams(prompt_logprobs=1).skip_reading_prefix_cache, "serve_app/ingress/pipeline.py _prefix"
    assert not SamplingParams().skip_reading_prefix_cache, "serve_app/ingress/pipeline.py _prefix"
    assert isinstance(ModelConfig.is_prefix_caching_supported, property), (
        "serve_app/ingress/assembly.py place_by_prefix"
    )
