"""deployments: what the replicas of the stages have in common; no engine is started."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput

from deployments._replica import PORT_TRIES, EngineReplica, alone_on, started
from deployments.decode import Decode
from deployments.encoder import Encoder
from deployments.prefill import Prefill
from serve_app import engine
from serve_app.config import EPDConfig
from serve_app.errors import CannotStart, ConfigError
from serve_app.handoff import READ_S, Prompt, StageRequest
from serve_app.start_failure import EngineFailed
from serve_app.transfer import side_channel_env
from serve_app.workload import HELP, Meter

pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'EngineReplica.__del__' was never awaited")  # Serve awaits it

CLASSES: dict[str, type[EngineReplica]] = {
    deployment.name: deployment.func_or_class
    for deployment in (Encoder, Prefill, Decode)  # type: ignore[attr-defined]
}


class FakeEngine:
    def __init__(self, holds_blocks: bool = False) -> None:
        self.holds_blocks = holds_blocks
        self.ended = False
        self.kv_use, self.slots = 0.25, 8

    def shutdown(self) -> None:
        self.ended = True

    def metrics(self) -> str:
        return "# HELP vllm:x x\n# TYPE vllm:x gauge\nvllm:x 1\n"


def replica(name: str, engine: FakeEngine, **attributes: Any) -> EngineReplica:
    made = object.__new__(CLASSES[name])
    state = {
        "engine": engine,
        "work": Meter(),
        "_gpus": 0.5,
        "replica": "r",
        "node": "n",
        "_lease_s": 0.0,
        "_answered_at": 0.0,
    }
    made.__dict__.update(state | attributes)
    return made


async def leave(leaving: EngineReplica) -> None:
    await type(leaving).__del__(leaving)


def test_prefill_that_goes_away_waits_until_its_blocks_are_pulled() -> None:
    async def main() -> None:
        engine = FakeEngine(holds_blocks=True)
        going = asyncio.ensure_future(leave(replica("Prefill", engine)))
        done, _ = await asyncio.wait([going], timeout=0.3)
        assert not done and not engine.ended
        engine.holds_blocks = False
        await asyncio.wait_for(going, 5)
        assert engine.ended

    asyncio.run(main())


def test_encoder_waits_for_what_others_pull_from_it_and_not_for_files() -> None:
    async def main() -> None:
        for lease_s, waits in [(0.3, True), (0.0, False)]:
            engine, began = FakeEngine(), time.monotonic()
            await leave(replica("Encoder", engine, _lease_s=lease_s, _answered_at=began))
            assert engine.ended
            assert (time.monotonic() - began >= lease_s) if waits else (time.monotonic() - began < 0.2)

    asyncio.run(main())


def test_replica_whose_engine_never_started_goes_at_once() -> None:
    asyncio.run(leave(object.__new__(CLASSES["Decode"])))


@pytest.mark.parametrize(
    ("failures", "tries"),
    [([], 1), (["Address already in use"], 2), (["Address already in use"] * 9, PORT_TRIES), (["No memory"] * 9, 1)],
)
def test_engine_starts_again_with_other_ports_where_its_were_taken(
    monkeypatch: pytest.MonkeyPatch, failures: list[str], tries: int
) -> None:
    ports: list[str] = []

    class Engine:
        def __init__(self, stage: str) -> None:
            ports.append(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"])
            if len(ports) <= len(failures):
                raise EngineFailed([f"OSError: {failures[len(ports) - 1]}"])

    monkeypatch.setattr(engine, "StageEngine", Engine)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for name in side_channel_env("127.0.0.1"):
        monkeypatch.setenv(name, "")
    if len(failures) < tries:
        assert isinstance(started("decode"), Engine)
    else:
        with pytest.raises(EngineFailed):
            started("decode")
    assert len(set(ports)) == len(ports) == tries


def test_replica_that_does_not_start_raises_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: EngineReplica, config: EPDConfig) -> None:
        raise ConfigError("`x` is wrong: use `y`")

    monkeypatch.setattr(EngineReplica, "_start", start)
    with pytest.raises(CannotStart, match="encoder cannot start: `x` is wrong: use `y`"):
        CLASSES["Encoder"](EPDConfig())


STARTS = """
import threading
from deployments._replica import ends_unless_done_in
with ends_unless_done_in(60, "decode does not start"):
    pass
with ends_unless_done_in(0.1, "decode does not start"):
    threading.Event().wait()
"""


def test_replica_that_does_not_start_in_time_ends() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "decode does not start within 0.1 s (`startup_timeout_s`)" in done.stderr


def test_engines_that_share_a_card_start_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    waiting, done = threading.Event(), threading.Event()

    def start() -> None:
        waiting.set()
        with alone_on([1]):
            done.set()

    with alone_on([1, 0]), alone_on(["2"]):
        other = threading.Thread(target=start)
        other.start()
        assert waiting.wait(10)
        assert not done.wait(0.2)
    other.join(10)
    assert done.is_set()


@pytest.mark.parametrize("name", CLASSES)
def test_every_stage_reports_what_the_policies_read(name: str) -> None:
    stats = asyncio.run(replica(name, FakeEngine()).record_autoscaling_stats())
    assert set(stats) == set(HELP)
    assert (stats["kv_use"], stats["slots"], stats["gpus"]) == (0.25, 8, 0.5)
    assert all(isinstance(value, float) for value in stats.values())


def test_the_reports_are_on_the_metrics_page() -> None:
    stage, name, page = asyncio.run(replica("Decode", FakeEngine()).metrics())
    assert (stage, name) == ("decode", "r")
    assert "vllm:x 1" in page and "epd:work_slots 8.0" in page


def test_prefill_takes_cache_hits_off_its_work() -> None:
    output = SimpleNamespace(
        num_cached_tokens=60,
        kv_transfer_params={"a": 1},
        ec_transfer_params={READ_S: 0.5},
        prompt_logprobs=None,
        metrics=None,
    )

    class Engine(FakeEngine):
        async def final(self, request: Any) -> Any:
            return output

    prefill: Any = replica("Prefill", Engine())
    request: Any = SimpleNamespace(prompt=SimpleNamespace(token_ids=[0] * 100))
    reply = asyncio.run(prefill.prefill(request))
    assert prefill.work.stats()["done"] == 40
    assert (reply.ec_s, reply.node) == (0.5, "n")


@pytest.mark.parametrize(
    ("extra", "slots", "kv_s"),
    [({"kv_transfer_params": {}}, 1, 0.25), ({"kv_transfer_params": {}}, 0, None), (None, 1, None)],
)
def test_decode_tells_the_time_of_the_transfer_where_nothing_else_was_waited_for(
    extra: Any, slots: int, kv_s: float | None
) -> None:
    choice = SimpleNamespace(
        text="a", token_ids=[1], logprobs=None, cumulative_logprob=None, finish_reason=None, stop_reason=None
    )
    stats = SimpleNamespace(queued_ts=1.0, scheduled_ts=1.25)
    output = SimpleNamespace(outputs=[choice], num_cached_tokens=0, prompt_logprobs=None, metrics=stats, finished=False)

    class Engine(FakeEngine):
        async def generate(self, request: Any) -> AsyncGenerator[Any]:
            yield output
            yield output

    engine = Engine()
    engine.slots = slots
    decode: Any = replica("Decode", engine, _interval_s=0.0)
    request: Any = SimpleNamespace(params=SimpleNamespace(extra_args=extra), streamed=True)

    async def main() -> list[Any]:
        return [chunk async for chunk, _ in decode.generate(request)]

    assert [chunk.kv_s for chunk in asyncio.run(main())] == [kv_s, None]


@pytest.mark.parametrize(("streamed", "chunks"), [(True, [[1], [1], [1]]), (False, [[1], [1, 1]])])
def test_decode_gives_the_first_token_at_once_and_the_rest_as_the_client_wants_it(
    streamed: bool, chunks: list[list[int]]
) -> None:
    def output(number: int) -> RequestOutput:
        choice = CompletionOutput(0, "a", [1], None, None, finish_reason="stop" if number == 2 else None)
        return RequestOutput("r", None, None, None, [choice], finished=number == 2)

    class Engine(FakeEngine):
        async def generate(self, request: Any) -> AsyncGenerator[RequestOutput]:
            for number in range(3):
                yield output(number)

    decode: Any = replica("Decode", Engine(), _interval_s=0.0)
    request = StageRequest("r", Prompt([1]), SamplingParams(), streamed=streamed)

    async def main() -> list[list[int]]:
        return [chunk.token_ids async for chunk, _ in decode.generate(request)]

    assert asyncio.run(main()) == chunks
