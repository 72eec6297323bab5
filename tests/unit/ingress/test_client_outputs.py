"""What decode makes of all choices becomes the outputs that one engine would have given."""

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from serve_app.handoff.errors import (
    BadRequest,
    EPDError,
    HandoffLost,
    Overloaded,
    StageError,
    StageTimeout,
    StageUnavailable,
)
from serve_app.handoff.types import PrefillReply, StageRequest
from serve_app.ingress.client import EPDClient
from serve_app.ingress.vllm_errors import to_vllm_error
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step
from tests.unit.running import Make, background, generate, params, render, run

C = [66]
KINDS = list(RequestOutputKind)
CACHED = 3


def index_of(request: StageRequest) -> int:
    """Of the choice that a decode call makes: they have seeds."""
    return int(request.params.seed) - 7


def shape(outputs: list[RequestOutput]) -> list[Any]:
    return [([(o.index, o.text, o.finish_reason) for o in output.outputs], output.finished) for output in outputs]


def test_streamed_tokens_come_as_they_are_and_the_last_finish(make_client: Make) -> None:
    outputs = generate(make_client, FakePipeline())
    assert shape(outputs) == [([(0, "a", None)], False), ([(0, "b", "length")], True)]
    assert [list(o.outputs[0].token_ids) for o in outputs] == [A, B]
    assert {(o.request_id, o.prompt) for o in outputs} == {("req", " what?")}


def test_streamed_request_finishes_with_the_last_of_its_choices(make_client: Make) -> None:
    async def main() -> list[RequestOutput]:
        turns = [asyncio.Event() for _ in range(4)]
        turns[0].set()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            """The choices speak in turn: 1, 0, 0, 1."""
            for turn, step in {1: ((0, Step(A)), (3, Step(B, "length"))), 0: ((1, Step(C)), (2, Step(A, "length")))}[
                index_of(request)
            ]:
                await turns[turn].wait()
                yield step

        client = make_client(FakePipeline(steps=steps).stages)
        prompt, outputs = await render(client), []
        async for output in client.generate(prompt, params(n=2, seed=7), "req"):
            outputs.append(output)
            if len(outputs) < len(turns):
                turns[len(outputs)].set()
        await background(client)
        return outputs

    assert shape(asyncio.run(main())) == [
        ([(1, "a", None)], False),
        ([(0, "c", None)], False),
        ([(0, "a", "length")], False),
        ([(1, "b", "length")], True),
    ]


def test_request_that_is_not_streamed_is_one_output_with_its_choices_in_order(make_client: Make) -> None:
    first = asyncio.Event()

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        if index_of(request) == 0:
            await first.wait()
        yield Step(A if index_of(request) else B)
        yield Step(C, "length")
        first.set()

    outputs = generate(make_client, FakePipeline(steps=steps), n=2, seed=7, output_kind=RequestOutputKind.FINAL_ONLY)
    assert shape(outputs) == [([(0, "bc", "length"), (1, "ac", "length")], True)]


@pytest.mark.parametrize("n", [2, 5])
def test_tokens_of_choices_keep_their_index_and_their_order(make_client: Make, n: int) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        for number in range(6):
            yield Step([64 + (index_of(request) + number) % 6], "length" if number == 5 else None)

    outputs = generate(make_client, FakePipeline(steps=steps), n=n, seed=7)
    for index in range(n):
        text = "".join(choice.text for output in outputs for choice in output.outputs if choice.index == index)
        assert text == "".join("abcdef"[(index + number) % 6] for number in range(6))


# ---- beside one engine


def logprobs(*tokens: int) -> LogprobsLists:
    """The token and another one, of each position."""
    ids = np.array([[token, token + 1] for token in tokens], dtype=np.int32)
    return LogprobsLists(ids, -ids.astype(np.float32) / 64, np.ones(len(tokens), dtype=np.int32))


PROMPT_LOGPROBS = LogprobsTensors(
    torch.tensor([[64, 65], [66, 67]]), torch.tensor([[-0.5, -1.0], [-0.25, -2.0]]), torch.tensor([1, 2])
)


def answer(index: int, asked: dict[str, Any]) -> list[Step]:
    """Of a choice: within characters, with several tokens at a time, and to an end of each kind."""
    eos = 1
    tokens = ([64], [127], [102, 65], [66 + index]), ([65], [66, 67], [], [eos])
    steps = []
    for number, said in enumerate(tokens[index % 2]):
        more: dict[str, Any] = {}
        if number == 0:
            more["prefill_stats"] = PrefillStats(8, num_cached_tokens=CACHED)
        if asked.get("logprobs") is not None and said:
            more["new_logprobs"] = logprobs(*said)
        steps.append(Step(said, ("length", "stop")[index % 2] if number == 3 else None, more=more))
    return steps


def by_one_engine(client: EPDClient, rendered: Any, **asked: Any) -> list[RequestOutput]:
    """As ``AsyncLLM.add_request`` puts the pieces together (``vllm/v1/engine/async_llm.py``)."""
    processor = OutputProcessor(client.renderer.tokenizer, log_stats=False)
    core = client.input_processor.process_inputs("req", rendered, params(**asked), supported_tasks=("generate",))
    client.input_processor.assign_request_id(core)
    assert core.sampling_params is not None
    queue = RequestOutputCollector(core.sampling_params.output_kind, core.request_id)
    ids = [core.request_id]
    if core.sampling_params.n == 1:
        processor.add_request(core, " what?", None, 0, queue)
    else:
        parent, ids = ParentRequest(core), []
        for index in range(core.sampling_params.n):
            child = copy.copy(core)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            processor.add_request(child, " what?", parent, index, queue)
            ids.append(child.request_id)
    outputs = []
    for index, request_id in enumerate(ids):
        for number, step in enumerate(answer(index, asked)):
            output: EngineCoreOutput = step.output(request_id)
            if number == 0 and asked.get("prompt_logprobs") is not None:
                output.new_prompt_logprobs_tensors = PROMPT_LOGPROBS
            processor.process_outputs([output])
            if (come := queue.get_nowait()) is not None:
                assert isinstance(come, RequestOutput)
                outputs.append(come)
    return outputs


def told(outputs: list[RequestOutput], kind: RequestOutputKind) -> dict[str, Any]:
    """All that outputs say, however many they are."""
    streamed = kind is RequestOutputKind.DELTA
    choices: dict[int, dict[str, Any]] = {}
    for output in outputs:
        for each in output.outputs:
            parts = {
                "text": each.text,
                "token_ids": list(each.token_ids),
                "logprobs": [
                    {token: (of.logprob, of.rank, of.decoded_token) for token, of in position.items()}
                    for position in each.logprobs or ()
                ],
            }
            ends = {
                "finish_reason": each.finish_reason,
                "stop_reason": each.stop_reason,
                "cumulative_logprob": each.cumulative_logprob,
                "has logprobs": each.logprobs is not None,
            }
            before = choices.get(each.index)
            if streamed and before is not None:
                parts = {name: before[name] + part for name, part in parts.items()}
            choices[each.index] = parts | ends
    (request,) = {
        (each.request_id, each.prompt, tuple(each.prompt_token_ids or ()), each.num_cached_tokens) for each in outputs
    }
    # With the first output of a choice, which may be that of two.
    ofs = (output.prompt_logprobs for output in (outputs if streamed else outputs[-1:]) if output.prompt_logprobs)
    prompt_logprobs = [
        None if position is None else {token: of.logprob for token, of in position.items()}
        for position in next(ofs, ())
    ]
    return {"choices": choices, "of": request, "prompt": prompt_logprobs, "finished": [o.finished for o in outputs][-1]}


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["prefill", "prefill at decode"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"logprobs": 1},
        {"n": 2, "seed": 7, "logprobs": 1},
        {"n": 3, "seed": 7},
        {"skip_special_tokens": False, "logprobs": 0},
        {"detokenize": False},
        {"stop": ["b"]},
        {"stop": ["b"], "include_stop_str_in_output": True, "logprobs": 1},
        {"prompt_logprobs": 1},
        {"n": 2, "seed": 7, "prompt_logprobs": 1, "logprobs": 1},
    ],
    ids=str,
)
def test_outputs_are_those_of_one_engine(
    make_client: Make, asked: dict[str, Any], kind: RequestOutputKind, without: tuple[Stage, ...]
) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        for number, step in enumerate(answer(index_of(request) if "seed" in asked else 0, asked)):
            if number == 0 and request.params.prompt_logprobs is not None:
                step.more["new_prompt_logprobs_tensors"] = PROMPT_LOGPROBS
            yield step

    async def prefill(request: StageRequest) -> PrefillReply:
        wanted = request.params.prompt_logprobs is not None
        return PrefillReply({"k": 1}, PROMPT_LOGPROBS if wanted else None, CACHED, "prefill-0")

    async def main() -> None:
        client = make_client(FakePipeline(without, steps=steps, prefill=prefill).stages)
        ours = await run(client, output_kind=kind, **asked)
        await background(client)
        theirs = by_one_engine(client, await render(client), output_kind=kind, **asked)
        assert told(ours, kind) == told(theirs, kind)
        assert ours[-1].finished

    asyncio.run(main())


# ---- errors


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (StageError(Stage.PREFILL, "x"), GracefulHTTPError, 503),
        (StageTimeout(Stage.PREFILL, "x"), GracefulHTTPError, 504),
        (HandoffLost(Stage.PREFILL, "x"), GracefulHTTPError, 503),
        (StageUnavailable(Stage.PREFILL, "x"), GracefulHTTPError, 503),
        (Overloaded("x"), GracefulHTTPError, 503),
        (BadRequest("x"), VLLMValidationError, None),
        (EPDError("x"), GracefulHTTPError, 500),
    ],
)
def test_our_errors_become_vllms_with_their_message(error: Exception, kind: type, status: int | None) -> None:
    mapped = to_vllm_error(error)
    assert type(mapped) is kind
    assert str(mapped) == str(error)
    assert getattr(mapped, "http_status", None) == status


def test_other_errors_stay_what_they_are() -> None:
    error = KeyError("x")
    assert to_vllm_error(error) is error
