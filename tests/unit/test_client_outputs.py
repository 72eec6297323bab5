"""serve_app.client: chunks of all choices become the outputs that one engine would have given."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve_app.config import Stage
from serve_app.errors import BadRequest, EPDError, HandoffLost, Overloaded, StageError, StageTimeout, StageUnavailable
from serve_app.handoff import Chunk, PrefillReply, Prompt, StageRequest
from serve_app.outputs import assemble, merge, with_prefill
from serve_app.vllm_errors import to_vllm_error

Pairs = list[tuple[int, Chunk]]


async def source(*items: Chunk | Exception) -> AsyncIterator[Chunk]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


async def pairs(items: Pairs) -> AsyncIterator[tuple[int, Chunk]]:
    for item in items:
        yield item


def assembled(kind: RequestOutputKind, chunks: Pairs, n: int = 1) -> list[RequestOutput]:
    request = StageRequest("req", Prompt([7, 8]), SamplingParams(n=n, output_kind=kind), {"lora_request": None})

    async def main() -> list[RequestOutput]:
        return [output async for output in assemble(request, "text", pairs(chunks))]

    return asyncio.run(main())


def shape(outputs: list[RequestOutput]) -> list[Any]:
    return [([(o.index, o.text, o.finish_reason) for o in output.outputs], output.finished) for output in outputs]


A, B = Chunk("a", [1]), Chunk("b", [2], finish_reason="stop")
X, Y = Chunk("x", [3]), Chunk("y", [4], finish_reason="length")


def test_streamed_chunks_come_as_they_are_and_the_last_finishes() -> None:
    outputs = assembled(RequestOutputKind.DELTA, [(0, A), (0, B)])
    assert shape(outputs) == [([(0, "a", None)], False), ([(0, "b", "stop")], True)]
    assert [o.outputs[0].token_ids for o in outputs] == [[1], [2]]
    assert {(o.request_id, o.prompt, tuple(o.prompt_token_ids or ())) for o in outputs} == {("req", "text", (7, 8))}


def test_streamed_request_finishes_with_the_last_of_its_choices() -> None:
    outputs = assembled(RequestOutputKind.DELTA, [(1, X), (0, A), (0, B), (1, Y)], n=2)
    assert shape(outputs) == [
        ([(1, "x", None)], False),
        ([(0, "a", None)], False),
        ([(0, "b", "stop")], False),
        ([(1, "y", "length")], True),
    ]


def test_request_that_is_not_streamed_is_one_output_with_its_choices_in_order() -> None:
    outputs = assembled(RequestOutputKind.FINAL_ONLY, [(1, Y), (0, B)], n=2)
    assert shape(outputs) == [([(0, "b", "stop"), (1, "y", "length")], True)]


def test_chunks_of_a_choice_that_is_not_streamed_are_joined() -> None:
    first = Chunk("a", [1], [{1: "p"}], -0.5, num_cached_tokens=3, prompt_logprobs=[None])
    rest = Chunk("bc", [2, 3], [{2: "q"}, {3: "r"}], -1.5, "stop", 9)
    (output,) = assembled(RequestOutputKind.FINAL_ONLY, [(1, X), (0, first), (1, Y), (0, rest)], n=2)
    assert shape([output]) == [([(0, "abc", "stop"), (1, "xy", "length")], True)]
    choice = output.outputs[0]
    assert (choice.token_ids, choice.logprobs) == ([1, 2, 3], [{1: "p"}, {2: "q"}, {3: "r"}])
    assert (choice.cumulative_logprob, choice.stop_reason) == (-1.5, 9)
    assert (output.num_cached_tokens, output.prompt_logprobs) == (3, [None])


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_choice_without_an_end_is_an_error(kind: RequestOutputKind) -> None:
    with pytest.raises(StageError, match="without a finish reason"):
        assembled(kind, [(0, B), (1, X)], n=2)


def test_everything_of_a_chunk_is_in_its_output() -> None:
    chunk = Chunk(
        "t",
        [1],
        logprobs=[{1: "p"}],
        cumulative_logprob=-0.5,
        finish_reason="stop",
        stop_reason=9,
        num_cached_tokens=3,
        prompt_logprobs=[None],
    )
    (output,) = assembled(RequestOutputKind.FINAL_ONLY, [(0, chunk)])
    (choice,) = output.outputs
    assert (choice.logprobs, choice.cumulative_logprob, choice.stop_reason) == ([{1: "p"}], -0.5, 9)
    assert (output.num_cached_tokens, output.prompt_logprobs) == (3, [None])


def test_prefills_knowledge_replaces_what_decode_cannot_know() -> None:
    reply = PrefillReply({}, [None, {1: 0.5}], 4, "p")
    chunk = with_prefill(Chunk("a", [1], num_cached_tokens=99), reply)
    assert (chunk.text, chunk.token_ids) == ("a", [1])
    assert (chunk.prompt_logprobs, chunk.num_cached_tokens) == ([None, {1: 0.5}], 4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_merged_chunks_keep_their_index_and_their_order(count: int) -> None:
    async def main() -> Pairs:
        return [pair async for pair in merge([source(A, B) for _ in range(count)])]

    merged = asyncio.run(main())
    assert len(merged) == 2 * count
    for index in range(count):
        assert [chunk for i, chunk in merged if i == index] == [A, B]


@pytest.mark.parametrize("count", [1, 2])
def test_failing_source_ends_the_merge_with_its_error(count: int) -> None:
    error = HandoffLost(Stage.DECODE, "gone")

    async def main() -> None:
        async for _ in merge([source(A, error), source(A, B)][:count]):
            pass

    with pytest.raises(HandoffLost) as caught:
        asyncio.run(main())
    assert caught.value is error


@pytest.mark.parametrize("count", [1, 3])
def test_closing_the_merge_closes_every_source(count: int) -> None:
    closed: list[int] = []

    async def main() -> None:
        async def endless(index: int) -> AsyncIterator[Chunk]:
            try:
                yield A
                await asyncio.Event().wait()
            finally:
                closed.append(index)

        async with aclosing(merge([endless(i) for i in range(count)])) as merged:
            for _ in range(count):
                await anext(merged)

    asyncio.run(main())
    assert sorted(closed) == list(range(count))


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
