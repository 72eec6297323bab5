"""serve_app.engine: outputs of an engine are put together while they wait."""

import asyncio
from collections.abc import AsyncGenerator

from vllm.outputs import CompletionOutput, RequestOutput

from serve_app.engine import coalesced, to_chunk
from serve_app.handoff import Chunk

WORDS = ["a", "b", "c", "d", "e"]


def output(number: int, finished: bool) -> RequestOutput:
    logprobs = [{number: float(-number)}]
    choice = CompletionOutput(
        0, WORDS[number], [number], -float(number), logprobs, finish_reason="length" * finished or None
    )  # type: ignore[arg-type]
    return RequestOutput("r", "prompt", [1, 2, 3], None, [choice], finished, num_cached_tokens=3)


async def outputs(*pauses_s: float) -> AsyncGenerator[RequestOutput]:
    for number, pause_s in enumerate(pauses_s):
        await asyncio.sleep(pause_s)
        yield output(number, finished=number + 1 == len(pauses_s))


def chunks(interval_s: float, *pauses_s: float) -> list[Chunk]:
    async def main() -> list[Chunk]:
        return [to_chunk(each) async for each in coalesced(outputs(*pauses_s), interval_s)]

    return asyncio.run(main())


def test_first_and_last_tokens_go_on_at_once_and_those_between_together() -> None:
    first, rest = chunks(60.0, 0, 0, 0, 0, 0)
    assert (first.text, first.token_ids, first.finish_reason) == ("a", [0], None)
    assert (rest.text, rest.token_ids, rest.finish_reason) == ("bcde", [1, 2, 3, 4], "length")
    assert rest.logprobs == [{n: -float(n)} for n in range(1, 5)]
    assert (rest.cumulative_logprob, rest.num_cached_tokens) == (-4.0, 3)


def test_a_token_after_the_interval_takes_along_what_was_held() -> None:
    assert [chunk.text for chunk in chunks(0.05, 0, 0, 0.1, 0, 0)] == ["a", "bc", "de"]


def test_without_an_interval_every_token_goes_by_itself() -> None:
    assert [chunk.text for chunk in chunks(0.0, 0, 0, 0, 0, 0)] == WORDS


def test_only_output_is_the_first_and_the_last() -> None:
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks(60.0, 0)] == [("a", "length")]


def test_closing_early_closes_the_engine_s_stream() -> None:
    closed = []

    async def endless() -> AsyncGenerator[RequestOutput]:
        try:
            while True:
                yield output(0, finished=False)
        finally:
            closed.append(True)

    async def main() -> None:
        stream = coalesced(endless(), 60.0)
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert closed == [True]
