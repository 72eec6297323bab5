"""A choice is tried again, with hand-offs of its own, as often as it may."""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.handoff import shaping
from serve_app.handoff.errors import EngineDead
from serve_app.handoff.types import PrefillReply, StageRequest
from serve_app.ingress.client import EPDClient
from serve_app.stage import Stage
from tests.fakes import A, FakePipeline, Step
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    DECODE_LOST,
    PREFILL_GONE,
    PREFILL_LOST,
    STRUCTURE,
    blocks,
    given_back,
    pixels,
    texts,
    traced,
)
from tests.unit.running import Make, generate, run


def test_lost_prefill_is_made_again_and_the_client_sees_nothing_of_it(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "prefill", "prefill", "decode"]  # its item is encoded already
    first, second = pipeline.prefiller.requests("prefill")
    assert pixels(first) == pixels(second) == [False]
    assert first.params.extra_args == second.params.extra_args
    assert record.rungs == ["prefill-again"]
    assert record.error is None
    assert " rungs=prefill-again" in record.line(200)


@pytest.mark.parametrize("without", [(), (Stage.ENCODER,)])
def test_prompt_that_prefill_lost_twice_is_prefilled_by_decode(make_client: Make, without: tuple[Stage, ...]) -> None:
    pipeline = FakePipeline(without, fails={"prefill": [PREFILL_GONE] * 9})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode"] * (not without) + ["prefill", "prefill", "decode"]
    assert record.rungs == ["prefill-again", "prefill-again", "prefill-at-decode(failed)"]
    (decode,) = pipeline.decoder.requests("decode")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [bool(without)]
    assert (pipeline.released(), record.error) == ([], None)


@pytest.mark.parametrize("error", [DECODE_GONE, DECODE_LOST], ids=lambda error: type(error).__name__)
def test_decode_lost_before_its_first_token_gives_the_blocks_back_and_begins_again(
    make_client: Make, error: Exception
) -> None:
    pipeline = FakePipeline(fails={"decode": [error]})
    outputs, record = traced(make_client, pipeline)
    assert texts(outputs) == ["a", "b"]
    assert [output.finished for output in outputs] == [False, True]
    assert given_back(pipeline) == [[1]]
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2]]
    assert sorted(pipeline.log) == ["decode", "decode", "prefill", "prefill", "release"]
    assert record.rungs == ["decode-again"]
    assert (record.output_tokens, record.error) == (2, None)


@pytest.mark.parametrize("without", [(), (Stage.ENCODER,)])
def test_prompt_whose_blocks_were_lost_twice_is_prefilled_by_decode(
    make_client: Make, without: tuple[Stage, ...]
) -> None:
    """Where no blocks get across at all, answers still do: a network between two nodes that UCX cannot use."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST, DECODE_LOST]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert record.rungs == ["decode-again", "decode-again", "prefill-at-decode(failed)"]
    *_, decode = pipeline.decoder.requests("decode")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [True]
    assert len(pipeline.prefiller.requests("prefill")) == len(pipeline.released()) == 2


def test_request_that_two_engines_died_of_is_not_given_to_a_third(make_client: Make) -> None:
    dead = EngineDead(Stage.DECODE, "failed: its engine is dead")
    pipeline = FakePipeline(fails={"decode": [dead] * 9})
    with pytest.raises(GracefulHTTPError, match="engine is dead"):
        generate(make_client, pipeline)
    assert len(pipeline.decoder.requests("decode")) == 2


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_that_decode_alone_gives_up_is_the_clients_mistake(make_client: Make, without: Any) -> None:
    """vLLM ends a request whose grammar does not compile as it ends one whose blocks or embeddings are lost."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST] * 9})
    with pytest.raises(VLLMValidationError, match="grammar"):
        generate(make_client, pipeline, "red", **STRUCTURE)
    assert pipeline.log.count("decode") == 2


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_is_not_blamed_for_what_decode_did_not_find(make_client: Make, without: Any) -> None:
    """Decode then has nothing to find: the items have their pixels, and no blocks are to be pulled."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red", **STRUCTURE)) == ["a", "b"]
    ((alone,),) = [args for method, args in pipeline.decoder.calls if method == "decode"][1:]
    assert pixels(alone) == [True]
    assert shaping.pulled_blocks(alone.params) is None and "ec_transfer_params" not in (alone.params.extra_args or {})


def test_items_whose_embeddings_were_lost_are_encoded_again(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill", "encode", "encode", "prefill", "decode"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[False, False]] * 2
    assert record.rungs == ["prefill-again"]


def test_decode_that_prefills_asks_for_lost_embeddings_again(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.PREFILL,), fails={"decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert pipeline.log == ["encode", "decode", "encode", "decode"]


def test_lost_items_are_encoded_again_for_the_next_request_too(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
        client = make_client(pipeline.stages, advanced={"retry": {"attempts": 1}})
        with pytest.raises(GracefulHTTPError):
            await run(client, "red")
        await run(client, "red")
        await run(client, "red")
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "encode", "prefill", "decode", "prefill", "decode"]


def test_embeddings_lost_twice_are_made_by_prefill(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST, PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill"] * 2 + ["prefill", "decode"]
    *_, third = pipeline.prefiller.requests("prefill")
    (decode,) = pipeline.decoder.requests("decode")
    for call in (third, decode):
        assert pixels(call) == [True, True]
        assert "ec_transfer_params" not in call.params.extra_args
    assert record.rungs == ["prefill-again", "prefill-again"]


def test_pipeline_without_an_encoder_climbs_the_same_ladder(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.ENCODER,), fails={"prefill": [PREFILL_GONE], "decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[True]] * 2
    assert given_back(pipeline) == [[1]]


def test_hand_off_is_never_used_twice(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE, DECODE_LOST]})
    generate(make_client, pipeline, "red")
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2], [3]]
    assert given_back(pipeline) == [[1], [2]]


def test_hand_off_that_outwaits_its_lease_is_prefilled_again(make_client: Make) -> None:
    calls = 0

    async def prefill(request: StageRequest) -> PrefillReply:
        return PrefillReply(
            {"remote_request_id": f"hand-off {len(pipeline.prefiller.requests('prefill'))}"}, None, 3, "p"
        )

    async def renew(waiting: list[str]) -> list[set[str]]:
        return [{"hand-off 1"}]

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal calls
        calls += 1
        if calls == 1:  # as one that waits for a place in Serve's router
            await asyncio.Event().wait()
        yield Step(A, "length")

    pipeline = FakePipeline(prefill=prefill, steps=steps, renew=renew)

    def make(stages: Any) -> EPDClient:
        client = make_client(stages)
        assert client.pipeline._leases is not None
        client.pipeline._leases.after_s, client.pipeline._leases.every_s = 0.0, 0.01
        return client

    outputs, record = traced(make, pipeline)
    assert texts(outputs) == ["a"]
    assert record.rungs == ["decode-again"]
    taken = [shaping.hand_off_id(shaping.pulled_blocks(call.params)) for call in pipeline.decoder.requests("decode")]
    assert taken == ["hand-off 1", "hand-off 2"]


def test_decode_waits_no_longer_for_blocks_than_their_node_lives(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red")
    assert pipeline.decoder.sources == ["node-0"]


@pytest.mark.parametrize("attempts", [1, 3, 4])
def test_request_is_tried_so_many_times_and_then_fails_as_it_did(make_client: Make, attempts: int) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE] * 9})
    make = functools.partial(make_client, advanced={"retry": {"attempts": attempts, "backoff_s": 0}})
    with pytest.raises(GracefulHTTPError, match="The decode stage is gone") as caught:
        generate(make, pipeline, "red")
    assert caught.value.http_status == 503
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[i + 1] for i in range(attempts)]
    assert given_back(pipeline) == [[i + 1] for i in range(attempts)]


def test_requests_share_a_budget_of_retries(make_client: Make) -> None:
    async def main() -> list[int]:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9})
        client = make_client(
            pipeline.stages, advanced={"retry": {"attempts": 9, "ratio": 0.5, "floor_per_s": 0, "backoff_s": 0}}
        )
        prefills = []
        for _ in range(3):
            before = len(pipeline.prefiller.calls)
            with pytest.raises(GracefulHTTPError, match="is gone"):
                await run(client)
            prefills.append(len(pipeline.prefiller.calls) - before)
        return prefills

    assert asyncio.run(main()) == [2, 1, 2]  # one retry at first, and one more for two requests


def test_lost_choice_is_tried_again_by_itself(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE]})
    outputs, record = traced(make_client, pipeline, "red", n=2, seed=7)
    said = dict.fromkeys(range(2), "")
    for choice in (choice for output in outputs for choice in output.outputs):
        said[choice.index] += choice.text
    assert said == {0: "ab", 1: "ab"}
    assert outputs[-1].finished
    decodes = pipeline.decoder.requests("decode")
    assert sorted(blocks(call) for call in decodes) == [[1], [2], [3]]
    failed, *others = decodes
    assert given_back(pipeline) == [blocks(failed)]
    assert sorted(call.params.seed for call in others) == [7, 8]
    assert record.rungs == ["decode-again"]
