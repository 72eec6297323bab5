"""deployments: what the replicas of the stages have in common; no engine is started."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from vllm import PoolingParams, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsTensors

from deployments.decode import Decode
from deployments.encoder import Encoder
from deployments.prefill import Prefill
from serve_app.channel.wire import First, ReplyTo
from serve_app.config import EPDConfig
from serve_app.handoff.errors import CannotStart, ConfigError, EngineDead, HandoffLost, OtherVersion, StageUnavailable
from serve_app.handoff.types import ANY, READ_S, DecodeReply, Media, MediaRequest, Prompt, StageRequest, Version
from serve_app.handoff.waits import pulls
from serve_app.launch import fingerprint
from serve_app.launch.connectors import side_channel_env
from serve_app.launch.start_failure import EngineFailed
from serve_app.stage import Stage
from serve_app.stages import engine, fit
from serve_app.stages import replica as replicas
from serve_app.stages.replica import PORT_TRIES, EngineReplica, alone_on, started
from serve_app.stages.workload import HELP, Meter
from serve_app.transfer.kv_layout import KVLayout

pytestmark = pytest.mark.filterwarnings(r"ignore:coroutine '\w+.__del__' was never awaited")  # Serve awaits it

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


@pytest.mark.parametrize("name", CLASSES)
def test_replica_ends_with_its_engine_once_callers_have_the_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds what others would pull, and gives its files back all the same."""

    class DeadEngine(FakeEngine):
        async def check_health(self) -> None:
            raise EngineDead(Stage.DECODE, "failed: killed")

    events: list[str] = []
    monkeypatch.setattr(replicas, "LAST_WORDS_S", 0.01)
    monkeypatch.setattr(replicas, "end_process", lambda: events.append("end"))

    async def main() -> None:
        engine = DeadEngine(holds_blocks=True)
        dying = replica(
            name, engine, _lease_s=60.0, _answered_at=time.monotonic(), scratch=tempfile.mkdtemp(dir=tmp_path)
        )
        asyncio.get_running_loop().call_soon(lambda: events.append("others have their turn"))
        await dying.check_health()
        assert engine.ended

    asyncio.run(main())
    assert not list(tmp_path.iterdir())
    assert events == ["others have their turn", "end"]


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
from serve_app.stages import fit
from serve_app.stages.replica import ends_unless_done_in
with ends_unless_done_in(60, "decode does not start"):
    pass
with ends_unless_done_in(0.1, "decode does not start"):
    threading.Event().wait()
"""


def test_replica_that_does_not_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, config: EPDConfig) -> None:
        self.scratch = tempfile.mkdtemp(dir=tmp_path)
        raise ConfigError("does not fit")

    monkeypatch.setattr(EngineReplica, "_start", fail)
    with pytest.raises(CannotStart, match="does not fit"):
        CLASSES["Prefill"](EPDConfig(accelerator="cpu"))
    assert not list(tmp_path.iterdir())


def test_replica_that_does_not_start_in_time_ends() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "decode does not start within 0.1 s (`timeouts.startup_s`)" in done.stderr


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


# ---- prefill


def prefilled(**more: Any) -> Any:
    """The last output of an engine."""
    output: dict[str, Any] = {"num_cached_tokens": 60, "kv_transfer_params": {"a": 1}, "metrics": None}
    return SimpleNamespace(**output | {"ec_transfer_params": {READ_S: 0.5}} | more)


class PrefillEngine(FakeEngine):
    """It puts out one token, with logprobs of the prompt where these are asked for, and ends as it is told."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.heard: Any = None

    async def run(self, request: StageRequest, hear: Any = None) -> Any:
        self.heard = hear
        if hear is not None:
            for part in LOGPROBS, None:
                hear(EngineCoreOutput(request.request_id, [1], new_prompt_logprobs_tensors=part))
        return self.output


LOGPROBS = LogprobsTensors(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2))


def test_prefill_takes_cache_hits_off_its_work() -> None:
    prefill: Any = replica("Prefill", PrefillEngine(prefilled()))
    reply = asyncio.run(prefill.prefill(StageRequest("r", Prompt([0] * 100), SamplingParams())))
    assert prefill.work.stats()["done"] == 40
    assert (reply.kv_transfer_params, reply.ec_s, reply.node, reply.num_cached_tokens) == ({"a": 1}, 0.5, "n", 60)


@pytest.mark.parametrize("asked", [0, None])
def test_prefill_answers_with_the_logprobs_of_its_prompt_where_they_are_asked_for(asked: int | None) -> None:
    engine = PrefillEngine(prefilled())
    prefill: Any = replica("Prefill", engine)
    params = SamplingParams(prompt_logprobs=asked)
    reply = asyncio.run(prefill.prefill(StageRequest("r", Prompt([0, 1, 2]), params)))
    assert reply.prompt_logprobs is (None if asked is None else LOGPROBS)
    assert (engine.heard is None) == (asked is None), "else nobody listens"


def test_prefill_without_blocks_to_hand_over_has_failed() -> None:
    prefill: Any = replica("Prefill", PrefillEngine(prefilled(kv_transfer_params=None)))
    with pytest.raises(HandoffLost, match="ended without KV blocks to hand over"):
        asyncio.run(prefill.prefill(StageRequest("r", Prompt([0]), SamplingParams())))


# ---- decode


class FakeOutlets:
    """``put``: by which call, what, and how. ``open``: the calls under way."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.asked: list[ReplyTo] = []
        self.put: list[tuple[str, list[int], First | None, bool]] = []
        self.open: list[str] = []
        self.closed = 0

    async def to(self, reply_to: ReplyTo) -> Any:
        self.asked.append(reply_to)
        if self._error is not None:
            raise self._error
        return SimpleNamespace(call=self._call, put=self._put)

    async def close(self) -> None:
        self.closed += 1

    @contextmanager
    def _call(self, key: str) -> Iterator[None]:
        self.open.append(key)
        yield
        self.open.remove(key)

    def _put(self, key: str, output: EngineCoreOutput, first: First | None = None, last: bool = False) -> None:
        assert key in self.open
        self.put.append((key, output.new_token_ids, first, last))


class DecodeEngine(FakeEngine):
    """Its outputs come as a test has them."""

    def __init__(self, *outputs: EngineCoreOutput, ends: str | None = "length") -> None:
        super().__init__()
        self.outputs, self.ends = outputs, ends
        self.ran = 0

    async def run(self, request: StageRequest, hear: Any = None) -> Any:
        self.ran += 1
        for output in self.outputs:
            hear(output)
            await asyncio.sleep(0)
        return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=self.ends)])


REPLY_TO = ReplyTo("host", 1, "secret")
QUEUED = [EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0), EngineCoreEvent(EngineCoreEventType.SCHEDULED, 1.25)]


def output(*tokens: int, **more: Any) -> EngineCoreOutput:
    return EngineCoreOutput("r", list(tokens), **more)


def decoded(engine: FakeEngine, extra: Any = None, **attributes: Any) -> tuple[DecodeReply, FakeOutlets]:
    outlets: FakeOutlets = attributes.setdefault("outlets", FakeOutlets())
    decode: Any = replica("Decode", engine, **attributes)
    request = StageRequest("r", Prompt([1]), SamplingParams(extra_args=extra), version=attributes.get("version", ANY))
    return asyncio.run(decode.decode(request, REPLY_TO)), outlets


def test_decode_puts_what_its_engine_makes_and_answers_at_the_end() -> None:
    ending = output(65, finish_reason=FinishReason.LENGTH)
    reply, outlets = decoded(DecodeEngine(output(64), output(), output(65, 66), ending))
    assert outlets.asked == [REPLY_TO]
    assert [(key, tokens, last) for key, tokens, _, last in outlets.put] == [
        ("r", [64], False),
        ("r", [], False),
        ("r", [65, 66], False),
        ("r", [65], True),
    ]
    assert reply == DecodeReply("r", 4)
    assert not outlets.open


def test_first_output_tells_even_where_it_has_no_tokens() -> None:
    _, outlets = decoded(DecodeEngine(output(), output(64)))
    assert [first is not None for _, _, first, _ in outlets.put] == [True, False]


@pytest.mark.parametrize(
    ("params", "work"), [(SamplingParams(), 1), (PoolingParams(task="embed"), 3 - 2)], ids=["generates", "pools"]
)
def test_work_of_decode_is_a_sequence_and_of_what_pools_the_tokens_of_a_prompt_that_were_not_cached(
    params: Any, work: int
) -> None:
    engine = DecodeEngine(output(prefill_stats=PrefillStats(3, 1, 2, 2, 0), finish_reason=FinishReason.STOP))
    decode: Any = replica("Decode", engine, outlets=FakeOutlets())
    asyncio.run(decode.decode(StageRequest("r", Prompt([1, 2, 3]), params), REPLY_TO))
    assert decode.work.stats()["done"] == work


def test_decode_that_is_aborted_answers_with_what_it_had_sent() -> None:
    reply, outlets = decoded(DecodeEngine(output(64), output(65), ends="abort"))
    assert reply.tokens == 2
    assert not any(last for *_, last in outlets.put)


def test_decode_whose_ingress_does_not_listen_asks_its_engine_for_nothing() -> None:
    engine = DecodeEngine(output(64))
    error = StageUnavailable("decode", "cannot reach the ingress that asked")  # type: ignore[arg-type]
    with pytest.raises(StageUnavailable, match="cannot reach"):
        decoded(engine, outlets=FakeOutlets(error))
    assert not engine.ran


@pytest.mark.parametrize(
    ("extra", "slots", "kv_s"),
    [({"kv_transfer_params": {}}, 1, 0.25), ({"kv_transfer_params": {}}, 0, None), (None, 1, None)],
)
def test_decode_tells_the_time_of_the_transfer_where_nothing_else_was_waited_for(
    extra: Any, slots: int, kv_s: float | None
) -> None:
    engine = DecodeEngine(output(1, events=QUEUED), output(2))
    engine.slots = slots
    _, outlets = decoded(engine, extra)
    first, second = (first for _, _, first, _ in outlets.put)
    assert first is not None and second is None
    assert (first.key, first.replica, first.kv_s) == ("r", "r", kv_s)


def test_time_in_the_engines_queue_is_none_of_the_replicas_own() -> None:
    began = time.perf_counter()
    _, waited = decoded(DecodeEngine(output(1, events=QUEUED)))
    _, not_waited = decoded(DecodeEngine(output(1)))
    took = time.perf_counter() - began
    for outlets, least_s in ((waited, -0.25), (not_waited, 0.0)):
        ((_, _, first, _),) = outlets.put
        assert first is not None
        assert least_s <= first.ran_s <= least_s + took


def test_blocks_that_have_come_are_not_looked_after_any_more() -> None:
    waits = pulls(nothing_overdue, 30.0)
    waiting: list[bool] = []

    class Engine(DecodeEngine):
        async def run(self, request: StageRequest, hear: Any = None) -> Any:
            waiting.append("p" in waits._waits)
            hear(output(64))
            waiting.append("p" in waits._waits)
            return await super().run(request, hear)

    decoded(Engine(output(65)), {"kv_transfer_params": {"remote_request_id": "p"}}, pulls=waits)
    assert waiting == [True, False]


def test_decode_that_goes_away_sends_what_was_put_before_its_engine_ends() -> None:
    class Closing(FakeOutlets):
        async def close(self) -> None:
            assert not engine.ended
            await super().close()

    engine, outlets = FakeEngine(), Closing()
    asyncio.run(leave(replica("Decode", engine, outlets=outlets)))
    assert outlets.closed == 1 and engine.ended


# ---- versions

MINE, OTHERS = Version("front", weights="w1"), Version("front", weights="w2")


def asked_of(name: str, version: Version) -> Any:
    """A call of each method of a stage that goes on from what another replica has made."""
    request = StageRequest("r", Prompt([1]), SamplingParams(), version=version)
    media = MediaRequest("r", Media("image", b"", None, 1, "d"), 1, version=version)
    made: Any = replica(name, FakeEngine(), version=MINE)
    match name:
        case "Encoder":
            return [made.encode(request), made.encode_media(media)]
        case "Prefill":
            return [made.prefill(request)]
    return [made.decode(request, REPLY_TO), made.release("release-1", {}, version)]


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


def test_replica_tells_its_version_with_the_first_tokens_the_end_and_to_those_who_look() -> None:
    reply, outlets = decoded(DecodeEngine(output(1), output(2)), version=MINE)
    assert [first.version for _, _, first, _ in outlets.put if first is not None] == [MINE]
    assert reply.version == MINE
    decode: Any = replica("Decode", FakeEngine(), version=MINE)
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
    made._check_unchanged()
    made._tell_layout()
    return made


@pytest.mark.parametrize(("name", "layout"), [("Encoder", ""), ("Prefill", "l" * 12), ("Decode", "l" * 12)])
def test_engines_that_hand_blocks_over_tell_how_they_lay_them_out(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    assert starting(name, monkeypatch, MINE, MINE).version == MINE._replace(layout=layout)


def test_replica_whose_files_are_replaced_while_it_loads_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotStart, match=r"the model's files \(weights\) were replaced while it loaded"):
        starting("Decode", monkeypatch, MINE, OTHERS)
