"""Calls of a stage over its Ray Serve handle: cancelled with their caller, and failing only with errors of ours.

Which replica takes a call is the matter of ``routing.routers``.
"""

import asyncio
import contextvars
import itertools
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter, RunningReplica

from serve_app.handoff.errors import EngineDead, EPDError, HandoffLost, OtherVersion, StageUnavailable
from serve_app.handoff.types import ANY, MediaRequest, StageRequest, Version
from serve_app.stage import Stage

routers: WeakValueDictionary[tuple[str, str], RequestRouter] = WeakValueDictionary()
"""The routers of this process' handles, by application and deployment."""


LIGHT_BYTES = 1 << 20
"""Ray Serve's gRPC transport takes messages of 4 MiB (``RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH``)."""


def is_light(argument: Any) -> bool:
    """Whether a call may go straight to the replica by gRPC, which costs half of a call through Ray's object store.

    Pixels, media and logprobs of prompts, which can be large, go through the object store.
    """
    match argument:
        case StageRequest(prompt=prompt, params=params):
            if params.prompt_logprobs is not None:
                return False
            size = 8 * len(prompt.token_ids) + sum(item.size_bytes for item in prompt.items)
            return size <= LIGHT_BYTES and size + len(pickle.dumps(params)) <= LIGHT_BYTES
        case MediaRequest(media=media):
            return len(media.data) <= LIGHT_BYTES
    return True


SILENT_S = 10.0
"""After so long without a sign of life, a call asks Ray whether those it waits for still live."""


@dataclass(eq=False)
class Call:
    """One call of a replica, while it is under way."""

    source: str = ""
    """The node that holds what it waits for: ``HandoffLost`` if Ray loses it before anything was heard."""
    seen: float = field(default_factory=time.monotonic)
    """When it last gave a sign of life."""
    replica: str = ""
    """Where it was sent, as Ray names its actor: told by its router (``routing.routers``)."""
    response: Any = None
    lost: Exception | None = None

    def heard(self) -> None:
        """Its replica has begun to answer."""
        self.seen, self.source = time.monotonic(), ""

    def lose(self, error: Exception) -> None:
        self.lost = error
        self.cancel()

    def cancel(self) -> None:
        if self.response is not None:
            with suppress(Exception):  # Ray raises what the call has failed with already
                self.response.cancel()


sending: contextvars.ContextVar[Call | None] = contextvars.ContextVar("sending", default=None)
"""The call whose replica is being chosen. A router runs in the context of the call."""


AVOID_S = 60.0
"""After three failed health checks, one each 10 s unless set otherwise, Serve routes to a replica no more."""

_avoided: dict[str, float] = {}


def avoid(replica: str) -> None:
    """Have routers of this process pass by a replica whose engine is dead: always idle, it would be taken first."""
    _avoided[replica] = time.monotonic() + AVOID_S


REMEMBERED_REPLICAS = 1024

_versions: dict[str, Version] = {}
"""By Ray's name of a replica: what it answered last."""

_kinds: set[Version] = set()


def learn(replica: str, version: Version) -> None:
    """Of which version a replica is, as it has told."""
    if _versions.get(replica) == version:
        return
    _versions.pop(replica, None)
    _versions[replica] = version
    if len(_versions) > REMEMBERED_REPLICAS:
        del _versions[next(iter(_versions))]
    _kinds.clear()
    _kinds.update(_versions.values())


def of_version(asked: Version, replicas: list[RunningReplica]) -> list[RunningReplica]:
    """Those that may be of the version that a call asks for: all that have not told of another.

    Routers ask with each call. As nearly always, all that have told fit, and there are as few kinds as stages.
    """
    if all(kind.fits(asked) for kind in _kinds):
        return replicas
    return [each for each in replicas if _versions.get(each.replica_id.to_full_id_str(), ANY).fits(asked)]


def asked_version(args: Iterable[Any]) -> Version:
    """What the arguments of a call ask for: a request does, or a version among them."""
    for arg in args:
        if isinstance(arg, StageRequest | MediaRequest):
            return arg.version
        if isinstance(arg, Version):
            return arg
    return ANY


def sound(replicas: list[RunningReplica], asked: Version = ANY) -> list[RunningReplica]:
    """Those that are not to be avoided, of the version that is asked for if there are such: a call that no replica fits
    goes to any, which refuses it. Routers ask with each call: next to nothing where none is, as nearly always."""
    replicas = of_version(asked, replicas) or replicas
    if not _avoided:
        return replicas
    now = time.monotonic()
    for replica in [replica for replica, until in list(_avoided.items()) if until < now]:
        _avoided.pop(replica, None)
    return [replica for replica in replicas if replica.replica_id.to_full_id_str() not in _avoided]


def is_alive(replica: str) -> bool:
    """Whether Ray has a replica, by the name of its actor; True where Ray cannot say. Waits for Ray."""
    try:
        ray.get_actor(replica, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except RayError:
        pass
    return True


def dead_nodes() -> set[str]:
    """Ids of the nodes that Ray has lost or let go. Waits for Ray."""
    try:
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    except RayError:
        return set()


class StageHandle:
    """The replicas of one stage, as the ingress sees them."""

    def __init__(self, stage: Stage, handle: DeploymentHandle[Any]) -> None:
        self.stage = stage
        self._unary = handle
        self._light = handle.options(_by_reference=False)
        self._methods: dict[tuple[str, bool], DeploymentHandle[Any]] = {}
        self._calls: set[Call] = set()
        self._watching: asyncio.Task[None] | None = None

    def actor(self, replica: str) -> str:
        """Ray's name of a replica of this stage."""
        return str(ReplicaID(replica, DeploymentID(self._unary.deployment_name, self._unary.app_name)).to_full_id_str())

    @property
    def absent(self) -> bool:
        """Whether no replica takes calls now, so that a call would wait for one to start. Known of encoders only."""
        router = self._router if self.stage is Stage.ENCODER else None
        return router is not None and not router.curr_replicas

    @property
    def weights(self) -> frozenset[str]:
        """Of the replicas that take calls now, as far as they have told; empty while all that ever told had the same."""
        if len({kind.weights for kind in _kinds}) < 2 or self._router is None:
            return frozenset()
        told = (_versions.get(replica.to_full_id_str()) for replica in self._router.curr_replicas)
        return frozenset(version.weights for version in told if version is not None and version.weights)

    @property
    def _router(self) -> RequestRouter | None:
        return routers.get((self._unary.app_name, self._unary.deployment_name))

    async def call(self, method: str, *args: Any, call: Call | None = None) -> Any:
        """Call one replica, and where it refuses as it is of another version the next. Cancelling the caller cancels the
        call, and with it the replica's engine request.

        ``call``: the caller's own record of it, where the caller hears of it by other ways too.
        """
        handle = self._method(method, all(map(is_light, args)))
        for refusals in itertools.count(1):
            try:
                with self._calling(handle, args, call or Call()) as made:
                    reply = await made.response
            except OtherVersion as refused:
                if not self._others_may_fit(refused, args, refusals):
                    raise
            else:
                if (version := getattr(reply, "version", None)) is not None:
                    self.learn(reply.replica, version)
                return reply

    def learn(self, replica: str, version: Version) -> None:
        """A replica, by its id, has told its version."""
        learn(self.actor(replica), version)

    def _others_may_fit(self, refused: OtherVersion, args: tuple[Any, ...], refusals: int) -> bool:
        """Whether a call that a replica refused as it is of another version may find one that takes it.

        Each replica refuses once: from then on routers pass it by. Ray may still send a call where another one was to go,
        hence the bound.
        """
        self.learn(refused.replica, Version(*refused.version))
        replicas = list(self._router.curr_replicas.values()) if self._router is not None else []
        return refusals <= 2 * len(replicas) and bool(of_version(asked_version(args), replicas))

    def _method(self, name: str, light: bool) -> DeploymentHandle[Any]:
        """Kept: Ray makes a handle each time that one looks for a method."""
        if (bound := self._methods.get((name, light))) is None:
            bound = self._methods[name, light] = getattr(self._light if light else self._unary, name)
        return bound

    @contextmanager
    def _calling(self, handle: DeploymentHandle[Any], args: tuple[Any, ...], call: Call) -> Iterator[Call]:
        """Make a call: watched while it is under way, cancelled with its caller, failing only with errors of ours."""
        token = sending.set(call)
        try:
            try:
                call.response = handle.remote(*args)
            finally:
                sending.reset(token)
            self._watch(call)
            yield call
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # whatever it looks like: Ray has errors of its own for it
                call.cancel()
                raise asyncio.CancelledError from error
            if call.lost is not None:
                raise call.lost from error
            if isinstance(error, Exception):
                mapped = to_stage_error(self.stage, error)
                if isinstance(mapped, EngineDead):
                    avoid(call.replica)
                raise mapped from error
            call.cancel()
            raise
        finally:
            self._calls.discard(call)

    def _watch(self, call: Call) -> None:
        """Notice when a replica that a call waits for is gone without a word.

        Where a process ends, its connections say so. Where a node loses power or its network nothing does for minutes (the
        keepalive of Ray's gRPC clients: 300 s and 120 s; UCX, which moves KV blocks, has none that would notice). Ray knows
        earlier, so a call that has been silent asks Ray. Of the source of blocks only its node is asked for: a replica that
        ends in order has had them pulled.
        """
        self._calls.add(call)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._ask_ray(), context=contextvars.Context())

    async def _ask_ray(self) -> None:
        while self._calls:
            await asyncio.sleep(SILENT_S / 2)
            since = time.monotonic() - SILENT_S
            silent = [call for call in self._calls if call.seen < since and call.lost is None]
            for replica in {call.replica for call in silent if call.replica}:
                if not await asyncio.to_thread(is_alive, replica):
                    avoid(replica)
                    for call in silent:
                        if call.replica == replica:
                            call.lose(to_stage_error(self.stage, RayActorError()))
            if any(call.source for call in silent):
                dead = await asyncio.to_thread(dead_nodes)
                for call in silent:
                    if call.source in dead and call.lost is None:
                        call.lose(HandoffLost(self.stage, "waits for KV blocks of a node that is gone"))

    async def broadcast(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[Any]:
        """Call every replica; one result or exception of each."""
        response = self._unary.broadcast(method, *args)
        try:
            results = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except Exception as error:
            raise to_stage_error(self.stage, error) from error
        return [to_stage_error(self.stage, r) if isinstance(r, Exception) else r for r in results]


def to_stage_error(stage: Stage, error: Exception) -> EPDError:
    """The error of ours for whatever a handle raised."""
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        return (
            cause
            if isinstance(cause, EPDError)
            else StageUnavailable(stage, f"failed: {type(cause).__name__}: {cause}")
        )
    match error:
        case EPDError():
            return error
        case BackPressureError():
            return StageUnavailable(stage, "is full: its queue takes no more requests now")
        case DeploymentUnavailableError():
            return StageUnavailable(stage, "could not be deployed: see `serve status`")
        case TaskCancelledError():
            return StageUnavailable(stage, "cancelled the request")
        case RayActorError():
            return StageUnavailable(stage, "lost the replica that worked on the request")
        case RayError() | RayServeException() | TimeoutError():
            return StageUnavailable(stage, f"did not answer: {type(error).__name__}")
        case _:
            return StageUnavailable(stage, f"failed: {type(error).__name__}: {error}")
