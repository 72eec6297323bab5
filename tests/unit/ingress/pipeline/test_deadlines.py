"""Deadlines are for the first token, of all attempts together."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, RequestOutputKind

from serve_app.channel.wire import First, Frame, ReplyTo
from serve_app.config import RetryConfig
from serve_app.handoff.types import DecodeReply, PrefillReply, StageRequest
from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import Request, current
from serve_app.ingress.retry import Retries
from serve_app.stage import Stage
from tests.fakes import A, B, FakeLink, FakePipeline, Step
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    PREFILL_GONE,
    PREFILL_LOST,
    WHOLE,
    BreaksOff,
    logprobs_of,
    once,
    texts,
    together,
    traced,
)
from tests.unit.running import Make, background, params, render, run


def test_deadline_is_for_all_attempts_together(make_client: Make) -> None:
    async def main() -> tuple[float, int]:
        async def prefill(request: StageRequest) -> PrefillReply:
            await asyncio.sleep(0.1)
            raise PREFILL_LOST

        pipeline = FakePipeline(prefill=prefill)
        retry = {"attempts": 100, "floor_per_s": 1000, "backoff_s": 0}
        client = make_client(pipeline.stages, timeouts={"request_s": 0.5}, advanced={"retry": retry})
        loop = asyncio.get_running_loop()
        prompt = await render(client)
        began = loop.time()
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.5 s") as caught:
            async for _ in client.generate(prompt, params(), "req"):
                pass
        assert caught.value.http_status == 504
        return loop.time() - began, len(pipeline.prefiller.calls)

    seconds, prefills = asyncio.run(main())
    assert 0.5 <= seconds < 5
    assert prefills >= 2


def test_pause_before_a_retry_ends_with_the_deadline(make_client: Make) -> None:
    async def main() -> None:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE]})
        client = make_client(pipeline.stages, timeouts={"request_s": 0.1})
        client.pipeline.retries = Retries(RetryConfig(), lambda low, high: 60.0)
        with pytest.raises(GracefulHTTPError, match=r"The prefill stage did not answer within 0\.1 s"):
            await run(client)
        assert pipeline.log == ["prefill"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("of_the_client", "of_the_server", "seconds"), [(0.1, 600, "0.1"), (600, 0.1, "0.1"), (None, 0.1, "0.1")]
)
def test_shorter_deadline_of_client_and_server_holds(
    make_client: Make, of_the_client: float | None, of_the_server: float, seconds: str
) -> None:
    async def hang(request: StageRequest) -> PrefillReply:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        current.set(Request("req", timeout_s=of_the_client))
        client = make_client(FakePipeline(prefill=hang).stages, timeouts={"request_s": of_the_server})
        with pytest.raises(GracefulHTTPError, match=f"did not answer within {seconds} s"):
            await run(client)

    asyncio.run(main())


def test_deadline_of_the_client_counts_from_the_beginning_of_its_request(make_client: Make) -> None:
    async def hang(request: StageRequest) -> PrefillReply:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> float:
        loop = asyncio.get_running_loop()
        client = make_client(FakePipeline(prefill=hang).stages)
        prompt = await render(client)
        current.set(Request("req", began=time.perf_counter() - 2, timeout_s=2.1))
        began = loop.time()
        with pytest.raises(GracefulHTTPError, match="did not answer within"):
            async for _ in client.generate(prompt, params(), "req"):
                pass
        return loop.time() - began

    assert asyncio.run(main()) < 1.9


class Beams(BeamSearchOnlineMixin):
    """vLLM's beam search in front of a client."""

    def __init__(self, client: EPDClient) -> None:
        self.engine_client, self.renderer = client, client.renderer

    async def search(self, *colours: str, steps: int) -> RequestOutput:
        prompt = await render(self.engine_client, *colours)  # type: ignore[arg-type]
        (output,) = [each async for each in self.beam_search(prompt, "req", BeamSearchParams(2, steps))]
        return output


async def two_ways(request: StageRequest) -> AsyncIterator[Step]:
    yield Step([5], "length", more={"new_logprobs": logprobs_of(5)})


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["E+P+D", "E+PD"])
def test_each_step_of_a_beam_search_has_a_deadline_of_its_own(make_client: Make, without: tuple[Stage, ...]) -> None:
    async def main() -> None:
        current.set(asked := Request("req"))

        async def slow(request: StageRequest) -> AsyncIterator[Step]:
            asked.began -= 200  # so many seconds pass
            async for each in two_ways(request):
                yield each

        pipeline = FakePipeline(without, steps=slow)
        output = await Beams(make_client(pipeline.stages, timeouts={"request_s": 300})).search("red", steps=5)
        assert [len(beam.token_ids) for beam in output.outputs] == [5, 5]
        assert len(pipeline.decoder.requests("decode")) == 1 + 4 * 2

    asyncio.run(main())


def test_step_of_a_beam_search_that_makes_no_progress_is_a_504(make_client: Make) -> None:
    async def main() -> None:
        current.set(Request("req"))
        steps = 0

        async def hangs(request: StageRequest) -> AsyncIterator[Step]:
            nonlocal steps
            steps += 1
            if steps > 3:
                await asyncio.Event().wait()
            async for each in two_ways(request):
                yield each

        stages = FakePipeline(steps=hangs).stages
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.3 s") as caught:
            await Beams(make_client(stages, timeouts={"request_s": 0.3})).search(steps=5)
        assert caught.value.http_status == 504

    asyncio.run(main())


@pytest.mark.parametrize("slow", ["encode", "prefill", "decode"])
def test_stage_that_does_not_answer_in_time_is_a_504(make_client: Make, slow: str) -> None:
    cancelled: list[str] = []

    async def hang(request: StageRequest) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(slow)

    async def hang_streaming(request: StageRequest) -> AsyncIterator[Step]:
        yield await hang(request)

    async def main() -> FakePipeline:
        pipeline = FakePipeline(**{"steps": hang_streaming} if slow == "decode" else {slow: hang})
        client = make_client(pipeline.stages, timeouts={"request_s": 0.2})
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.2 s") as caught:
            await run(client, "red")
        assert caught.value.http_status == 504
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert cancelled == [slow]
    assert pipeline.log[-1] == ("release" if slow == "decode" else slow)


def test_answer_that_is_whole_in_the_moment_of_its_deadline_is_one(make_client: Make) -> None:
    def be_busy(until: float) -> None:
        """The event loop then gets to all that is due, in its order."""
        while asyncio.get_running_loop().time() < until:
            pass

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, now = pipeline.decodes.answers, request.request_id, asyncio.get_running_loop().time()
        assert answers is not None
        frame = Frame([Step(A, "length").output(key)], [First(key, "decode-0")])
        asyncio.get_running_loop().call_at(now + 1, answers.received, FakeLink("decode-0"), frame)
        be_busy(now + 1.1)
        return DecodeReply("decode-0", 1)

    async def main() -> None:
        client = make_client(pipeline.stages, timeouts={"request_s": 0.9})
        prompt = await render(client)
        current.set(request := Request("req"))
        outputs = [output async for output in client.generate(prompt, params(), "req")]
        assert (texts(outputs), request.trace.rungs, request.error) == (["a"], [], None)

    pipeline = FakePipeline(decode=decode)
    asyncio.run(main())


@pytest.mark.parametrize(("kind", "expected"), [("DELTA", ["a", "b"]), ("FINAL_ONLY", ["ab"])])
def test_deadline_is_only_for_the_first_token(make_client: Make, kind: str, expected: list[str]) -> None:
    """Not for an answer that is not streamed, which would have to be whole by then."""

    async def main() -> list[RequestOutput]:
        over = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            yield Step(A)
            await over.wait()
            yield Step(B, "length")

        client = make_client(FakePipeline(steps=steps).stages, timeouts={"request_s": 0.2})
        asyncio.get_running_loop().call_later(0.3, over.set)
        return await run(client, output_kind=RequestOutputKind[kind])

    assert texts(asyncio.run(main())) == expected


def test_answer_that_is_not_streamed_is_made_anew_where_it_cannot_go_on(make_client: Make) -> None:
    attempts = 0

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal attempts
        attempts += 1
        yield Step(A, more={"new_logprobs": logprobs_of(*A)})
        if attempts == 1:
            raise DECODE_GONE
        yield Step(B, "length", more={"new_logprobs": logprobs_of(*B)})

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, output_kind=WHOLE, seed=7, logprobs=1)
    answer = together(outputs)
    assert (answer.text, len(answer.logprobs), answer.cumulative_logprob) == ("ab", 2, -1.0)
    assert (record.rungs, record.output_tokens, record.cached_tokens) == (["decode-again"], 2, 3)
    first, second = pipeline.decoder.requests("decode")
    assert first.prompt == second.prompt


def test_answer_is_not_made_anew_after_its_deadline(make_client: Make) -> None:
    async def main() -> None:
        over = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            yield Step(A)
            await over.wait()
            raise DECODE_GONE

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages, timeouts={"request_s": 0.5})
        asyncio.get_running_loop().call_later(0.8, over.set)
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client, output_kind=WHOLE, seed=7)
        assert pipeline.log.count("decode") == 1

    asyncio.run(main())


def test_tokens_of_an_answer_that_nobody_got_are_not_counted(make_client: Make) -> None:
    async def main() -> None:
        current.set(request := Request("req"))
        decode = BreaksOff(said=2)
        client = decode.speak_as(once(make_client)(FakePipeline(steps=decode).stages))
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client, output_kind=WHOLE)
        assert request.trace.output_tokens == 0

    asyncio.run(main())
