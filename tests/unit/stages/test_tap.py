"""serve_app.stages.tap on vLLM's OutputProcessor: what is heard, what vLLM still makes of it, and how outputs add up."""

from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats, PrefillStats, RequestSpecDecodeMetrics
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, SamplingMaskLists
from vllm.v1.serial_utils import MsgpackDecoder

from serve_app.channel.wire import First, Frame
from serve_app.handoff.types import Version
from serve_app.stages.tap import add, codec, install_tap, queued_s

Output = EngineCoreOutput
QUEUED, SCHEDULED, PREEMPTED = EngineCoreEventType
LOGPROBS = LogprobsLists(np.array([[64, 65]]), np.array([[-0.5, -1.0]], np.float32), np.array([1]))
PROMPT_LOGPROBS = LogprobsTensors(torch.tensor([[64, 65]]), torch.tensor([[-0.5, -1.0]]), torch.tensor([1]))


class Front:
    """An engine's OutputProcessor, as replicas have it, and its requests' ends."""

    def __init__(self, log_stats: bool = False) -> None:
        self.processor = OutputProcessor(None, log_stats=log_stats)
        self.queues: dict[str, RequestOutputCollector] = {}

    def add(self, name: str, **params: Any) -> None:
        whole = RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(detokenize=False, output_kind=whole, **params)
        core = EngineCoreRequest(name, [1, 2], None, sampling, None, 100.0, None, None, None, external_req_id=name)
        self.queues[name] = RequestOutputCollector(whole, name)
        self.processor.add_request(core, None, None, 0, self.queues[name])

    def add_pooling(self, name: str) -> None:
        core = EngineCoreRequest(
            name, [1, 2], None, None, PoolingParams(), 100.0, None, None, None, external_req_id=name
        )
        self.queues[name] = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
        self.processor.add_request(core, None, None, 0, self.queues[name])

    def step(self, *outputs: Output) -> OutputProcessorOutput:
        return self.processor.process_outputs(list(outputs), 101.0, None)

    def end(self, name: str) -> Any:
        """The last output of a request; None while it runs."""
        return self.queues[name].get_nowait()


def ending(name: str, *tokens: int, reason: FinishReason = FinishReason.LENGTH, **more: Any) -> Output:
    return Output(name, list(tokens), finish_reason=reason, **more)


# ---- what is heard


def test_outputs_are_heard_as_they_are_and_vllm_keeps_the_end_of_the_request() -> None:
    front, heard = Front(), []
    tap = install_tap(front.processor)
    front.add("a", logprobs=1, prompt_logprobs=1)
    first = Output("a", [64], new_logprobs=LOGPROBS, new_prompt_logprobs_tensors=PROMPT_LOGPROBS)
    last = ending("a", 65, new_logprobs=LOGPROBS, kv_transfer_params={"k": 1})
    with tap.hears("a", heard.append):
        front.step(first)
        assert front.end("a") is None
        front.step(last)
    assert len(heard) == 2 and heard[0] is first and heard[1] is last
    assert [output.new_logprobs is LOGPROBS for output in heard] == [True, True]
    assert first.new_prompt_logprobs_tensors is PROMPT_LOGPROBS
    end = front.end("a")
    assert end.finished and end.outputs[0].finish_reason == "length" and end.kv_transfer_params == {"k": 1}
    assert end.outputs[0].logprobs == [] and end.prompt_logprobs == [None], "nobody reads them here"


def test_vllm_makes_of_requests_that_nobody_hears_what_it_always_makes() -> None:
    front = Front()
    install_tap(front.processor)
    front.add("a", logprobs=1)
    front.step(ending("a", 64, new_logprobs=LOGPROBS))
    (position,) = front.end("a").outputs[0].logprobs
    assert position[64].logprob == -0.5


def test_each_request_is_heard_by_its_own_while_it_is_under_way() -> None:
    front, heard = Front(), {"a": [], "b": []}  # type: ignore[var-annotated]
    tap = install_tap(front.processor)
    for name in ("a", "b", "c"):
        front.add(name)
    with tap.hears("a", heard["a"].append):
        with tap.hears("b", heard["b"].append):
            front.step(Output("c", [1]), Output("b", [2]), Output("a", [3]), Output("gone", [4]))
        front.step(Output("b", [5]), Output("a", [6]))
    front.step(Output("a", [7]))
    tokens = {name: [output.new_token_ids for output in outputs] for name, outputs in heard.items()}
    assert tokens == {"a": [[3], [6]], "b": [[2]]}


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_request_that_failed_or_was_ended_is_told_of_by_its_end_alone(reason: FinishReason) -> None:
    """The ingress would answer its client with it, where it may still try again."""
    front, heard = Front(), []
    tap = install_tap(front.processor)
    front.add("a")
    with tap.hears("a", heard.append):
        front.step(Output("a", [1]))
        front.step(ending("a", reason=reason))
    assert [output.new_token_ids for output in heard] == [[1]]
    assert front.end("a").outputs[0].finish_reason == str(reason)


def test_pooling_request_that_failed_ends_with_an_error_and_others_go_on() -> None:
    front, heard = Front(), []
    tap = install_tap(front.processor)
    for name in ("a", "b"):
        front.add_pooling(name)
    with tap.hears("a", heard.append), tap.hears("b", heard.append):
        front.step(ending("a", reason=FinishReason.ERROR))
        front.step(ending("b", reason=FinishReason.STOP, pooling_output=torch.ones(2)))
    assert [output.request_id for output in heard] == ["b"]
    assert front.end("a").error is not None
    whole = front.end("b")
    assert whole.error is None and whole.outputs.data.tolist() == [1, 1]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION])
def test_every_other_end_is_heard(reason: FinishReason) -> None:
    front, heard = Front(), []
    tap = install_tap(front.processor)
    front.add("a")
    with tap.hears("a", heard.append):
        front.step(ending("a", 1, reason=reason, stop_reason=9))
    assert [(output.finish_reason, output.stop_reason) for output in heard] == [(reason, 9)]


def test_steps_are_told_once_each_after_all_of_it_was_heard() -> None:
    front, log = Front(), []
    tap = install_tap(front.processor)
    tap.stepped = lambda: log.append("step")
    for name in ("a", "b", "c"):
        front.add(name)
    with ExitStack() as stack:
        for name in ("a", "b"):
            stack.enter_context(tap.hears(name, lambda output: log.append(output.request_id)))
        front.step(Output("a", [1]), Output("c", [1]), Output("b", [1]))
        front.step(Output("c", [2]))
        front.step()
        front.step(Output("b", [2]))
    assert log == ["a", "b", "step", "b", "step"]


def test_what_vllm_says_of_a_step_goes_on_to_its_handler() -> None:
    """As it would without a tap, its newest arguments too."""
    front = Front()
    install_tap(front.processor)
    front.add("a")
    processed = front.processor.process_outputs([ending("a", 64)], 101.0, None, weight_version="v7")
    assert processed == OutputProcessorOutput([], [])
    (span,) = front.end("a").outputs[0].weight_versions
    assert span["version"] == "v7" if isinstance(span, dict) else "v7" in str(span)


# ---- statistics


def told(stats: IterationStats) -> dict[str, Any]:
    values = {name: value for name, value in vars(stats).items() if name != "iteration_timestamp"}
    values["prompt_token_stats"] = asdict(stats.prompt_token_stats)
    values["finished_requests"] = [asdict(each) for each in stats.finished_requests]
    return values


def test_statistics_are_those_of_an_engine_without_a_tap() -> None:
    def steps() -> list[list[Output]]:
        begins = {"events": [EngineCoreEvent(QUEUED, 90.0), EngineCoreEvent(SCHEDULED, 92.0)]}
        prefilled = PrefillStats(2, num_computed_tokens=1, num_cached_tokens=1, num_local_cached_tokens=1)
        return [
            [
                Output("a", [1], prefill_stats=prefilled, new_logprobs=LOGPROBS, **begins),
                Output("b", [1, 2], prefill_stats=prefilled, **begins),
            ],
            [Output("a", [2], new_logprobs=LOGPROBS), Output("b", [], events=[EngineCoreEvent(PREEMPTED, 95.0)])],
            [ending("a", 3, new_logprobs=LOGPROBS), ending("b", reason=FinishReason.ERROR)],
        ]

    def statistics(hears: tuple[str, ...]) -> list[dict[str, Any]]:
        front, all_stats = Front(log_stats=True), []
        for name in ("a", "b"):
            front.add(name, logprobs=1)
        with ExitStack() as stack:
            if hears:
                tap = install_tap(front.processor)
                for name in hears:
                    stack.enter_context(tap.hears(name, lambda _: None))
            for number, outputs in enumerate(steps()):
                stats = IterationStats()
                stats.iteration_timestamp = 200.0 + number
                front.processor.process_outputs(outputs, 100.0 + number, stats)
                all_stats.append(told(stats))
        return all_stats

    usual = statistics(())
    assert usual[0]["num_generation_tokens"] == 3 and usual[-1]["finished_requests"]
    assert statistics(("a", "b")) == usual
    assert statistics(("b",)) == usual


def at(*events: tuple[EngineCoreEventType, float]) -> Output:
    return Output("a", [1], events=[EngineCoreEvent(kind, when) for kind, when in events])


@pytest.mark.parametrize(
    ("output", "seconds"),
    [
        (at((QUEUED, 1.0), (SCHEDULED, 1.25)), 0.25),
        (at((QUEUED, 1.0), (SCHEDULED, 1.25), (PREEMPTED, 2.0), (SCHEDULED, 5.0)), 0.25),
        (at((QUEUED, 1.25), (SCHEDULED, 1.0)), 0.0),
        (at((QUEUED, 1.0)), 0.0),
        (at((SCHEDULED, 1.0)), 0.0),
        (Output("a", [1]), 0.0),
    ],
)
def test_time_in_the_queue_is_up_to_when_the_request_was_first_scheduled(output: Output, seconds: float) -> None:
    assert queued_s(output) == seconds


def test_time_in_the_engines_queue_is_told_where_there_are_statistics() -> None:
    def output(stats: Any) -> Any:
        return SimpleNamespace(metrics=stats)

    assert queued_s(output(SimpleNamespace(queued_ts=1.0, scheduled_ts=1.25))) == 0.25
    assert queued_s(output(SimpleNamespace(queued_ts=1.25, scheduled_ts=1.0))) == 0.0
    assert queued_s(output(SimpleNamespace(queued_ts=1.0, scheduled_ts=0.0))) == 0.0, "never scheduled"
    assert queued_s(output(None)) == 0.0


# ---- adding up


DROPPED = {
    "events": [EngineCoreEvent(QUEUED, 1.0)],
    "trace_headers": {"traceparent": "00"},
    "kv_transfer_params": {"k": 1},
    "ec_transfer_params": {"e": 1},
}
"""They mean nothing to the ingress."""
APART = {
    "new_logprobs": LOGPROBS,
    "new_prompt_logprobs_tensors": PROMPT_LOGPROBS,
    "routed_experts": np.ones((1, 2, 3), np.int16),
    "new_sampling_mask": SamplingMaskLists(np.array([1, 2]), np.array([0, 2])),
    "prompt_token_id_logprobs": torch.ones(2, 3),
}
"""With one of these an output stays as it is."""
OF_THE_FIRST = {"prefill_stats": PrefillStats(8, num_cached_tokens=3)}
OF_THE_LAST = {
    "finish_reason": FinishReason.STOP,
    "stop_reason": 9,
    "spec_decode_metrics": RequestSpecDecodeMetrics(num_spec_tokens=1),
}
ADDED = {"request_id", "new_token_ids"}
NEVER = {
    "pooling_output",  # of other engines than ours
    "num_nans_in_logits",  # for the engine's own statistics
    "mm_cache_miss_hashes",  # with `FinishReason.ERROR`, which is not heard
}


def test_every_field_of_an_output_has_its_rule() -> None:
    known = ADDED | NEVER | DROPPED.keys() | APART.keys() | OF_THE_FIRST.keys() | OF_THE_LAST.keys()
    assert set(Output.__struct_fields__) == known, (
        "serve_app/stages/tap.py add, ARRAYS, AT_STAGE: what becomes of the new field of an EngineCoreOutput where outputs "
        "of one request are added up?"
    )
    defaults = dict(zip(reversed(Output.__struct_fields__), reversed(Output.__struct_defaults__), strict=False))
    for name, value in (DROPPED | APART | OF_THE_FIRST | OF_THE_LAST).items():
        assert defaults[name] is None and value is not None, f"serve_app/stages/tap.py: {name}"


def test_tokens_are_added_to_those_that_wait() -> None:
    waiting: list[Output] = []
    parts = [[1], [], [2, 3], [4]]
    assert [add(waiting, Output("a", part)) for part in parts] == [0] * 4
    assert waiting == [Output("a", [1, 2, 3, 4])]
    assert parts == [[1], [], [2, 3], [4]], "vLLM may still have them"


@pytest.mark.parametrize("name", OF_THE_FIRST)
def test_what_is_told_once_at_the_beginning_stays(name: str) -> None:
    waiting: list[Output] = []
    add(waiting, Output("a", [1], **{name: OF_THE_FIRST[name]}))
    add(waiting, Output("a", [2]))
    (added,) = waiting
    assert getattr(added, name) is OF_THE_FIRST[name] and added.new_token_ids == [1, 2]


@pytest.mark.parametrize("name", OF_THE_LAST)
def test_what_is_told_once_at_the_end_comes_with_it(name: str) -> None:
    waiting: list[Output] = []
    add(waiting, Output("a", [1]))
    add(waiting, Output("a", [2], **{name: OF_THE_LAST[name]}))
    (added,) = waiting
    assert getattr(added, name) is OF_THE_LAST[name] and added.new_token_ids == [1, 2]


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("waits", [True, False])
def test_what_means_nothing_to_the_ingress_is_not_sent(name: str, waits: bool) -> None:
    waiting = [Output("a", [1])] if waits else []
    add(waiting, Output("a", [2], **{name: DROPPED[name]}))
    assert getattr(waiting[-1], name) is None


@pytest.mark.parametrize("name", APART)
def test_outputs_with_arrays_stay_as_they_are_and_their_bytes_are_told(name: str) -> None:
    value: Any = APART[name]
    arrays = [each for each in (value if isinstance(value, tuple) else (value,)) if each is not None]
    waiting: list[Output] = []
    outputs = [Output("a", [number], **({name: value} if number in (2, 3) else {})) for number in range(6)]
    sizes = [add(waiting, output) for output in outputs]
    size = sum(array.nbytes for array in arrays)
    assert size and sizes == [0, 0, size, size, 0, 0]
    assert [output.new_token_ids for output in waiting] == [[0, 1], [2], [3], [4, 5]]
    assert [getattr(output, name) is value for output in waiting] == [False, True, True, False]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return type(one) is type(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def test_all_that_is_sent_of_an_output_comes_as_it_was() -> None:
    whole = Output("a", [1, 2], **APART, **OF_THE_FIRST, **OF_THE_LAST)
    waiting: list[Output] = []
    codec().add(waiting, whole)
    first = First("a", "decode-0", 0.5, None, Version("front", weights="w"))
    sent = codec().encode(Frame(waiting, [first]))
    come = MsgpackDecoder(Frame[Output]).decode([bytearray(each) for each in sent])
    assert isinstance(come, Frame) and come.firsts == [first]
    (output,) = come.outputs
    for name in Output.__struct_fields__:
        assert same(getattr(whole, name), getattr(output, name)), f"serve_app/stages/tap.py codec: {name}"
