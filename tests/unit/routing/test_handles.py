"""Calls over a handle are cancelled with their caller and fail only with errors of ours."""

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from vllm import SamplingParams

from serve_app.handoff.errors import BadRequest, EngineDead, EPDError, HandoffLost, OtherVersion, StageUnavailable
from serve_app.handoff.types import Item, Media, MediaRequest, PrefillReply, Prompt, StageRequest, Version
from serve_app.routing import handles
from serve_app.routing.affinity import Affinity
from serve_app.routing.handles import Call, KnownReplicas, StageHandle, to_stage_error
from serve_app.routing.prefix import Prefix
from serve_app.stage import Stage
from tests.fakes import FakeBroadcast, FakeHandle, FakeResponse

LOST = "lost the replica that worked on the request"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BackPressureError(5, 5), "is full"),
        (DeploymentUnavailableError(DeploymentID("Decode")), "could not be deployed"),
        (TaskCancelledError(), "cancelled the request"),
        (RequestCancelledError("r"), "cancelled the request"),
        (RayActorError(), LOST),
        (ActorDiedError(), LOST),
        (ActorUnavailableError("gone", None), LOST),
        (ReplicaUnavailableError("r"), "did not answer: ReplicaUnavailableError"),
        (WorkerCrashedError(), "did not answer: WorkerCrashedError"),
        (GetTimeoutError(), "did not answer: GetTimeoutError"),
        (OutOfMemoryError("x"), "did not answer: OutOfMemoryError"),
        (RaySystemError("x"), "did not answer: RaySystemError"),
        (ObjectLostError("00" * 28, None, ""), "did not answer: ObjectLostError"),
        (TimeoutError(), "did not answer: TimeoutError"),
        (KeyError("x"), "failed: KeyError: 'x'"),
        (RayTaskError("f", "traceback", ValueError("broken")), "failed: ValueError: broken"),
        (RayTaskError("f", "traceback", ValueError("broken")).as_instanceof_cause(), "failed: ValueError: broken"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_ray_raises_is_a_stage_that_cannot_serve_now(error: Exception, words: str) -> None:
    mapped = to_stage_error(Stage.DECODE, error)
    assert type(mapped) is StageUnavailable
    assert mapped.stage is Stage.DECODE
    assert words in str(mapped)
    assert "\n" not in str(mapped)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("ours", [BadRequest("too long"), HandoffLost(Stage.PREFILL, "is gone")])
def test_error_of_ours_comes_out_of_a_replica_as_it_went_in(ours: EPDError, dual: bool) -> None:
    error = RayTaskError("f", "traceback", ours)
    assert to_stage_error(Stage.DECODE, error.as_instanceof_cause() if dual else error) is ours
    assert to_stage_error(Stage.DECODE, ours) is ours


async def value(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def test_call_goes_to_the_named_method_with_its_arguments() -> None:
    asked: list[Any] = []

    def answer(method: str, *args: Any, streaming: bool) -> FakeResponse:
        asked.append((method, args, streaming))
        return response

    response = FakeResponse(value(42))
    assert asyncio.run(StageHandle(Stage.PREFILL, FakeHandle(answer)).call("prefill", 1, 2)) == 42  # type: ignore[arg-type]
    assert asked == [("prefill", (1, 2), False)]
    assert response.cancelled == 0


def handle(response: Any) -> StageHandle:
    return StageHandle(Stage.PREFILL, FakeHandle(lambda *args, **kwargs: response))  # type: ignore[arg-type]


def test_a_method_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    fake = FakeHandle(lambda *_, **__: FakeResponse(value(1)))
    look = FakeHandle.__getattr__
    monkeypatch.setattr(FakeHandle, "__getattr__", lambda self, name: looked_up.append(name) or look(self, name))
    stage = StageHandle(Stage.PREFILL, fake)  # type: ignore[arg-type]
    for method in ("prefill", "prefill", "check_health", "prefill"):
        asyncio.run(stage.call(method))
    assert looked_up == ["prefill", "check_health"]


def test_failing_call_is_an_error_of_ours_with_its_cause() -> None:
    with pytest.raises(StageUnavailable, match="The prefill stage is full") as caught:
        asyncio.run(handle(FakeResponse(value(BackPressureError(1, 1)))).call("prefill"))
    assert isinstance(caught.value.__cause__, BackPressureError)


@pytest.mark.parametrize(("error", "avoided"), [(EngineDead(Stage.PREFILL, "is dead"), True), (RayActorError(), False)])
def test_replica_whose_engine_is_dead_is_avoided(
    monkeypatch: pytest.MonkeyPatch, error: Exception, avoided: bool
) -> None:
    """Of a replica that is gone itself Serve knows at once."""
    monkeypatch.setattr(handles, "known", KnownReplicas())
    failure = RayTaskError("f", "traceback", error).as_instanceof_cause() if avoided else error

    def send(*_: Any, streaming: bool) -> FakeResponse:
        handles.sending.get().replica = "SERVE_REPLICA::shop#Prefill#r1"  # type: ignore[union-attr]  # as a router does
        return FakeResponse(value(failure))

    with pytest.raises(StageUnavailable):
        asyncio.run(StageHandle(Stage.PREFILL, FakeHandle(send)).call("prefill"))  # type: ignore[arg-type]
    replicas: Any = [
        SimpleNamespace(replica_id=ReplicaID(each, DeploymentID("Prefill", "shop"))) for each in ("r1", "r2")
    ]
    assert handles.known.healthy(replicas) == replicas[avoided:]
    monkeypatch.setattr(handles.time, "monotonic", lambda: 1e12)
    assert handles.known.healthy(replicas) == replicas


def test_cancelling_the_caller_cancels_the_call() -> None:
    async def main() -> FakeResponse:
        reached = asyncio.Event()

        async def hang() -> None:
            reached.set()
            await asyncio.Event().wait()

        response = FakeResponse(hang())
        call = asyncio.create_task(handle(response).call("prefill"))
        await reached.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return response

    assert asyncio.run(main()).cancelled == 1


@pytest.mark.parametrize("gone", ["", "replica", "source"])
@pytest.mark.parametrize("kind", ["a call", "a call that waits for blocks", "a call that was heard"])
def test_silent_call_ends_when_what_it_waits_for_is_gone_without_a_word(
    monkeypatch: pytest.MonkeyPatch, kind: str, gone: str
) -> None:
    """The connection to a node without power stays open: only Ray can tell. Once something was heard, on whatever way, its
    blocks are where they were to go."""
    monkeypatch.setattr(handles, "SILENT_S", 0.01)
    waits_for = {"replica", "source"} if kind == "a call that waits for blocks" else {"replica"}

    async def main() -> None:
        asked: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        cancelled = asyncio.Event()

        def is_alive(replica: str) -> bool:
            loop.call_soon_threadsafe(asked.put_nowait, "replica")
            assert replica == actor
            return gone != "replica"

        def dead_nodes() -> set[str]:
            loop.call_soon_threadsafe(asked.put_nowait, "source")
            return {"another", gone}

        async def silent() -> None:
            await cancelled.wait()
            raise TaskCancelledError

        def send(*_: Any, streaming: bool) -> FakeResponse:
            handles.sending.get().replica = actor  # type: ignore[union-attr]  # as our routers do
            response = FakeResponse(silent())
            monkeypatch.setattr(response, "cancel", cancelled.set)
            return response

        monkeypatch.setattr(handles, "is_alive", is_alive)
        monkeypatch.setattr(handles, "dead_nodes", dead_nodes)
        monkeypatch.setattr(handles, "known", KnownReplicas())
        stage = StageHandle(Stage.DECODE, FakeHandle(send))  # type: ignore[arg-type]
        actor = stage.actor("r1")
        call = None if kind == "a call" else Call("source")
        if kind == "a call that was heard" and call is not None:
            call.heard()
        caller = asyncio.create_task(stage.call("decode", call=call))
        if gone in waits_for:
            error: Any = pytest.raises(StageUnavailable, match=LOST)
            if gone == "source":
                error = pytest.raises(HandoffLost, match="waits for KV blocks of a node that is gone")
            with error:
                await asyncio.wait_for(caller, 5)
            assert bool(handles.known.avoided) == (gone == "replica")
        else:
            seen = {await asyncio.wait_for(asked.get(), 5) for _ in range(2 * len(waits_for))}
            assert seen == waits_for
            assert not caller.done() and not cancelled.is_set()
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        assert cancelled.is_set()

    asyncio.run(main())


def test_call_that_is_heard_again_and_again_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode call is silent to its end: its tokens come another way."""
    silent_s = 0.05
    monkeypatch.setattr(handles, "SILENT_S", silent_s)
    asked = False

    def is_alive(_: str) -> bool:
        nonlocal asked
        asked = True
        return True

    monkeypatch.setattr(handles, "is_alive", is_alive)

    async def main() -> None:
        heard, loop = Call(), asyncio.get_running_loop()

        def token() -> None:
            heard.heard()
            if loop.time() < until:
                loop.call_soon(token)
            else:
                done.set()

        async def decoding() -> str:
            await done.wait()
            return "done"

        def send(*_: Any, streaming: bool) -> FakeResponse:
            handles.sending.get().replica = "r1"  # type: ignore[union-attr]
            return FakeResponse(decoding())

        done, until = asyncio.Event(), loop.time() + 5 * silent_s
        stage = StageHandle(Stage.DECODE, FakeHandle(send))  # type: ignore[arg-type]
        token()
        assert await stage.call("decode", call=heard) == "done"
        assert not asked
        assert heard.source == ""

    asyncio.run(main())


def test_caller_that_leaves_a_call_that_is_lost_is_cancelled() -> None:
    """Ray tells of a cancelled call by an error of its own, whoever was cancelled."""

    async def main() -> None:
        reached = asyncio.Event()

        async def hang() -> None:
            reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RequestCancelledError("r") from None

        stage = handle(FakeResponse(hang()))
        call = asyncio.create_task(stage.call("prefill"))
        await reached.wait()
        for under_way in stage._calls:
            under_way.lose(StageUnavailable(Stage.PREFILL, "is gone"))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())


def test_call_that_waits_for_a_replica_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "SILENT_S", 0.01)
    monkeypatch.setattr(handles, "is_alive", lambda _: pytest.fail("there is no replica yet"))

    async def later() -> int:
        await asyncio.sleep(0.1)  # many times as long as silence may last
        return 42

    assert asyncio.run(handle(FakeResponse(later())).call("prefill")) == 42


def test_silent_call_waits_on_while_ray_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(*_: Any, **__: Any) -> None:
        raise RaySystemError("no GCS")

    monkeypatch.setattr(handles.ray, "get_actor", get_actor)
    assert handles.is_alive("replica")


def request(tokens: int = 10, data: Any = None, **params: Any) -> StageRequest:
    items = () if data is None else (Item("image", "h", 0, 1, None, {"pixel_values": SimpleNamespace(data=data)}),)
    return StageRequest("r", Prompt([1] * tokens, items), SamplingParams(**params))


def picture(size: int) -> MediaRequest:
    return MediaRequest("r", Media("image", bytes(size), None, 1, "d"), 1)


@pytest.mark.parametrize(
    ("light", "arguments"),
    [
        (True, ["id", {"remote_block_ids": [1]}]),
        (True, [request()]),
        (True, [picture(1 << 20)]),
        (False, [picture((1 << 20) + 1)]),
        (True, [request(data=torch.zeros(1000))]),
        (False, [request(data=torch.zeros(1 << 18, dtype=torch.float32))]),
        (False, [request(tokens=200_000)]),
        (True, [request(logprobs=5)]),  # they come over the channel
        (False, [request(prompt_logprobs=1)]),
        (False, [request(stop="x" * (1 << 20))]),
    ],
)
def test_large_calls_go_through_the_object_store(light: bool, arguments: list[Any]) -> None:
    """Ray's gRPC takes 4 MiB, in either direction."""
    fake = FakeHandle(lambda *args, streaming: FakeResponse(value(1)))
    asyncio.run(StageHandle(Stage.DECODE, fake).call("prefill", *arguments))  # type: ignore[arg-type]
    assert [options["_by_reference"] for options in fake.used] == [not light]


def test_broadcast_gives_a_result_or_an_error_of_ours_for_each_replica() -> None:
    broadcast = FakeBroadcast(["ok", RayTaskError("f", "traceback", BadRequest("no profiler")), ActorDiedError()])
    first, second, third = asyncio.run(handle(broadcast).broadcast("start_profile", timeout_s=3))
    assert first == "ok"
    assert isinstance(second, BadRequest) and str(second) == "no profiler"
    assert isinstance(third, StageUnavailable)
    assert broadcast.timeout_s == 3


def test_broadcast_that_takes_too_long_is_an_error_of_ours() -> None:
    with pytest.raises(StageUnavailable, match="did not answer: TimeoutError"):
        asyncio.run(handle(FakeBroadcast(TimeoutError())).broadcast("metrics"))


# ---- replicas of several versions

OLD, NEW = Version("f", weights="old"), Version("f", weights="new")


class Versions:
    """Replicas of a stage by name. As ours, its router passes by those that have told of another version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **replicas: Version) -> None:
        monkeypatch.setattr(handles, "known", KnownReplicas())
        self.replicas = replicas
        self.asked: list[str] = []
        self.handle = StageHandle(Stage.PREFILL, FakeHandle(self._send))  # type: ignore[arg-type]
        ids = {name: ReplicaID(name, DeploymentID("Stage", "shop")) for name in replicas}
        self.wrappers: Any = {name: SimpleNamespace(replica_id=of) for name, of in ids.items()}
        self.curr_replicas = {of: self.wrappers[name] for name, of in ids.items()}
        handles.known.routers["shop", "Stage"] = self  # type: ignore[assignment]

    def _send(self, method: str, request: StageRequest, streaming: bool) -> FakeResponse:
        candidates = handles.known.healthy(list(self.wrappers.values()), [request])
        name = candidates[0].replica_id.unique_id
        self.asked.append(name)
        handles.sending.get().replica = self.handle.actor(name)  # type: ignore[union-attr]
        return FakeResponse(self._answer(request, name))

    async def _answer(self, request: StageRequest, name: str) -> PrefillReply:
        version = self.replicas[name]
        if not version.fits(request.version):
            refusal = OtherVersion(Stage.PREFILL, "is of another version", name, version)
            raise RayTaskError("f", "traceback", refusal).as_instanceof_cause()
        return PrefillReply({}, None, 0, name, version=version)

    def ask(self, version: Version) -> str:
        """Which replica answers."""
        call = StageRequest("r", Prompt([1]), SamplingParams(), version=version)
        return str(asyncio.run(self.handle.call("prefill", call)).replica)


def test_call_that_is_refused_by_another_version_goes_on_to_the_next_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Versions(monkeypatch, a=OLD, b=OLD, c=NEW)
    assert stage.ask(NEW) == "c"
    assert stage.asked == ["a", "b", "c"]
    assert stage.ask(NEW) == "c" and stage.ask(OLD) == "a"
    assert stage.asked[3:] == ["c", "a"], "each has told"


def test_what_a_replica_answers_tells_of_its_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Versions(monkeypatch, a=OLD, b=NEW)
    assert stage.ask(Version("f")) == "a"
    assert stage.ask(NEW) == "b"
    assert stage.asked == ["a", "b"]


def test_call_that_every_replica_refuses_fails_and_asks_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Versions(monkeypatch, a=OLD, b=OLD)
    with pytest.raises(OtherVersion, match="The prefill stage is of another version") as caught:
        stage.ask(NEW)
    assert isinstance(caught.value, StageUnavailable)
    assert stage.asked == ["a", "b"]


def test_calls_that_ray_sends_elsewhere_than_they_were_to_go_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Versions(monkeypatch, a=OLD, b=NEW)
    monkeypatch.setattr(handles.known, "healthy", lambda replicas, args: replicas)
    with pytest.raises(OtherVersion):
        stage.ask(NEW)
    assert stage.asked == ["a"] * 5


def test_version_that_a_call_goes_on_from_is_its_requests_or_named() -> None:
    call = StageRequest("r", Prompt([1]), SamplingParams(), version=NEW)
    assert handles.asked_version([call]) == handles.asked_version(["id", {}, NEW]) == NEW
    assert handles.asked_version(["id", ("a", "b")]) == Version()


def test_version_that_is_heard_before_the_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first tokens of a decode call, which ends much later."""
    stage = Versions(monkeypatch, a=OLD, b=NEW)
    stage.handle.learn("a", OLD)
    assert stage.ask(NEW) == "b"
    assert stage.asked == ["b"]


def test_weights_of_a_stage_are_those_of_its_replicas_of_now_once_there_are_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Versions(monkeypatch, a=OLD, b=OLD, c=NEW)
    stage.ask(Version("f"))
    assert stage.handle.weights == frozenset(), "nothing to choose from"
    stage.ask(NEW)
    assert stage.handle.weights == {"old", "new"}
    for name in ("a", "b"):
        del stage.curr_replicas[ReplicaID(name, DeploymentID("Stage", "shop"))]
    assert stage.handle.weights == {"new"}


def test_what_is_known_of_replicas_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    Versions(monkeypatch)
    for number in range(2 * handles.REMEMBERED_REPLICAS):
        handles.known.learn(f"r{number}", NEW if number % 2 else OLD)
    assert len(handles.known.versions) == handles.REMEMBERED_REPLICAS
    assert handles.known.kinds == {OLD, NEW}


def test_refusal_comes_out_of_a_replica_as_it_went_in() -> None:
    refusal = OtherVersion(Stage.DECODE, "is of another version", "r1", NEW)
    sent = pickle.loads(pickle.dumps(refusal))
    assert (str(sent), sent.stage, sent.replica, sent.version) == (str(refusal), Stage.DECODE, "r1", NEW)


class Placing:
    """A stage whose replica `r1` answers calls one after the other as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *replies: Any) -> None:
        monkeypatch.setattr(handles, "known", KnownReplicas())
        self.affinity, self._replies = Affinity(1000), list(replies)
        self.stage = StageHandle(Stage.PREFILL, FakeHandle(self._send))  # type: ignore[arg-type]
        self.stage.place_by(self.affinity)

    def _send(self, *_: Any, streaming: bool) -> FakeResponse:
        self.affinity.order("id", {"r1": 0})
        self.affinity.sent("id", "r1")
        return FakeResponse(value(self._replies.pop(0)))

    def call(self, needs: int = 0) -> int:
        """The tokens that the replica was expected to hold."""
        call = Call(prefix=Prefix((1, 2), 140), needs=needs)
        asyncio.run(self.stage.call("prefill", StageRequest("id", Prompt([1]), SamplingParams()), call=call))
        return call.expected_tokens


ANSWER = PrefillReply({}, None, 0, "r1")


def failure(error: EPDError) -> RayTaskError:
    return RayTaskError("f", "traceback", error)


def test_a_stage_learns_what_its_replicas_hold_from_what_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    placing = Placing(monkeypatch, ANSWER, ANSWER)
    assert [placing.call(), placing.call()] == [0, 128]
    assert placing.affinity.blocks == 2
    assert placing.affinity._calls == {}
    assert placing.affinity.right == 0.0, "it was expected to hold 128 tokens, and held none"


@pytest.mark.parametrize("error", [StageUnavailable(Stage.PREFILL, "is gone"), HandoffLost(Stage.PREFILL, "is lost")])
def test_a_call_that_fails_tells_nothing_of_a_prefix_cache(monkeypatch: pytest.MonkeyPatch, error: EPDError) -> None:
    placing = Placing(monkeypatch, failure(error), ANSWER, failure(error))
    with pytest.raises(type(error)):
        placing.call()
    assert (placing.affinity.blocks, placing.affinity._calls) == (0, {})
    placing.call()
    with pytest.raises(type(error)):
        placing.call()
    assert placing.affinity.blocks == 2


def test_a_replica_without_the_items_that_were_left_to_it_is_known_to_hold_nothing_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placing = Placing(monkeypatch, ANSWER, failure(HandoffLost(Stage.PREFILL, "is lost")))
    placing.call()
    with pytest.raises(HandoffLost):
        placing.call(needs=128)
    assert (placing.affinity.blocks, placing.affinity._calls) == (0, {})
