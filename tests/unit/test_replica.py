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
from deployments.decode import SAVE_S, Decode
from deployments.encoder import Encoder
from deployments.prefill import Prefill
from serve_app import engine, fingerprint, fit
from serve_app.config import EPDConfig
from serve_app.errors import CannotStart, ConfigError, OtherVersion
from serve_app.handoff import ANY, READ_S, Media, MediaRequest, Prompt, StageRequest, Version
from serve_app.kv_layout import KVLayout
from serve_app.kv_waits import pulls
from serve_app.start_failure import EngineFailed
from serve_app.transfer import side_channel_env
from serve_app.workload import HELP, Meter
from tests.fakes import FakeClock

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


async def nothing_overdue(after_s: float) -> list[str]:
    return []


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
        "pulls": pulls(nothing_overdue, 30.0),
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
    request: Any = SimpleNamespace(prompt=SimpleNamespace(token_ids=[0] * 100), version=ANY)
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
    request: Any = SimpleNamespace(params=SimpleNamespace(extra_args=extra), streamed=True, version=ANY)

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


def test_answer_that_is_not_streamed_is_saved_in_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made of it outlives its replica, but for the last ``SAVE_S``."""
    clock, per_token_s, length = FakeClock(), 1 / 64, 1000
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=clock))

    class Engine(FakeEngine):
        async def generate(self, request: Any) -> AsyncGenerator[RequestOutput]:
            for number in range(length):
                choice = CompletionOutput(0, "a", [number], None, None)
                yield RequestOutput("r", None, None, None, [choice], finished=number == length - 1)
                clock.now += per_token_s

    decode: Any = replica("Decode", Engine(), _interval_s=0.02)
    request = StageRequest("r", Prompt([1]), SamplingParams(), streamed=False)

    async def main() -> list[list[int]]:
        return [chunk.token_ids async for chunk, _ in decode.generate(request)]

    pieces = asyncio.run(main())
    assert [token for piece in pieces for token in piece] == list(range(length))
    assert len(pieces[0]) == 1
    assert max(map(len, pieces)) * per_token_s <= SAVE_S
    assert len(pieces) <= 2 + length * per_token_s / SAVE_S


# ---- versions

MINE, OTHERS = Version("front", weights="w1"), Version("front", weights="w2")


def asked_of(name: str, version: Version) -> Any:
    """A call of each method of a stage that goes on from what another replica has made."""
    request = StageRequest("r", Prompt([1]), SamplingParams(), version=version)
    media = MediaRequest("r", Media("image", b"", None, 1, "d"), 1, version=version)
    made: Any = replica(name, FakeEngine(), version=MINE, _interval_s=0.0)
    match name:
        case "Encoder":
            return [made.encode(request), made.encode_media(media)]
        case "Prefill":
            return [made.prefill(request)]
    return [anext(made.generate(request))]


@pytest.mark.parametrize("name", CLASSES)
def test_replica_refuses_at_once_what_began_with_another_version(name: str) -> None:
    async def refused(call: Any) -> OtherVersion:
        with pytest.raises(
            OtherVersion, match=r"runs in another version than the request began with \(weights\)"
        ) as caught:
            await call
        return caught.value

    for call in asked_of(name, OTHERS):
        error = asyncio.run(refused(call))
        assert (error.stage, error.replica, error.version) == (name.lower(), "r", MINE)


def test_replica_tells_its_version_with_the_first_chunk_and_to_those_who_look() -> None:
    class Engine(FakeEngine):
        async def generate(self, request: Any) -> AsyncGenerator[RequestOutput]:
            for number in range(2):
                choice = CompletionOutput(0, "a", [1], None, None, finish_reason="stop" if number else None)
                yield RequestOutput("r", None, None, None, [choice], finished=bool(number))

    decode: Any = replica("Decode", Engine(), version=MINE, _interval_s=0.0)

    async def main() -> list[Version]:
        request = StageRequest("r", Prompt([1]), SamplingParams(), version=MINE)
        return [chunk.version async for chunk, _ in decode.generate(request)]

    assert asyncio.run(main()) == [MINE, ANY]
    assert asyncio.run(decode.made_of()) == (MINE, None)
    assert asyncio.run(decode.load())["version"] == "front-w1"


def starting(name: str, monkeypatch: pytest.MonkeyPatch, before: Version, after: Version) -> EngineReplica:
    """A replica whose engine has loaded what was of one version before and is of another after."""
    versions = iter([before, after])
    monkeypatch.setattr(fingerprint, "version_of", lambda *_: next(versions))
    monkeypatch.setattr(fit, "check", lambda *_: None)
    engine: Any = FakeEngine()
    engine.vllm_config = SimpleNamespace(ec_transfer_config=None, kv_transfer_config=None)
    engine.kv_layout = KVLayout("l" * 64, "FLASH_ATTN", "H100")
    made = replica(name, engine, _config=EPDConfig())
    made._check(engine.vllm_config)
    made._stays_the_same()
    return made


@pytest.mark.parametrize(("name", "layout"), [("Encoder", ""), ("Prefill", "l" * 12), ("Decode", "l" * 12)])
def test_engines_that_hand_blocks_over_tell_how_they_lay_them_out(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    assert starting(name, monkeypatch, MINE, MINE).version == MINE._replace(layout=layout)


def test_replica_whose_files_are_replaced_while_it_loads_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotStart, match=r"the model's files \(weights\) were replaced while it loaded"):
        starting("Decode", monkeypatch, MINE, OTHERS)
