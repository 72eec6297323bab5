"""Request routers of Ray Serve: which replica gets a call, chosen in each ingress replica, which sees its own calls only.

Of prefill and decode it is Ray Serve's choice, the fewer calls in flight of two at random; of encoders the one that
``routing.rules`` names.
"""

import time
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from serve_app.handoff.types import ANY, MediaRequest, StageRequest, Version
from serve_app.routing import handles
from serve_app.routing.rules import Loads, rank, tiers, work_of


def asked_by(request: PendingRequest | None) -> Version:
    """The version that a call asks for."""
    return handles.asked_version(request.args) if request is not None else ANY


class _Tells(RequestRouter):
    """A router that tells each call where it is sent, and its handle where calls can go.

    Ray pickles this module by value: what has to be one thing in a process is in ``routing``.
    """

    def _make_known(self) -> None:
        handles.routers[self.app_name, self._deployment_id.name] = self

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        if (call := handles.sending.get()) is not None:
            call.replica = replica_id.to_full_id_str()


class TwoChoicesRouter(_Tells, PowerOfTwoChoicesRequestRouter):
    """Ray Serve's request router of the Prefill and Decode deployments: its own, which passes by replicas to be avoided, or
    of another version than the call's.

    ``waits``: where there are only replicas to be avoided, a call waits for another. Otherwise it goes there, and fails at
    once.
    """

    def initialize_state(self, waits: bool = False) -> None:
        self._make_known()
        self._waits = waits

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        chosen: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        asked = asked_by(pending_request)
        sound = handles.sound(candidate_replicas, asked)
        if len(sound) == len(candidate_replicas) or not (self._waits or sound):
            return chosen
        # Of two at random, those that are sound; of all, where neither is.
        return [[each for each in replicas if each in sound] or sound for replicas in chosen]


class LeastCostRouter(_Tells):
    """Ray Serve's request router of the Encoder deployment.

    Needs calls with internal request ids of their own (``ingress.encoding`` makes them in fresh contexts): Serve matches
    choice and call by that id.
    """

    def initialize_state(self, headroom: float = 1.25) -> None:
        self._make_known()
        self._headroom = headroom
        self._loads = Loads()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        candidate_replicas = handles.sound(candidate_replicas, asked_by(pending_request)) or candidate_replicas
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        request = next((arg for arg in pending_request.args if isinstance(arg, StageRequest | MediaRequest)), None)
        if request is None:
            return [candidate_replicas]
        (key, cost), now = work_of(request), time.monotonic()
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = pending_request.metadata.internal_request_id
        self._loads.answered(call)  # an earlier choice for the same call that a replica rejected
        loads = self._loads.of(list(replicas), now)
        order = rank(key, cost, loads, self._headroom)
        self._loads.chosen(call, order[0], cost, now)
        # Of a tier Ray takes the replica with the shortest queue, of equal ones the first.
        return [[replicas[replica] for replica in tier] for tier in tiers(order, loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._loads.sent(pending_request.metadata.internal_request_id, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._loads.answered(internal_request_id)
