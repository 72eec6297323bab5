"""Calls of a stage over its Ray Serve handle: cancelled with their caller, and failing only with errors of ours.

``routing.routers`` chooses the replica of a call.
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
from serve_app.handoff.types import ANY, MediaRequest, PrefillReply, StageRequest, Version
from serve_app.routing.affinity import Affinity
from serve_app.routing.prefix import Prefix
from serve_app.stage import Stage

LIGHT_BYTES = 1 << 20
"""Ray Serve's gRPC transport takes messages of 4 MiB (``RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH``)."""

SILENT_S = 10.0
"""Seconds without a sign of life after which a call asks Ray whether what it waits for still lives."""

AVOID_S = 60.0
"""Serve stops routing to a replica after three failed health checks, by default one each 10 s."""

REMEMBERED_REPLICAS = 1024


def is_light(argument: Any) -> bool:
    """Whether a call may go straight to the replica by gRPC, which costs half of a call through Ray's object store.

    Pixels, media and logprobs of prompts, which can be large, go through the object store.
    """
    match argument:
        case StageRequest(prompt=prompt, params=params):
            if getattr(params, "prompt_logprobs", None) is not None:
                return False
            size = 8 * len(prompt.token_ids) + sum(item.size_bytes for item in prompt.items)
            return size <= LIGHT_BYTES and size + len(pickle.dumps(params)) <= LIGHT_BYTES
        case MediaRequest(media=media):
            return len(media.data) <= LIGHT_BYTES
    return True


@dataclass(eq=False)
class Call:
    """One call of a replica, while it is under way."""

    source: str = ""
    """The node that holds what the call waits for: ``HandoffLost`` if Ray loses it before the replica begins to answer."""
    seen: float = field(default_factory=time.monotonic)
    """Time of its last sign of life."""
    replica: str = ""
    """Ray's name of the replica it was sent to. Its router sets this (``routing.routers``)."""
    prefix: Prefix | None = None
    """Of a prompt that the replica is to prefill: it goes where its prefix is."""
    needs: int = 0
    """Tokens of the prompt that the replica has to hold: it gets nothing to compute them from."""
    expected_tokens: int = 0
    """Tokens that the replica was expected to hold, once it has told what it held."""
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


def asked_version(args: Iterable[Any]) -> Version:
    """The version that a call asks for: that of its request, or a version among its arguments."""
    for arg in args:
        if isinstance(arg, StageRequest | MediaRequest):
            return arg.version
        if isinstance(arg, Version):
            return arg
    return ANY


class KnownReplicas:
    """What a process knows of replicas, by Ray's names of them. Routers ask it with each call."""

    def __init__(self) -> None:
        self.routers: WeakValueDictionary[tuple[str, str], RequestRouter] = WeakValueDictionary()
        """The routers of this process' handles, by application and deployment."""
        self.avoided: dict[str, float] = {}
        """Replicas whose engines are dead, and until when routers pass them by."""
        self.versions: dict[str, Version] = {}
        """The version that each replica told last."""
        self.kinds: set[Version] = set()
        """All versions in ``versions``: as few as there are stages, as long as no deploy goes on."""
        self.affinities: dict[tuple[str, str], Affinity] = {}
        """What is known of the prefix caches of a stage's replicas, by application and deployment."""

    def avoid(self, replica: str) -> None:
        """Have routers pass by a replica whose engine is dead: it is always idle, and would be chosen first."""
        self.avoided[replica] = time.monotonic() + AVOID_S

    def learn(self, replica: str, version: Version) -> None:
        if self.versions.get(replica) == version:
            return
        self.versions.pop(replica, None)
        self.versions[replica] = version
        if len(self.versions) > REMEMBERED_REPLICAS:
            del self.versions[next(iter(self.versions))]
        self.kinds = set(self.versions.values())

    def of_version(self, asked: Version, replicas: list[RunningReplica]) -> list[RunningReplica]:
        """The replicas that may be of a version: all that have not told another."""
        if all(kind.fits(asked) for kind in self.kinds):
            return replicas
        return [each for each in replicas if self.versions.get(each.replica_id.to_full_id_str(), ANY).fits(asked)]

    def healthy(self, replicas: list[RunningReplica], args: Iterable[Any] = ()) -> list[RunningReplica]:
        """The replicas that are not avoided and of the version that a call's arguments ask for.

        If no replica is of that version, the version does not count: the one that is called refuses.
        """
        replicas = self.of_version(asked_version(args), replicas) or replicas
        if not self.avoided:
            return replicas
        now = time.monotonic()
        for replica in [replica for replica, until in list(self.avoided.items()) if until < now]:
            self.avoided.pop(replica, None)
        return [replica for replica in replicas if replica.replica_id.to_full_id_str() not in self.avoided]


known = KnownReplicas()
"""That of this process: Ray makes a handle's router by itself, with nothing but the two names of its deployment."""


def queues_of(router: RequestRouter, replicas: Iterable[RunningReplica]) -> dict[str, int]:
    """Calls at each replica, by its id: those that Ray Serve has heard of. 0: it has not heard of it for 10 s."""
    lengths = router.replica_queue_len_cache
    return {replica.replica_id.unique_id: lengths.get(replica.replica_id) or 0 for replica in replicas}


def queues_known(router: RequestRouter, replicas: Iterable[RunningReplica]) -> dict[str, int]:
    """As ``queues_of``; empty where Ray Serve has not heard of each of them, and would ask."""
    lengths = router.replica_queue_len_cache
    found = {replica.replica_id.unique_id: lengths.get(replica.replica_id) for replica in replicas}
    known = {name: length for name, length in found.items() if length is not None}
    return known if len(known) == len(found) else {}


def is_alive(replica: str) -> bool:
    """Whether Ray has an actor of this name; True where Ray cannot say. Waits for Ray."""
    try:
        ray.get_actor(replica, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except RayError:
        pass
    return True


def dead_nodes() -> set[str]:
    """Ids of the nodes that Ray has lost or removed. Waits for Ray."""
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
        self.affinity: Affinity | None = None
        """Where prompts that the stage prefills go by their prefix. None: they go by the number of calls."""
        self._watching: asyncio.Task[None] | None = None

    def actor(self, replica: str) -> str:
        """Ray's name of a replica of this stage."""
        return str(ReplicaID(replica, DeploymentID(self._unary.deployment_name, self._unary.app_name)).to_full_id_str())

    @property
    def absent(self) -> bool:
        """Whether a call would wait for a replica to start, as none takes calls now. Only of encoders; else False."""
        router = self._router if self.stage is Stage.ENCODER else None
        return router is not None and not router.curr_replicas

    @property
    def weights(self) -> frozenset[str]:
        """Weights that replicas which take calls now have told; empty while no two replicas have told different ones."""
        if len({kind.weights for kind in known.kinds}) < 2 or self._router is None:
            return frozenset()
        told = {known.versions.get(replica.to_full_id_str(), ANY).weights for replica in self._router.curr_replicas}
        return frozenset(told - {""})

    def place_by(self, affinity: Affinity) -> None:
        """Have prompts go by their prefix from now on."""
        self.affinity = known.affinities[self._unary.app_name, self._unary.deployment_name] = affinity

    def expected(self, prefix: Prefix) -> tuple[int, float]:
        """Tokens of a prompt that the replica holds which would get it now, and how likely it is that they are."""
        if self.affinity is None or self._router is None:
            return 0, 0.0
        return self.affinity.expected(prefix, queues_of(self._router, self._router.curr_replicas.values()))

    def began(self, request_id: str, call: Call, cached_tokens: int) -> None:
        """A replica has prefilled a prompt, and decodes it from now on."""
        self._found(request_id, call, cached_tokens)
        if self.affinity is not None:
            self.affinity.began(request_id)

    @property
    def _router(self) -> RequestRouter | None:
        return known.routers.get((self._unary.app_name, self._unary.deployment_name))

    async def call(self, method: str, *args: Any, call: Call | None = None) -> Any:
        """Call one replica, and the next while they refuse because they are of another version.

        Cancelling the caller cancels the call, and with it the replica's engine request. A caller that hears of the call
        in other ways too passes its own record of it, ``call``.
        """
        handle, call = self._method(method, all(map(is_light, args))), call or Call()
        for refusals in itertools.count(1):
            try:
                with self._placed(call, args), self._calling(handle, args, call):
                    reply = await call.response
                    if isinstance(reply, PrefillReply):
                        self._found(args[0].request_id, call, reply.num_cached_tokens or 0)
            except OtherVersion as refused:
                if not self._others_may_fit(refused, args, refusals):
                    raise
            else:
                if (version := getattr(reply, "version", None)) is not None:
                    self.learn(reply.replica, version)
                return reply

    def learn(self, replica: str, version: Version) -> None:
        """The replica with this id has told its version."""
        known.learn(self.actor(replica), version)

    def _others_may_fit(self, refused: OtherVersion, args: tuple[Any, ...], refusals: int) -> bool:
        """Whether another replica may take a call that one has refused because it is of another version.

        Routers pass by a replica that has refused. The bound is for calls that Ray sends there although no router chose it.
        """
        self.learn(refused.replica, Version(*refused.version))
        replicas = list(self._router.curr_replicas.values()) if self._router is not None else []
        return refusals <= 2 * len(replicas) and bool(known.of_version(asked_version(args), replicas))

    def _method(self, name: str, light: bool) -> DeploymentHandle[Any]:
        """The handle of a method. It is kept, as Ray would make a new one each time."""
        if (bound := self._methods.get((name, light))) is None:
            bound = self._methods[name, light] = getattr(self._light if light else self._unary, name)
        return bound

    @contextmanager
    def _placed(self, call: Call, args: tuple[Any, ...]) -> Iterator[None]:
        """Have the router know the prefix of a call, until it has ended."""
        if self.affinity is None or call.prefix is None:
            yield
            return
        request_id = args[0].request_id
        self.affinity.expect(request_id, call.prefix, call.needs)
        try:
            yield
        except HandoffLost:
            if call.needs:
                self.affinity.lost(request_id)
            raise
        finally:
            self.affinity.ended(request_id)

    def _found(self, request_id: str, call: Call, cached_tokens: int) -> None:
        """A replica has told how many tokens of a prompt it had in its prefix cache."""
        if self.affinity is not None and call.prefix is not None:
            call.expected_tokens = self.affinity.found(request_id, cached_tokens)

    @contextmanager
    def _calling(self, handle: DeploymentHandle[Any], args: tuple[Any, ...], call: Call) -> Iterator[Call]:
        """Make a call and watch it while it is under way."""
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
            if task is not None and task.cancelling():  # Ray has other errors for this too
                call.cancel()
                raise asyncio.CancelledError from error
            if call.lost is not None:
                raise call.lost from error
            if isinstance(error, Exception):
                mapped = to_stage_error(self.stage, error)
                if isinstance(mapped, EngineDead):
                    known.avoid(call.replica)
                raise mapped from error
            call.cancel()
            raise
        finally:
            self._calls.discard(call)

    def _watch(self, call: Call) -> None:
        """Notice when the node of a replica that a call waits for loses power or its network.

        A process that ends closes its connections. The loss of a node shows in none for minutes (the keepalive of Ray's
        gRPC clients is 300 s and 120 s, and UCX, which moves KV blocks, has none), but Ray knows it earlier: a call that has
        been silent asks Ray. It asks for the node of its blocks, not for their replica, whose end waits for their pull.
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
                    known.avoid(replica)
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
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    if isinstance(cause, EPDError):
        return cause
    match error:
        case RayTaskError():
            reason = f"failed: {type(cause).__name__}: {cause}"
        case BackPressureError():
            reason = "is full: its queue takes no more requests now"
        case DeploymentUnavailableError():
            reason = "could not be deployed: see `serve status`"
        case TaskCancelledError():
            reason = "cancelled the request"
        case RayActorError():
            reason = "lost the replica that worked on the request"
        case RayError() | RayServeException() | TimeoutError():
            reason = f"did not answer: {type(error).__name__}"
        case _:
            reason = f"failed: {type(error).__name__}: {error}"
    return StageUnavailable(stage, reason)
