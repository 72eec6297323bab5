"""A stage fails: what goes on without it, what is given back, and what the client hears."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.handoff.errors import BadRequest, ConfigError, StageTimeout, StageUnavailable
from serve_app.handoff.types import EncodeReply, StageRequest
from serve_app.ingress.request import Request, current
from serve_app.observe.trace import Trace
from serve_app.stage import Stage
from tests.fakes import A, FakePipeline, Step, encoded
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    PREFILL_GONE,
    PREFILL_LOST,
    given_back,
    once,
    pixels,
    texts,
    traced,
)
from tests.unit.running import Make, generate


def test_item_that_no_encoder_encodes_goes_to_prefill_with_its_pixels_and_the_others_without(make_client: Make) -> None:
    async def encode(request: StageRequest) -> EncodeReply:
        if ":0:" in request.request_id:
            raise StageUnavailable(Stage.ENCODER, "is full")
        return encoded(request)

    pipeline = FakePipeline(encode=encode)
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "encode", "prefill", "decode"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("decode"):
        assert pixels(call) == [True, False]
        assert list(call.params.extra_args["ec_transfer_params"]) == [call.prompt.items[1].hash]
    assert record.rungs == ["encode-again", "encode-at-prefill(failed)"]


def test_item_that_an_encoder_refuses_cancels_the_others_and_no_prefill_is_called(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    cancelled: list[str] = []

    async def encode(request: StageRequest) -> EncodeReply:
        await both.wait()
        if ":0:" in request.request_id:
            raise BadRequest("this picture cannot be encoded")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.request_id.split(":")[1])
            raise
        raise AssertionError

    pipeline = FakePipeline(encode=encode)
    with pytest.raises(VLLMValidationError, match="this picture cannot be encoded"):
        generate(make_client, pipeline, "red", "blue")
    assert cancelled == ["1"]
    assert pipeline.log == ["encode", "encode"]


def test_encoder_that_names_another_item_is_not_believed(make_client: Make) -> None:
    async def encode(request: StageRequest) -> EncodeReply:
        return EncodeReply({"another": {"item_indices": [0]}}, "e")

    pipeline = FakePipeline(encode=encode)
    generate(make_client, pipeline, "red")
    assert pipeline.log == ["encode", "encode", "prefill", "decode"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("decode"):
        assert pixels(call) == [True]
        assert "ec_transfer_params" not in call.params.extra_args


@pytest.mark.parametrize(
    ("error", "kind", "log"),
    [
        (PREFILL_LOST, GracefulHTTPError, ["encode", "prefill", "encode", "prefill", "prefill"]),
        (StageTimeout(Stage.PREFILL, "did not answer"), GracefulHTTPError, ["encode", "prefill"]),
        (BadRequest("no such thing"), VLLMValidationError, ["encode", "prefill"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failing_prefill_leaves_nothing_to_release(
    make_client: Make, error: Exception, kind: type[Exception], log: list[str]
) -> None:
    pipeline = FakePipeline(fails={"prefill": [error] * 9})
    with pytest.raises(kind) as caught:
        generate(make_client, pipeline, "red")
    assert str(caught.value) == str(error)
    assert pipeline.log == log


def test_prefill_and_decode_that_are_both_gone_are_an_error(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9, "decode": [DECODE_GONE] * 9})
    with pytest.raises(GracefulHTTPError) as caught:
        generate(make_client, pipeline, "red")
    assert str(caught.value) == str(DECODE_GONE)
    assert pipeline.log == ["encode", "prefill", "prefill", "decode"]


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (StageUnavailable(Stage.DECODE, "is gone"), GracefulHTTPError, 503),
        (BadRequest("no such thing"), VLLMValidationError, None),
        (ConfigError("broken"), GracefulHTTPError, 500),
        (KeyError("ours"), KeyError, None),
    ],
)
def test_decode_that_fails_before_its_first_token_gives_the_blocks_back_once(
    make_client: Make, error: Exception, kind: type[Exception], status: int | None
) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise error
        yield Step(A)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(kind) as caught:
        generate(once(make_client), pipeline, "red")
    assert given_back(pipeline) == [[1]]
    assert status is None or caught.value.http_status == status  # type: ignore[attr-defined]


def test_decode_that_fails_after_its_first_token_has_pulled_the_blocks(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A)
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError, match="is gone"):
        generate(once(make_client), pipeline, "red")
    assert pipeline.released() == []
    assert pipeline.log == ["encode", "prefill", "decode"]


def test_call_that_ends_without_tokens_is_an_error(make_client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        return
        yield Step(A)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError, match="sent 0 tokens of an answer, and not all of them came"):
        generate(once(make_client), pipeline)
    assert given_back(pipeline) == [[1]]


def test_failing_release_changes_nothing(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise BadRequest("no")
        yield Step(A)

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(steps=steps, release=release)
    with pytest.raises(VLLMValidationError):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_release_runs_outside_the_context_of_the_request(make_client: Make) -> None:
    """Serve would cancel it with the request that it cleans up after."""
    seen: list[Trace | None] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise BadRequest("no")
        yield Step(A)

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        seen.append(current.get())

    token = current.set(Request("req"))
    try:
        with pytest.raises(VLLMValidationError):
            generate(make_client, FakePipeline(steps=steps, release=release))
    finally:
        current.reset(token)
    assert seen == [None]


def test_failing_choice_ends_the_others_and_gives_their_blocks_back(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    closed: list[int] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        (block,) = request.params.extra_args["kv_transfer_params"]["remote_block_ids"]
        try:
            await both.wait()
            if block == 1:
                raise StageUnavailable(Stage.DECODE, "is gone")
            await asyncio.Event().wait()
            yield Step(A)
        finally:
            closed.append(block)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError):
        generate(once(make_client), pipeline, n=2)
    assert sorted(closed) == [1, 2]
    assert sorted(given_back(pipeline)) == [[1], [2]]
