"""A client that leaves takes its work, its blocks and its answers along."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from serve_app.channel.wire import First, Frame
from serve_app.config import RetryConfig
from serve_app.handoff.types import PrefillReply, StageRequest
from serve_app.ingress.client import EPDClient
from serve_app.ingress.retry import Retries
from tests.fakes import A, B, FakeLink, FakePipeline, Step
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    given_back,
    texts,
)
from tests.unit.running import Make, background, params, render, run


@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_after_a_token_ends_the_streams_and_releases_nothing(make_client: Make, n: int) -> None:
    closed: list[str] = []

    async def main() -> FakePipeline:
        started = asyncio.Barrier(n)

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            try:
                await started.wait()
                yield Step(A)
                await asyncio.Event().wait()
            finally:
                closed.append("decode")

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(n=n), "req")) as stream:
            begun: set[int] = set()
            while len(begun) < n:
                begun |= {choice.index for choice in (await anext(stream)).outputs}
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert closed == ["decode"] * n
    assert pipeline.released() == []
    asked = [call.request_id for call in pipeline.decoder.requests("decode")]
    assert sorted(pipeline.decodes.links["decode-0"].aborted) == sorted(asked)


async def leave(client: EPDClient, moment: asyncio.Event) -> None:
    """Ask, and go away at ``moment``; returns when what that set off in the background is done."""
    request = asyncio.create_task(run(client, "red"))
    await moment.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await background(client)


@pytest.mark.parametrize("where", ["encode", "prefill", "decode"])
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

        async def hang_streaming(request: StageRequest) -> AsyncIterator[Step]:
            yield await hang(request)

        pipeline = FakePipeline(**{"steps": hang_streaming} if where == "decode" else {where: hang})
        client = make_client(pipeline.stages)
        await leave(client, reached)
        return pipeline

    pipeline = asyncio.run(main())
    assert ended == [where]
    assert given_back(pipeline) == ([[1]] if where == "decode" else [])


def test_prefill_that_ends_just_when_its_client_leaves_frees_its_blocks(make_client: Make) -> None:
    async def main() -> FakePipeline:
        reached, left = asyncio.Event(), asyncio.Event()

        async def prefill(request: StageRequest) -> PrefillReply:
            reached.set()
            await left.wait()
            return PrefillReply({"remote_block_ids": [1]}, None, 0, "prefill-0")

        pipeline = FakePipeline(prefill=prefill)
        client = make_client(pipeline.stages)
        request = asyncio.create_task(run(client, "red"))
        await reached.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        left.set()
        while client.pipeline.background:
            await background(client)
        return pipeline

    assert given_back(asyncio.run(main())) == [[1]]


def test_client_that_leaves_between_two_attempts_leaves_nothing_behind(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pausing = asyncio.Event()

        def jitter(low: float, high: float) -> float:
            pausing.set()
            return 60.0

        pipeline = FakePipeline(fails={"decode": [DECODE_GONE]})
        client = make_client(pipeline.stages)
        client.pipeline.retries = Retries(RetryConfig(), jitter)
        await leave(client, pausing)
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "decode", "release"]
    assert given_back(pipeline) == [[1]]


def test_tokens_that_come_after_their_client_left_are_dropped(make_client: Make) -> None:
    """And are not taken for those of another request with the same id."""

    async def main() -> None:
        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            keys.append(request.request_id)
            if len(keys) == 1:
                yield Step(A)
                await asyncio.Event().wait()
            client.pipeline.answers.received(link(), Frame([Step([1], "length").output(keys[0])]))
            yield Step(A)
            client.pipeline.answers.received(link(), Frame([Step([1], "length").output(keys[0])]))
            yield Step(B, "length")

        def link() -> Any:
            return pipeline.decodes.links["decode-0"]

        keys: list[str] = []
        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(), "req")) as stream:
            await anext(stream)
        assert link().aborted == keys
        outputs = [output async for output in client.generate(prompt, params(), "req")]
        assert "".join(texts(outputs)) == "ab"
        assert link().aborted == keys[:1]
        await background(client)

    asyncio.run(main())


def test_decode_that_begins_after_its_client_left_is_told_to_end(make_client: Make) -> None:
    async def main() -> None:
        reached = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            reached.set()
            await asyncio.Event().wait()
            yield Step(A)

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        await leave(client, reached)
        ((call,), link) = pipeline.decoder.requests("decode"), FakeLink("decode-0")
        begins = Frame([Step(A).output(call.request_id)], [First(call.request_id, "decode-0")])
        client.pipeline.answers.received(link, begins)  # type: ignore[arg-type]
        assert link.aborted == [call.request_id]

    asyncio.run(main())
