"""Tokens come by the channel, and the call says when it has ended."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind

from serve_app.channel.wire import First, Frame, ReplyTo
from serve_app.handoff.types import DecodeReply, StageRequest
from serve_app.routing.handles import Call
from tests.fakes import A, B, FakeLink, FakePipeline, Step
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    WHOLE,
    blocks,
    logprobs_of,
    streamed_or_whole,
    texts,
    together,
    traced,
)
from tests.unit.running import Make, generate


@streamed_or_whole
def test_answer_goes_on_elsewhere_where_the_channel_of_its_replica_breaks(
    make_client: Make, kind: RequestOutputKind
) -> None:
    ended: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        if len(pipeline.decoder.requests("decode")) > 1:
            yield Step(B, "length", replica="decode-1")
            return
        yield Step(A)
        assert pipeline.decodes.answers is not None
        pipeline.decodes.answers.lost(pipeline.decodes.links["decode-0"])  # type: ignore[arg-type]
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.request_id)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    first, rest = pipeline.decoder.requests("decode")
    assert rest.prompt.token_ids == first.prompt.token_ids + A
    assert ended == [first.request_id]
    assert record.rungs == ["decode-again"]
    assert record.replicas["decode"] == ["decode-0", "decode-1"]
    assert pipeline.released() == []


def test_channel_that_breaks_is_no_matter_to_answers_of_other_replicas(make_client: Make) -> None:
    both, broken = asyncio.Barrier(2), asyncio.Event()

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        again = len(pipeline.decoder.requests("decode")) > 2
        (number,) = blocks(request)
        yield Step(B if again else A, "length" if again else None, replica=f"decode-{number}")
        if again:
            return
        await both.wait()
        if number == 1:
            assert pipeline.decodes.answers is not None
            pipeline.decodes.answers.lost(pipeline.decodes.links["decode-1"])  # type: ignore[arg-type]
            broken.set()
            await asyncio.Event().wait()
        await broken.wait()
        yield Step(B, "length", replica=f"decode-{number}")

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, n=2, output_kind=WHOLE)
    assert [choice.text for choice in outputs[-1].outputs] == ["ab", "ab"]
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2], [3]]
    assert record.rungs == ["decode-again"]


def test_last_tokens_may_come_after_the_end_of_their_call(make_client: Make) -> None:
    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, link = pipeline.decodes.answers, request.request_id, FakeLink("decode-0")
        assert answers is not None
        answers.received(link, Frame([Step(A).output(key)], [First(key, "decode-0")]))  # type: ignore[arg-type]
        last = Frame([Step(B, "length").output(key)])
        asyncio.get_running_loop().call_later(0.05, answers.received, link, last)
        return DecodeReply("decode-0", 2)

    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline)
    assert "".join(texts(outputs)) == "ab"
    assert (record.rungs, pipeline.log.count("decode")) == ([], 1)


def test_answer_whose_last_tokens_never_come_goes_on(make_client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        again = len(pipeline.decoder.requests("decode")) > 1
        yield Step(B if again else A, "length" if again else None)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline)
    assert "".join(texts(outputs)) == "ab"
    first, rest = pipeline.decoder.requests("decode")
    assert rest.prompt.token_ids == first.prompt.token_ids + A
    assert record.rungs == ["decode-again"]


def test_call_that_does_not_end_after_its_last_token_is_ended(
    make_client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.ingress.pipeline.JOIN_S", 0.01)
    ended: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A, "length")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.request_id)

    pipeline = FakePipeline(steps=steps)
    assert texts(generate(make_client, pipeline)) == ["a"]
    assert ended == [call.request_id for call in pipeline.decoder.requests("decode")]


@streamed_or_whole
def test_call_that_serve_sends_twice_is_one_answer(
    make_client: Make, monkeypatch: pytest.MonkeyPatch, kind: RequestOutputKind
) -> None:
    """That of whichever replica was heard first. The other one is told to make no more, and its end is no end."""
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)
    one, other = FakeLink("decode-0"), FakeLink("decode-1")

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key = pipeline.decodes.answers, request.request_id
        assert answers is not None

        def came(link: FakeLink, step: Step, *firsts: First) -> None:
            answers.received(link, Frame([step.output(key)], list(firsts)))  # type: ignore[arg-type]

        came(one, Step(A), First(key, "decode-0"))
        came(other, Step([1]), First(key, "decode-1"))
        came(other, Step([2], "length"))
        asyncio.get_running_loop().call_later(0.1, came, one, Step(B, "length"))
        return DecodeReply("decode-1", 2)

    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    (call,) = pipeline.decoder.requests("decode")
    assert (one.aborted, other.aborted) == ([], [call.request_id])
    assert (record.replicas["decode"], record.output_tokens, record.rungs) == (["decode-0"], 2, [])


@streamed_or_whole
def test_decode_is_told_to_end_an_answer_at_its_stop_string(make_client: Make, kind: RequestOutputKind) -> None:
    made = 0

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal made
        while True:
            made += 1
            yield Step(A if made < 3 else B)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, stop=["ab"], output_kind=kind)
    answer = together(outputs)
    assert (answer.text, answer.token_ids) == ("a", [*A, *A, *B])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "ab")
    (call,) = pipeline.decoder.requests("decode")
    assert pipeline.decodes.links["decode-0"].aborted == [call.request_id]
    assert (made, record.output_tokens, record.rungs) == (3, 3, [])


@pytest.mark.parametrize("come", ["in one output", "in one frame", "in several frames"])
def test_tokens_that_came_with_those_of_a_stop_string_and_after_it_are_dropped(make_client: Make, come: str) -> None:
    """Outputs with logprobs are not added up (``tap.add``): there may be several of a request in a frame."""

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, link = pipeline.decodes.answers, request.request_id, FakeLink("decode-0")
        assert answers is not None
        firsts = [First(key, "decode-0")]
        if come == "in one output":
            outputs = [Step(tokens, more={"new_logprobs": logprobs_of(*tokens)}).output(key)]
        else:
            outputs = [Step([token], more={"new_logprobs": logprobs_of(token)}).output(key) for token in tokens]
        for frame in [[output] for output in outputs] if come == "in several frames" else [outputs]:
            answers.received(link, Frame(frame, firsts))  # type: ignore[arg-type]
            firsts = []
        return DecodeReply("decode-0", len(tokens))

    tokens = [*A, *B, *A, *A]
    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline, stop=["b"], logprobs=1)
    answer = together(outputs)
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("a", [*A, *B], "b")
    assert (len(answer.logprobs), answer.cumulative_logprob) == (2, -1.0)
    assert record.output_tokens == 2


def test_what_comes_of_a_call_that_failed_does_not_get_among_the_rest(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        first, *rest = pipeline.decoder.requests("decode")
        if rest:
            answers = pipeline.decodes.answers
            assert answers is not None
            late = Frame([Step([1], "length").output(first.request_id)])
            answers.received(pipeline.decodes.links["decode-0"], late)  # type: ignore[arg-type]
            yield Step(B)
            answers.received(pipeline.decodes.links["decode-0"], late)  # type: ignore[arg-type]
            yield Step(A, "length")
            return
        yield Step(A)
        raise DECODE_GONE

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline)
    assert ("".join(texts(outputs)), record.output_tokens) == ("aba", 3)


def test_call_that_was_heard_of_waits_for_no_blocks_any_more(make_client: Make, monkeypatch: Any) -> None:
    calls: list[Call] = []
    sources: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        for step in (Step(A), Step(B, "length")):
            sources.append(calls[-1].source)
            yield step

    pipeline = FakePipeline(steps=steps)
    stage_call = pipeline.decoder.call

    async def call(method: str, *args: Any, call: Call | None = None) -> Any:
        if call is not None:
            calls.append(call)
        return await stage_call(method, *args, call=call)

    monkeypatch.setattr(pipeline.decoder, "call", call)
    generate(make_client, pipeline)
    assert sources == ["node-0", ""]
