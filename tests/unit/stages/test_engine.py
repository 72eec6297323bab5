"""A request runs through vLLM's front end to its end, and an engine that hangs is found."""

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import PrefillStats

from serve_app.handoff.errors import BadRequest, EngineDead, EPDError, HandoffLost, StageUnavailable
from serve_app.handoff.types import Prompt, StageRequest
from serve_app.stage import Stage
from serve_app.stages.engine import StageEngine
from tests.unit.stages.llm import FakeLLM

Output = EngineCoreOutput
Made = Callable[..., StageEngine]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Made:
    """An engine around a ``FakeLLM``."""

    def made(llm: Any, stage: Stage = Stage.DECODE, hang_s: float = 60) -> StageEngine:
        monkeypatch.setattr("serve_app.stages.engine.engine_config", lambda _: None)
        monkeypatch.setattr("serve_app.stages.engine.AsyncLLM.from_vllm_config", lambda *_, **__: llm)
        monkeypatch.setattr("serve_app.stages.engine.freeze_gc_heap", lambda: None)
        return StageEngine(stage, {"model": "m"}, hang_s=hang_s)

    return made


def request(request_id: str = "r", options: dict[str, Any] | None = None, **params: Any) -> StageRequest:
    whole = {"max_tokens": 8, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    prompt = Prompt([1, 2, 3], cache_salt="salt")
    return StageRequest(request_id, prompt, SamplingParams(**whole | params), options or {})


def scenario(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(timed())


# ---- requests


def test_request_runs_to_its_end_and_its_last_output_tells_of_it(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM(log_stats=True)
        running = asyncio.create_task(make(llm).run(request()))
        come = await llm.come()
        assert (come.request_id, come.prompt_token_ids, come.cache_salt) == ("r", [1, 2, 3], "salt")
        queued = EngineCoreEvent(EngineCoreEventType.QUEUED, 10.0)
        scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, 12.5)
        prefilled = PrefillStats(3, num_cached_tokens=2)
        llm.core.step(Output("r", [64], events=[queued, scheduled], prefill_stats=prefilled))
        end: dict[str, Any] = {"kv_transfer_params": {"k": 1}, "ec_transfer_params": {"e": 2}}
        llm.core.step(Output("r", [65], finish_reason=FinishReason.LENGTH, **end))
        output = await running
        assert isinstance(output, RequestOutput) and output.finished
        assert (output.outputs[0].finish_reason, output.num_cached_tokens) == ("length", 2)
        assert (output.kv_transfer_params, output.ec_transfer_params) == ({"k": 1}, {"e": 2})
        assert not llm.output_processor.request_states and not llm.core.aborted

    scenario(main)


def test_what_the_core_makes_is_heard_step_by_step(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        heard: asyncio.Queue[Output] = asyncio.Queue()
        running = asyncio.create_task(make(llm).run(request(), heard.put_nowait))
        await llm.come()
        for token in (64, 65):
            llm.core.step(Output("r", [token]), Output("another", [99]))
            assert (await heard.get()).new_token_ids == [token]
        llm.core.step(Output("r", [66], finish_reason=FinishReason.STOP, stop_reason=66))
        await running
        last = heard.get_nowait()
        assert (last.new_token_ids, last.finish_reason, last.stop_reason) == ([66], FinishReason.STOP, 66)
        assert heard.empty()

    scenario(main)


def test_requests_run_side_by_side_and_each_hears_its_own(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        heard: dict[str, list[int]] = {"a": [], "b": []}
        running = [
            asyncio.create_task(
                engine.run(request(key), lambda output, key=key: heard[key].extend(output.new_token_ids))
            )
            for key in heard
        ]
        await llm.come(), await llm.come()
        llm.core.step(Output("b", [1]), Output("a", [2]))
        llm.core.step(*(Output(key, [3], finish_reason=FinishReason.LENGTH) for key in heard))
        await asyncio.gather(*running)
        assert heard == {"a": [2, 3], "b": [1, 3]}

    scenario(main)


@pytest.mark.parametrize("heard", [True, False])
def test_caller_that_leaves_aborts_its_request(make: Made, heard: bool) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        running = asyncio.create_task(engine.run(request(), (lambda _: None) if heard else None))
        await llm.come()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert llm.core.aborted == ["r"]
        assert not llm.output_processor.request_states and not engine.tap._hear

    scenario(main)


def test_request_that_is_aborted_by_its_id_ends_with_what_it_had(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine, first = make(llm), asyncio.Event()
        heard: list[int] = []

        def hear(output: Output) -> None:
            heard.extend(output.new_token_ids)
            first.set()

        running = asyncio.create_task(engine.run(request(), hear))
        await llm.come()
        llm.core.step(Output("r", [64]))
        await first.wait()
        await engine.abort(["r", "unknown"])
        assert (await running).outputs[0].finish_reason == "abort"
        assert (heard, llm.core.aborted) == ([64], ["r"])

    scenario(main)


def test_call_that_ray_serve_sends_twice_is_refused_and_the_first_goes_on(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        running = asyncio.create_task(engine.run(request()))
        await llm.come()
        with pytest.raises(StageUnavailable, match="sent it twice"):
            await engine.run(request())
        llm.core.step(Output("r", [64], finish_reason=FinishReason.LENGTH))
        assert (await running).finished
        assert llm.core.come.empty() and not llm.core.aborted

    scenario(main)


def test_engine_that_could_not_load_what_was_handed_over_says_so(make: Made) -> None:
    async def main() -> None:
        llm, heard = FakeLLM(), []
        running = asyncio.create_task(make(llm).run(request(), heard.append))
        await llm.come()
        llm.core.step(Output("r", [], finish_reason=FinishReason.ERROR))
        with pytest.raises(HandoffLost, match="could not load what the stage before handed over"):
            await running
        assert not heard

    scenario(main)


def test_engine_that_dies_under_a_request_says_so(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        running = asyncio.create_task(engine.run(request()))
        await llm.come()
        llm.core.die(EngineDeadError())
        with pytest.raises(EngineDead, match="The decode stage failed"):
            await running
        with pytest.raises(EngineDead, match="failed"):
            await engine.run(request("next"))
        assert llm.core.come.empty(), "a dead engine gets no request"

    scenario(main)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EngineDeadError(), EngineDead), (QueueOverflowError(), StageUnavailable), (OSError("broken"), StageUnavailable)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_request_that_the_core_does_not_take_is_an_error_of_ours(
    make: Made, error: Exception, kind: type[EPDError]
) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        llm.core.fails = error
        with pytest.raises(EPDError) as caught:
            await engine.run(request(), lambda _: None)
        assert type(caught.value) is kind and caught.value.__cause__ is error
        assert not engine.tap._hear
        if kind is StageUnavailable:
            assert not llm.output_processor.request_states

    scenario(main)


def test_full_engine_is_a_stage_that_cannot_serve_now(make: Made) -> None:
    """`max_num_queued_reqs`, of vLLM."""

    async def main() -> None:
        llm = FakeLLM()
        llm.scheduler_config.max_num_queued_reqs = 1
        engine = make(llm)
        running = asyncio.create_task(engine.run(request("first")))
        await llm.come()
        with pytest.raises(StageUnavailable):
            await engine.run(request("second"))
        assert not running.done()
        running.cancel()

    scenario(main)


@pytest.mark.parametrize(
    ("config", "params", "words"),
    [
        ({"speculative_config": object()}, {"min_p": 0.5}, "speculative decoding"),
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, {"prompt_logprobs": 1}, "fast_prefill"),
    ],
)
def test_what_this_engine_alone_cannot_do_is_the_clients_error(
    make: Made, config: dict[str, Any], params: dict[str, Any], words: str
) -> None:
    async def main() -> None:
        llm = FakeLLM(**config)
        with pytest.raises(BadRequest, match=words):
            await make(llm).run(request(**params))
        assert llm.core.come.empty()

    scenario(main)


# ---- LoRA adapters


def adapted(path: str = "/x") -> StageRequest:
    return request(options={"lora_request": LoRARequest("x", 1, path)})


def test_an_adapter_is_loaded_before_the_first_request_that_has_it(make: Made) -> None:
    async def main() -> None:
        llm = FakeLLM()
        engine = make(llm)
        for _ in range(2):
            running = asyncio.create_task(engine.run(adapted()))
            assert (await llm.come()).lora_request.lora_name == "x"
            assert llm.adapters == ["x"]
            llm.core.step(Output("r", [64], finish_reason=FinishReason.LENGTH))
            await running

    scenario(main)


def test_request_whose_adapter_cannot_be_loaded_does_not_reach_the_engine(make: Made) -> None:
    """It would die of it, and so would the next one that is asked."""

    async def main() -> None:
        llm = FakeLLM()
        with pytest.raises(StageUnavailable, match=r"cannot load the adapter `x` from /broken: no adapter_config"):
            await make(llm).run(adapted("/broken"))
        assert llm.core.come.empty()

    scenario(main)


# ---- health


class AskedLLM:
    """An ``AsyncLLM`` whose core answers when it is let."""

    def __init__(self) -> None:
        self.errored, self.dead_error = False, EngineDeadError()
        self.answers = asyncio.Event()
        self.asked = 0
        self.output_processor = OutputProcessor(None, log_stats=False)

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await self.answers.wait()
        return False


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


def test_engine_core_that_hangs_is_killed_and_its_replica_unhealthy(make: Made) -> None:
    async def main() -> None:
        llm = AskedLLM()
        engine = make(llm, hang_s=0.05)
        with core() as process:
            await engine.check_health()
            await asyncio.sleep(0.1)
            with pytest.raises(StageUnavailable, match="hang_s"):
                await engine.check_health()
            process.join(30)
            assert process.exitcode == -9

    asyncio.run(main())


def test_engine_that_answers_between_its_steps_is_healthy_however_long_it_is_watched(
    make: Made,
) -> None:
    async def main() -> None:
        llm = AskedLLM()
        engine = make(llm, hang_s=0.2)
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


def test_dead_engine_is_unhealthy_at_once(make: Made) -> None:
    async def main() -> None:
        llm = AskedLLM()
        llm.errored = True
        with pytest.raises(EngineDead):
            await make(llm, hang_s=60).check_health()

    asyncio.run(main())
