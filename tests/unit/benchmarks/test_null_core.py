"""benchmarks.null_core in vLLM's own ``AsyncLLM``: what broke when its engine core has another client."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient

from benchmarks.null_core import NullCore, replace_cores
from serve_app.demo import ensure_demo_model
from serve_app.stage import Stage

PROMPT = [5] * 40


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(name="demo-random")


Engine = Callable[..., Any]


@pytest.fixture
def engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An ``AsyncLLM`` around a null core, and the core."""
    monkeypatch.setattr(EngineCoreClient, "make_async_mp_client", EngineCoreClient.make_async_mp_client)

    @asynccontextmanager
    async def made(
        stage: Stage, step_s: float = 0.0, item_s: float = 0.0, **args: Any
    ) -> AsyncGenerator[tuple[AsyncLLM, NullCore]]:
        from vllm.engine.arg_utils import AsyncEngineArgs

        replace_cores(stage, step_s, item_s)
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), dtype="float32", max_model_len=512, **args))
        try:
            yield llm, llm.engine_core
        finally:
            llm.shutdown()

    return made


async def answer(llm: AsyncLLM, request_id: str, tokens: int, **extra: Any) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=tokens, output_kind=RequestOutputKind.DELTA, extra_args=extra or None)
    return [each async for each in llm.generate(tokens_input(PROMPT), params, request_id)]


def test_all_requests_get_a_token_each_step_and_steps_keep_their_pace(engine: Engine) -> None:
    async def main() -> None:
        async with engine(Stage.DECODE, step_s=0.02) as (llm, core):
            began = time.monotonic()
            answers = await asyncio.gather(*(answer(llm, str(number), 20) for number in range(8)))
            took = time.monotonic() - began
        for outputs in answers:
            assert "".join(each.outputs[0].text for each in outputs) == " a" * 20
            assert outputs[-1].outputs[0].finish_reason == "length"
            assert outputs[0].metrics.scheduled_ts >= outputs[0].metrics.queued_ts > 0
        assert core.tokens == 8 * 20
        assert 20 <= core.steps <= 22
        assert took >= 20 * 0.02

    asyncio.run(main())


def test_steps_that_were_due_while_the_process_was_busy_are_made_up_for(engine: Engine) -> None:
    async def main() -> float:
        async with engine(Stage.DECODE, step_s=0.02) as (llm, _):
            began = time.monotonic()
            task = asyncio.create_task(answer(llm, "r", 20))
            await asyncio.sleep(0.1)
            time.sleep(0.25)  # noqa: ASYNC251
            await task
            return time.monotonic() - began

    assert asyncio.run(main()) < 0.02 * 20 + 0.2


def test_a_full_engine_lets_requests_wait(engine: Engine) -> None:
    async def main() -> None:
        async with engine(Stage.DECODE, max_num_seqs=2) as (llm, core):
            await asyncio.gather(*(answer(llm, str(number), 10) for number in range(4)))
            assert 20 <= core.steps <= 22

    asyncio.run(main())


def test_an_encoder_takes_its_time_for_each_item_and_other_stages_take_none(engine: Engine) -> None:
    async def ended(stage: Stage) -> list[float]:
        """Seconds after which each of four requests was answered."""

        async def one(llm: AsyncLLM, number: int) -> float:
            await answer(llm, str(number), 1)
            return time.monotonic() - began

        async with engine(stage, item_s=0.1) as (llm, _):
            await answer(llm, "first", 1)
            began = time.monotonic()
            return sorted(await asyncio.gather(*(one(llm, number) for number in range(4))))

    encoded = asyncio.run(ended(Stage.ENCODER))
    assert all(0.1 * (place + 1) <= took < 0.1 * (place + 2) for place, took in enumerate(encoded))
    assert asyncio.run(ended(Stage.PREFILL))[-1] < 0.1


def test_an_aborted_request_gets_no_more_tokens(engine: Engine) -> None:
    async def main() -> None:
        async with engine(Stage.DECODE, step_s=0.01) as (llm, core):
            params = SamplingParams(max_tokens=400, output_kind=RequestOutputKind.DELTA)
            async with aclosing(llm.generate(tokens_input(PROMPT), params, "r")) as stream:
                await anext(stream)
            await answer(llm, "next", 5)
            assert core.tokens < 20
            assert not core._running

    asyncio.run(main())


def test_prefill_names_blocks_and_an_encoder_makes_no_token(engine: Engine) -> None:
    async def last(stage: Stage) -> tuple[RequestOutput, int]:
        async with engine(stage) as (llm, core):
            (output,) = await answer(llm, "r", 50, kv_transfer_params={"do_remote_decode": True})
            return output, core.tokens

    prefilled, tokens = asyncio.run(last(Stage.PREFILL))
    assert prefilled.finished and tokens == 1
    assert prefilled.kv_transfer_params["remote_block_ids"] == [[0, 1, 2]]
    encoded, tokens = asyncio.run(last(Stage.ENCODER))
    assert encoded.finished and tokens == 0


def test_what_a_replica_asks_its_engine_is_answered(engine: Engine) -> None:
    async def main() -> None:
        async with engine(Stage.DECODE) as (llm, core):
            await llm.check_health()
            assert not await llm.is_sleeping()
            assert await core.call_utility_all_async("collective_rpc", "overdue_kv_pulls", None, (1.0,), None) == [[()]]
            await llm.notify_kv_transfer_request_rejected("r", {})
            assert not core._running
        assert llm.errored

    asyncio.run(main())


def test_a_replica_checks_the_config_before_its_engine_is_made() -> None:
    """Where benchmarks/null_engine.py replaces the core."""
    import inspect

    from serve_app.stages import engine
    from serve_app.stages.replica import EngineReplica

    assert "self._check" in inspect.getsource(EngineReplica._start)
    source = inspect.getsource(engine.StageEngine.__init__)
    assert source.index("check(vllm_config)") < source.index("AsyncLLM.from_vllm_config")
