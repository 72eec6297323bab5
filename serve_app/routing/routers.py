"""Request routers of Ray Serve: which replica gets a call. Each ingress replica has its own, which sees its calls only.

``routing.rules`` has the rule for items, ``routing.affinity`` that for prompts. Where prompts do not go by their prefix, Ray
Serve's own holds: the fewer calls under way of two at random.
"""

import time
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from serve_app.handoff.types import MediaRequest, StageRequest
from serve_app.routing import handles
from serve_app.routing.affinity import Affinity
from serve_app.routing.rules import Loads, rank, tiers, work_of


class _KnownRouter(RequestRouter):
    """A router that tells each call where it is sent, and its handle where calls can go.

    Ray pickles this module by value, so what has to be one object in a process is in ``routing.handles``.
    """

    def _make_known(self) -> None:
        handles.known.routers[self.app_name, self._deployment_id.name] = self

    def _fulfill_next_pending_request(self, replica: Any, request_metadata: Any = None) -> None:
        """A replica takes the call that it was chosen for. Calls have ids of their own: each is made in its own context.

        Serve's rule of two choices gives it to the call that waits longest. That loses prefix and version; and after a stage
        was full, four calls a second come through, as whoever gave its replica away sleeps before it looks again.
        """
        RequestRouter._fulfill_next_pending_request(self, replica, request_metadata)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        if (call := handles.sending.get()) is not None:
            call.replica = replica_id.to_full_id_str()


class PrefixRouter(_KnownRouter, PowerOfTwoChoicesRequestRouter):
    """The request router of the Prefill and Decode deployments, for healthy replicas of the call's version.

    A call whose prefix its handle has announced (``StageHandle.place_by``) goes by that, any other by Ray Serve's rule.
    Where no replica is healthy, a call ``waits`` for one, or else goes to any and fails at once.
    """

    def initialize_state(self, waits: bool = False) -> None:
        self._make_known()
        self._waits = waits

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        healthy = handles.known.healthy(candidate_replicas, pending_request.args if pending_request else ())
        if pending_request is not None and (placed := self._placed(healthy, pending_request)):
            return placed
        chosen: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        if len(healthy) == len(candidate_replicas) or not (self._waits or healthy):
            return chosen
        # The healthy ones of the two; all healthy ones where neither of the two is.
        return [[each for each in replicas if each in healthy] or healthy for replicas in chosen]

    def _placed(self, replicas: list[Any], pending: PendingRequest) -> list[list[Any]]:
        """The replicas in the order in which a call tries them by its prefix. Empty: it has none."""
        affinity, request_id = self._affinity, request_id_of(pending)
        if affinity is None or not request_id:
            return []
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        tiers = affinity.order(request_id, handles.queues_of(self, replicas))
        pending.routing_context.should_backoff |= bool(tiers)
        return [[by_id[name] for name in tier] for tier in tiers]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if self._affinity is not None and (request_id := request_id_of(pending_request)):
            self._affinity.sent(request_id, replica_id.unique_id)

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        if self._affinity is not None:
            self._affinity.keep({replica.unique_id for replica in self.curr_replicas})

    @property
    def _affinity(self) -> Affinity | None:
        return handles.known.affinities.get((self.app_name, self._deployment_id.name))


def request_id_of(pending: PendingRequest) -> str:
    """The id of the request that a call of a stage is for; empty if it is for none."""
    return next((arg.request_id for arg in pending.args if isinstance(arg, StageRequest)), "")


class LeastCostRouter(_KnownRouter):
    """The request router of the Encoder deployment.

    Serve matches choice and call by the call's internal request id, so each call needs its own: ``ingress.encoding`` makes
    calls in fresh contexts.
    """

    def initialize_state(self, headroom: float = 1.25) -> None:
        self._make_known()
        self._headroom = headroom
        self._loads = Loads()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        args = pending_request.args if pending_request else ()
        candidate_replicas = handles.known.healthy(candidate_replicas, args) or candidate_replicas
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        request = next((arg for arg in args if isinstance(arg, StageRequest | MediaRequest)), None)
        if request is None:
            return [candidate_replicas]
        (key, cost), now = work_of(request), time.monotonic()
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = pending_request.metadata.internal_request_id
        self._loads.answered(call)  # an earlier choice for the same call that a replica rejected
        loads = self._loads.of(list(replicas), now)
        order = rank(key, cost, loads, self._headroom)
        first, *others = tiers(order, loads)
        if queues := handles.queues_known(self, [replicas[replica] for replica in first]):
            # As Ray would choose, but known before a replica has taken the call: the next items are chosen for now.
            first.sort(key=queues.__getitem__)
            others = [[replica] for replica in first[1:]] + others
            first = first[:1]
        self._loads.chosen(call, first[0], cost, now)
        return [[replicas[replica] for replica in tier] for tier in [first, *others]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._loads.sent(pending_request.metadata.internal_request_id, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._loads.answered(internal_request_id)
