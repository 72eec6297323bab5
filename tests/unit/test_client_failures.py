"""serve_app.client: stages that fail or hang, and clients that leave. Blocks nobody pulled are given back, once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput

from serve_app import trace
from serve_app.config import Stage
from serve_app.errors import BadRequest, ConfigError, HandoffLost, StageUnavailable
from serve_app.handoff import Chunk, EncodeReply, PrefillReply, StageRequest
from serve_app.trace import Trace
from tests.fakes import FakePipeline
from tests.unit.running import Make, background, generate, params, render, run


def test_failing_encoder_cancels_the_others_and_no_prefill_is_called(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    cancelled: list[str] = []

    async def encode(request: StageRequest) -> EncodeReply:
        await both.wait()
        if ":0:" in request.request_id:
            raise StageUnavailable(Stage.ENCODER, "is full")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.request_id.split(":")[1])
            raise
        raise AssertionError

    pipeline = FakePipeline(encode=encode)
    with pytest.raises(GracefulHTTPError, match="The encoder stage is full") as caught:
        generate(make_client, pipeline, "red", "blue")
    assert caught.value.http_status == 503
    assert cancelled == ["1"]
    assert pipeline.log == ["encode", "encode"]


def test_encoder_that_names_another_item_is_an_error(make_client: Make) -> None:
    async def encode(request: StageRequest) -> EncodeReply:
        return EncodeReply({"another": {"item_indices": [0]}}, "e")

    pipeline = FakePipeline(encode=encode)
    with pytest.raises(GracefulHTTPError, match="unusable answer: asked for item") as caught:
        generate(make_client, pipeline, "red")
    assert caught.value.http_status == 503
    assert pipeline.log == ["encode"]


def test_failing_prefill_leaves_nothing_to_release(make_client: Make) -> None:
    async def prefill(request: StageRequest) -> PrefillReply:
        raise HandoffLost(Stage.PREFILL, "lost it")

    pipeline = FakePipeline(prefill=prefill)
    with pytest.raises(GracefulHTTPError, match="The prefill stage lost it"):
        generate(make_client, pipeline, "red")
    assert pipeline.log == ["encode", "prefill"]


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
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise error
        yield

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(kind) as caught:
        generate(make_client, pipeline, "red")
    assert pipeline.released() == [("req", {"remote_block_ids": [1]})]
    assert status is None or caught.value.http_status == status  # type: ignore[attr-defined]


def test_decode_that_fails_after_its_first_token_has_pulled_the_blocks(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        yield Chunk("a", [1]), "decode-0"
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError, match="is gone"):
        generate(make_client, pipeline, "red")
    assert pipeline.released() == []


def test_stream_that_ends_without_a_reason_is_an_error(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        return
        yield

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError, match="without a finish reason"):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_failing_release_changes_nothing(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise BadRequest("no")
        yield

    async def release(request_id: str, kv: dict[str, Any]) -> None:
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(generate=decode, release=release)
    with pytest.raises(VLLMValidationError):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_release_runs_outside_the_context_of_the_request(make_client: Make) -> None:
    """Serve would cancel it with the request that it cleans up after."""
    seen: list[Trace | None] = []

    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise BadRequest("no")
        yield

    async def release(request_id: str, kv: dict[str, Any]) -> None:
        seen.append(trace.current.get())

    token = trace.current.set(Trace("req"))
    try:
        with pytest.raises(VLLMValidationError):
            generate(make_client, FakePipeline(generate=decode, release=release))
    finally:
        trace.current.reset(token)
    assert seen == [None]


def test_failing_choice_ends_the_others_and_gives_their_blocks_back(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    closed: list[int] = []

    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        (block,) = request.params.extra_args["kv_transfer_params"]["remote_block_ids"]
        try:
            await both.wait()
            if block == 1:
                raise StageUnavailable(Stage.DECODE, "is gone")
            await asyncio.Event().wait()
            yield
        finally:
            closed.append(block)

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError):
        generate(make_client, pipeline, n=2)
    assert sorted(closed) == [1, 2]
    assert sorted(args[1]["remote_block_ids"] for args in pipeline.released()) == [[1], [2]]


@pytest.mark.parametrize("slow", ["encode", "prefill", "generate"])
def test_stage_that_does_not_answer_in_time_is_a_504(make_client: Make, slow: str) -> None:
    cancelled: list[str] = []

    async def hang(request: StageRequest) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(slow)

    async def hang_streaming(request: StageRequest) -> AsyncIterator[Any]:
        yield await hang(request)

    async def main() -> FakePipeline:
        pipeline = FakePipeline(**{slow: hang_streaming if slow == "generate" else hang})
        client = make_client(pipeline.stages, request_timeout_s=0.2)
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.2 s") as caught:
            await run(client, "red")
        assert caught.value.http_status == 504
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert cancelled == [slow]
    assert pipeline.log[-1] == ("release" if slow == "generate" else slow)


def test_deadline_is_only_for_the_first_token(make_client: Make) -> None:
    async def main() -> list[RequestOutput]:
        over = asyncio.Event()

        async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            yield Chunk("a", [1]), "decode-0"
            await over.wait()
            yield Chunk("b", [2], finish_reason="stop"), "decode-0"

        client = make_client(FakePipeline(generate=decode).stages, request_timeout_s=0.2)
        asyncio.get_running_loop().call_later(0.3, over.set)
        return await run(client)

    assert [o.outputs[0].text for o in asyncio.run(main())] == ["a", "b"]


# ---- clients that leave


@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_after_a_token_ends_the_streams_and_releases_nothing(make_client: Make, n: int) -> None:
    closed: list[str] = []

    async def main() -> FakePipeline:
        started = asyncio.Barrier(n)

        async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            try:
                await started.wait()
                yield Chunk("a", [1]), "decode-0"
                await asyncio.Event().wait()
            finally:
                closed.append("decode")

        pipeline = FakePipeline(generate=decode)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(n=n), "req")) as stream:
            for _ in range(n):
                await anext(stream)
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert closed == ["decode"] * n
    assert pipeline.released() == []


@pytest.mark.parametrize("where", ["encode", "prefill", "generate"])
def test_client_that_leaves_before_a_token_ends_the_work_and_frees_the_blocks(make_client: Make, where: str) -> None:
    ended: list[str] = []

    async def main() -> FakePipeline:
        reached = asyncio.Event()

        async def hang(request: StageRequest) -> Any:
            reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(where)
                raise

        async def hang_streaming(request: StageRequest) -> AsyncIterator[Any]:
            yield await hang(request)

        pipeline = FakePipeline(**{where: hang_streaming if where == "generate" else hang})
        client = make_client(pipeline.stages)
        request = asyncio.create_task(run(client, "red"))
        await reached.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert ended == [where]
    assert pipeline.released() == ([("req", {"remote_block_ids": [1]})] if where == "generate" else [])
