"""Stand-ins for what the ingress talks to: stages, and below them Serve's handles. All come in by constructor."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, FinishReason

from serve_app.channel.wire import First, Frame, ReplyTo
from serve_app.handoff.types import ANY, DecodeReply, EncodeReply, PrefillReply, StageRequest, Version
from serve_app.ingress.answers import Answers
from serve_app.ingress.peers import Peers
from serve_app.observe.status import Status
from serve_app.routing.handles import Call
from serve_app.stage import Stage


class FakeClock:
    """``time.monotonic`` that goes where a test sets it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


A, B = [64], [65]
"""Tokens of the demo models whose texts are these letters."""

Calls = list[tuple[str, tuple[Any, ...]]]


class FakeStage:
    """A ``StageHandle``: methods by name, and every call in ``calls`` (and in ``log``, which stages may share).

    ``fails``: what the first calls of a method raise, one each; later ones reach the method.
    """

    def __init__(
        self,
        stage: Stage,
        log: list[str] | None = None,
        fails: Mapping[str, Sequence[Exception]] | None = None,
        **methods: Callable[..., Any],
    ) -> None:
        self.stage = stage
        self.absent = False
        self.weights: frozenset[str] = frozenset()
        self.calls: Calls = []
        self.decodes: FakeDecode | None = None
        self.sources: list[str] = []
        self.learnt: dict[str, Version] = {}
        self.affinity: Any = None
        self.holds = (0, 0.0)
        """What ``expected`` tells of every prompt."""
        self.placed: list[Call] = []
        """Calls of prompts that are to be prefilled."""
        self._log = [] if log is None else log
        self._fails = {method: list(errors) for method, errors in (fails or {}).items()}
        self._methods = methods

    async def call(self, method: str, *args: Any, call: Call | None = None) -> Any:
        """``calls`` has what decode was asked, without where its tokens go."""
        if call is not None and method == "decode":
            self.sources.append(call.source)
        if call is not None and call.prefix is not None:
            self.placed.append(call)
        self._called(method, args[:1] if method == "decode" else args)
        return await self._methods[method](*args)

    def place_by(self, affinity: Any) -> None:
        self.affinity = affinity

    def expected(self, prefix: Any) -> tuple[int, float]:
        return self.holds

    def began(self, request_id: str, call: Call, cached_tokens: int) -> None:
        call.expected_tokens = self.holds[0]

    def learn(self, replica: str, version: Version) -> None:
        self.learnt[replica] = version

    async def broadcast(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[Any]:
        self._called(method, args)
        replies: list[Any] = await self._methods[method](*args)
        return replies

    def requests(self, method: str) -> list[StageRequest]:
        """The requests of all calls of a method."""
        return [args[0] for name, args in self.calls if name == method]

    def _called(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append((method, args))
        self._log.append(method)
        if errors := self._fails.get(method):
            raise errors.pop(0)


def fake_status(stages: Mapping[Stage, Any], states: dict[str, str] | None = None) -> Status:
    """Of one replica each that runs, and an ingress with nothing to do."""

    async def probe() -> dict[str, str]:
        return dict.fromkeys(stages, "healthy") if states is None else states

    async def census() -> dict[str, dict[str, int]]:
        return {stage: {"RUNNING": 1} for stage in ("ingress", *stages)}

    return Status(stages, probe, census, lambda: {"replica": "ingress-0", "calls": 0.0, "outstanding": 0.0})


@dataclass(frozen=True)
class Step:
    """What a fake decode makes of a request in one step."""

    token_ids: list[int]
    finish_reason: str | None = None
    replica: str = "decode-0"
    ran_s: float = 0.0
    kv_s: float | None = None
    version: Version = ANY
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of vLLM's EngineCoreOutput."""

    def output(self, key: str) -> EngineCoreOutput:
        reason = FinishReason[self.finish_reason.upper()] if self.finish_reason else None
        return EngineCoreOutput(key, list(self.token_ids), finish_reason=reason, **self.more)


Steps = Callable[[StageRequest], AsyncIterator[Step]]


class FakeDecode:
    """Decode replicas over channels without sockets: ``answers`` hears what ``steps`` makes of each request."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._listening: dict[str, Answers] = {}
        self.links: dict[str, FakeLink] = {}

    @property
    def answers(self) -> Answers | None:
        """Of the client that was made last."""
        return next(reversed(self._listening.values()), None)

    @answers.setter
    def answers(self, answers: Answers) -> None:
        self._listening[answers.inlet.reply_to.secret] = answers

    async def decode(self, request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers = self._listening[reply_to.secret]
        tokens, replica, version = 0, "decode-0", ANY
        async for step in self._steps(request):
            link = self.links.setdefault(step.replica, FakeLink(step.replica))
            key, replica, version = request.request_id, step.replica, step.version
            first = [] if tokens else [First(key, replica, step.ran_s, step.kv_s, version)]
            tokens += len(step.token_ids)
            answers.received(link, Frame([step.output(key)], first))  # type: ignore[arg-type]
            await asyncio.sleep(0)  # as over a socket
            if key in link.aborted:
                break
        return DecodeReply(replica, tokens, version)


class FakeLink:
    """The ingress' end of the connection of a decode replica."""

    def __init__(self, replica: str) -> None:
        self.replica = replica
        self.aborted: list[str] = []

    def abort(self, keys: list[str]) -> None:
        self.aborted += keys


class FakePipeline:
    """Encoder, prefill and decode stages that answer as engines would; each method can be replaced, or fail at first.

    ``steps``: what decode makes of a request.
    """

    def __init__(
        self,
        without: tuple[Stage, ...] = (),
        fails: Mapping[str, Sequence[Exception]] | None = None,
        steps: Steps | None = None,
        **methods: Callable[..., Any],
    ) -> None:
        self.log: list[str] = []
        self.prefills = 0
        self.decodes = FakeDecode(steps or self.steps)
        known = {
            Stage.ENCODER: {"encode": self.encode},
            Stage.PREFILL: {"prefill": self.prefill, "renew": self.renew},
            Stage.DECODE: {"decode": self.decodes.decode, "release": self.release},
        }
        self.stages = {
            stage: FakeStage(
                stage, self.log, fails, **{name: methods.get(name, method) for name, method in own.items()}
            )
            for stage, own in known.items()
            if stage not in without
        }
        self.stages[Stage.DECODE].decodes = self.decodes

    @property
    def encoder(self) -> FakeStage:
        return self.stages[Stage.ENCODER]

    @property
    def prefiller(self) -> FakeStage:
        return self.stages[Stage.PREFILL]

    @property
    def decoder(self) -> FakeStage:
        return self.stages[Stage.DECODE]

    async def encode(self, request: StageRequest) -> EncodeReply:
        return encoded(request)

    async def prefill(self, request: StageRequest) -> PrefillReply:
        self.prefills += 1
        return PrefillReply({"remote_block_ids": [self.prefills]}, None, 3, "prefill-0", node="node-0")

    async def steps(self, request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A)
        yield Step(B, "length")

    async def renew(self, waiting: list[str]) -> list[set[str]]:
        return [set()]

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any], version: Version) -> None: ...

    def released(self) -> list[Any]:
        """Of which request, and which blocks."""
        return [args[:2] for method, args in self.decoder.calls if method == "release"]


def encoded(request: StageRequest, replica: str = "encoder-0") -> EncodeReply:
    """What an encoder answers: it saw its items alone."""
    metadata = {item.hash: {"item_indices": [0], "metadata": {"of": item.hash}} for item in request.prompt.items}
    return EncodeReply(metadata, replica)


class FakeResponse:
    """What Serve's ``handle.method.remote()`` returns, unary or streaming."""

    def __init__(self, result: Awaitable[Any] | AsyncIterator[Any]) -> None:
        self._result = result
        self.cancelled = 0

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result.__await__()  # type: ignore[union-attr]

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._result  # type: ignore[return-value]

    def cancel(self) -> None:
        self.cancelled += 1


class FakeBroadcast:
    def __init__(self, results: list[Any] | Exception) -> None:
        self._results = results
        self.timeout_s: float | None = None

    async def results_async(self, *, timeout_s: float | None = None, return_exceptions: bool = False) -> list[Any]:
        self.timeout_s = timeout_s
        assert return_exceptions
        if isinstance(self._results, Exception):
            raise self._results
        return self._results


class FakeHandle:
    """A ``DeploymentHandle``: ``answer(method, *args, streaming=)`` makes the response of a call. ``used``: the options of
    each call, of handles made from this one too."""

    deployment_name, app_name = "Stage", "shop"

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer
        self._options = {"stream": False, "_by_reference": True}
        self.used: list[dict[str, bool]] = []

    def options(self, **options: bool) -> "FakeHandle":
        assert options.keys() <= self._options.keys()
        other = FakeHandle(self._answer)
        other._options, other.used = self._options | options, self.used
        return other

    def broadcast(self, method: str, *args: Any) -> Any:
        return self._answer(method, *args)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self, method)


class _Method:
    def __init__(self, handle: FakeHandle, method: str) -> None:
        self._handle, self._method = handle, method

    def remote(self, *args: Any) -> Any:
        handle = self._handle
        handle.used.append(handle._options)
        return handle._answer(self._method, *args, streaming=handle._options["stream"])


class FakePeers(list[Peers]):
    """Ingress replicas that can ask each other, each with the ``Peers`` of one."""

    def __init__(self, replicas: int) -> None:
        super().__init__(Peers(f"ingress-{number}", self) for number in range(replicas))

    def broadcast(self, method: str, *args: Any) -> Any:
        assert method == "tell_peer"

        async def results() -> list[Any]:
            return [SimpleNamespace(get_async=lambda peers=peers: peers.tell(*args)) for peers in self]

        return SimpleNamespace(_fetch_replica_results_async=results)
