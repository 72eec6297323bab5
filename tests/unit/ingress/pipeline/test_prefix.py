"""Prompts are announced with their prefix to the stage that prefills, and items that it has in its cache are not encoded."""

import asyncio
from functools import partial
from itertools import count
from typing import Any

import pytest
from vllm.v1.metrics.stats import PrefillStats

from serve_app.handoff.types import EncodeReply, StageRequest
from serve_app.ingress.request import Request, current
from serve_app.routing.affinity import Affinity
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step, encoded
from tests.unit.ingress.pipeline.failing import PREFILL_LOST, pixels, traced
from tests.unit.running import Make, generate, params, render

CERTAIN = (10_000, 1.0)
"""All of a prompt is expected in a prefix cache."""


def sees_seconds(pipeline: FakePipeline) -> None:
    """Encoders take so long that every item is worth leaving out."""

    async def encode(request: StageRequest) -> EncodeReply:
        reply = encoded(request)
        return EncodeReply(reply.ec_transfer_params, reply.replica, ran_s=10.0)

    pipeline.encoder._methods["encode"] = encode


async def steps_of_one_that_prefills(request: StageRequest) -> Any:
    yield Step(A, more={"prefill_stats": PrefillStats(num_prompt_tokens=9, num_cached_tokens=5)})
    yield Step(B, "length")


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["E+P+D", "E+PD"])
def test_a_prompt_is_announced_to_the_stage_that_prefills_it_and_to_no_other(
    make_client: Make, without: tuple[Stage, ...]
) -> None:
    pipeline = FakePipeline(without)
    generate(partial(make_client, **dict.fromkeys(without)), pipeline, "red")
    prefills = pipeline.decoder if without else pipeline.prefiller
    assert isinstance(prefills.affinity, Affinity)
    assert {stage for stage, handle in pipeline.stages.items() if handle.placed} == {prefills.stage}
    (call,) = prefills.placed
    (request,) = prefills.requests("decode" if without else "prefill")
    assert call.prefix is not None and call.prefix.tokens == len(request.prompt.token_ids)


@pytest.mark.parametrize(
    "config",
    [
        {"routing": {"prefix": False}},
        {"engine_args": {"enable_prefix_caching": False}},
        {"prefill": {"engine_args": {"enable_prefix_caching": False}}},
    ],
    ids=["off", "no prefix cache", "none at prefill"],
)
def test_prompts_go_by_the_number_of_calls_where_that_is_asked_for_or_nothing_is_cached(
    make_parts: Any, config: dict[str, Any]
) -> None:
    pipeline = FakePipeline()
    generate(lambda stages: make_parts(stages, **config).client, pipeline, "red")
    assert pipeline.prefiller.affinity is None
    assert not pipeline.prefiller.placed


def test_a_request_that_reads_no_prefix_cache_is_not_announced(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red", prompt_logprobs=0)
    assert not pipeline.prefiller.placed


def test_a_session_goes_with_its_requests(make_client: Make) -> None:
    pipeline = FakePipeline()

    async def main() -> None:
        client = make_client(pipeline.stages)
        for session in ("chat", "chat", "another", None):
            prompt = await render(client, "red")
            async for _ in client.generate(prompt, params(), "req", session_id=session):
                pass

    asyncio.run(main())
    first, again, another, none = (call.prefix.session for call in pipeline.prefiller.placed if call.prefix)
    assert first == again != another != none == ""


def test_what_was_expected_and_what_was_found_is_told_by_stage(make_client: Make) -> None:
    pipeline = FakePipeline()
    trace = traced(make_client, pipeline, "red")[1]
    assert trace.expected == {"prefill": (0, 3)}
    pipeline = FakePipeline((Stage.PREFILL,), steps=steps_of_one_that_prefills)
    pipeline.decoder.holds = (2, 0.0)
    trace = traced(partial(make_client, prefill=None), pipeline, "red")[1]
    assert trace.expected == {"decode": (2, 5)}


def loses(pipeline: FakePipeline, *which: int) -> None:
    """Have these calls of prefill fail, the first being 1: what they need is lost."""
    prefill, numbers = pipeline.prefill, count(1)

    async def losing(request: StageRequest) -> Any:
        if next(numbers) in which:
            raise PREFILL_LOST
        return await prefill(request)

    pipeline.prefiller._methods["prefill"] = losing


def left_out(make: Make, pipeline: FakePipeline, holds: tuple[int, float], **more: Any) -> Any:
    """The trace of a second request, whose pictures the stage that prefills is expected to hold."""
    request = Request("req")
    token = current.set(request)

    async def main() -> None:
        client = make(pipeline.stages, advanced={"encode": {"remember_s": 0}, "retry": {"backoff_s": 0}})
        for handle in pipeline.stages.values():
            handle.holds = (0, 0.0)
        async for _ in client.generate(await render(client, "red", "blue"), params(), "req"):
            pass
        pipeline.log.clear()
        for handle in pipeline.stages.values():
            handle.holds = holds
        async for _ in client.generate(await render(client, "red", "blue"), params(**more), "req"):
            pass

    try:
        asyncio.run(main())
    finally:
        current.reset(token)
    return request.trace


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["E+P+D", "E+PD"])
def test_items_whose_tokens_are_in_a_prefix_cache_are_not_encoded(
    make_client: Make, without: tuple[Stage, ...]
) -> None:
    pipeline = FakePipeline(without)
    sees_seconds(pipeline)
    trace = left_out(partial(make_client, **dict.fromkeys(without)), pipeline, CERTAIN)
    assert "encode" not in pipeline.log
    assert (trace.unencoded_items, trace.rungs) == (2, [])
    prefills, method = (pipeline.decoder, "decode") if without else (pipeline.prefiller, "prefill")
    request = prefills.requests(method)[-1]
    assert pixels(request) == [False, False]
    assert not request.params.extra_args or not request.params.extra_args.get("ec_transfer_params")
    last = request.prompt.items[-1]
    assert prefills.placed[-1].needs == last.offset + last.length


def test_an_item_that_is_not_wholly_in_the_prefix_cache_is_encoded(make_client: Make) -> None:
    pipeline = FakePipeline()
    sees_seconds(pipeline)
    first, second = (item for item in request_of(make_client).prompt.items)
    trace = left_out(make_client, pipeline, (second.offset + second.length - 1, 1.0))
    assert pipeline.log == ["encode", "prefill", "decode"]
    assert trace.unencoded_items == 1
    (asked,) = pipeline.encoder.requests("encode")[-1].prompt.items
    assert asked.hash == second.hash != first.hash
    assert pipeline.prefiller.placed[-1].needs == first.offset + first.length


def request_of(make_client: Make) -> StageRequest:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red", "blue")
    return pipeline.prefiller.requests("prefill")[0]


@pytest.mark.parametrize("holds", [(10_000, 0.0), (0, 1.0)], ids=["not likely", "not cached"])
def test_items_are_encoded_where_leaving_them_does_not_pay(make_client: Make, holds: tuple[int, float]) -> None:
    pipeline = FakePipeline()
    sees_seconds(pipeline)
    assert left_out(make_client, pipeline, holds).unencoded_items == 0
    assert pipeline.log == ["encode", "encode", "prefill", "decode"]


def test_items_that_were_not_in_the_cache_after_all_are_encoded(make_client: Make) -> None:
    """The first request has no failure, so the one that is lost is the second's."""
    pipeline = FakePipeline()
    sees_seconds(pipeline)
    loses(pipeline, 2)
    trace = left_out(make_client, pipeline, CERTAIN)
    assert pipeline.log == ["prefill", "encode", "encode", "prefill", "decode"]
    assert (trace.rungs, trace.unencoded_items) == (["encode-after-all"], 2)
    assert pipeline.prefiller.placed[-1].needs == 0
    lost, again = pipeline.prefiller.requests("prefill")[-2:]
    assert not lost.params.extra_args.get("ec_transfer_params")
    assert len(again.params.extra_args["ec_transfer_params"]) == 2


def test_an_item_lost_after_that_still_has_its_own_tries(make_client: Make) -> None:
    """It is lost once as it was left out, and once more as its embedding is gone; then it is encoded again."""
    pipeline = FakePipeline()
    sees_seconds(pipeline)
    loses(pipeline, 2, 3)
    trace = left_out(make_client, pipeline, CERTAIN)
    assert trace.rungs == ["encode-after-all", "prefill-again"]
    assert pipeline.log.count("encode") == 4
    assert pixels(pipeline.prefiller.requests("prefill")[-1]) == [False, False]
