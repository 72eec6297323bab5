"""serve_app.engine: outputs of an engine are put together while they wait, and an engine that hangs is found."""

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.config import Stage
from serve_app.engine import StageEngine, coalesced, to_chunk
from serve_app.errors import StageUnavailable
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


def test_what_is_held_goes_on_before_a_failure() -> None:
    async def failing() -> AsyncGenerator[RequestOutput]:
        for number in range(3):
            yield output(number, finished=False)
        raise StageUnavailable(Stage.DECODE, "failed")

    async def main() -> list[Chunk]:
        said = []
        with pytest.raises(StageUnavailable):
            async for each in coalesced(failing(), 60.0):
                said.append(to_chunk(each))
        return said

    assert [chunk.text for chunk in asyncio.run(main())] == ["a", "bc"]


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


# ---- health


class FakeLLM:
    """An ``AsyncLLM`` whose core answers when it is let."""

    def __init__(self) -> None:
        self.errored, self.dead_error = False, EngineDeadError()
        self.answers = asyncio.Event()
        self.asked = 0

    async def check_health(self) -> None: ...

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await self.answers.wait()
        return False


def stage_engine(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM, hang_timeout_s: float) -> StageEngine:
    monkeypatch.setattr("serve_app.engine.engine_config", lambda _: None)
    monkeypatch.setattr("serve_app.engine.AsyncLLM.from_vllm_config", lambda *_, **__: llm)
    return StageEngine(Stage.DECODE, {"model": "m"}, hang_timeout_s=hang_timeout_s)


@contextlib.contextmanager
def core() -> Any:
    """A child process, as the engine core is one of its replica."""
    process = multiprocessing.get_context("spawn").Process(target=signal.pause, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_engine_core_that_hangs_is_killed_and_its_replica_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = stage_engine(monkeypatch, llm, hang_timeout_s=0.05)
        with core() as process:
            await engine.check_health()
            await asyncio.sleep(0.1)
            with pytest.raises(StageUnavailable, match="hang_timeout_s"):
                await engine.check_health()
            process.join(30)
            assert process.exitcode == -9

    asyncio.run(main())


def test_engine_that_answers_between_its_steps_is_healthy_however_long_it_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = stage_engine(monkeypatch, llm, hang_timeout_s=0.2)
        with core() as process:
            for _ in range(4):
                await engine.check_health()  # at once, though the core is in a long step
                await engine.check_health()
                await asyncio.sleep(0.1)
                llm.answers.set()
                await asyncio.sleep(0.01)
                llm.answers.clear()
            assert llm.asked == 4, "one question at a time"
            assert process.is_alive()

    asyncio.run(main())


def test_dead_engine_is_unhealthy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        llm = FakeLLM()
        llm.errored = True
        with pytest.raises(EngineDeadError):
            await stage_engine(monkeypatch, llm, hang_timeout_s=60).check_health()

    asyncio.run(main())
