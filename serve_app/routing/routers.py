"""Which replica gets a call. Of prefill and decode Ray Serve's choice, the fewer calls in flight of two at random.

An item goes to the encoder replica that had it before while its load allows, else to the one with least work. Load is
counted in embeddings (visual or audio tokens), not in calls: an item of a 4K image is the work of a hundred thumbnails.
``rank`` and ``tiers`` are the rule; ``LeastCostRouter`` is its place in Ray Serve, in each ingress replica, which sees its
own calls only. The rule is consistent hashing with bounded loads (Mirrokni et al., 2016), with rendezvous hashing.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from serve_app.handoff.types import ANY, MediaRequest, StageRequest, Version
from serve_app.routing import handles

FORGET_UNROUTED_S = 60.0


def rank(key: str, cost: float, loads: Mapping[str, float], headroom: float) -> list[str]:
    """Replicas in the order in which an item of ``cost`` tries them.

    First the replica that ``key`` hashes to, if with this item it has at most ``headroom`` × the mean load; then all
    others by load, and those of the same load in the order of their hashes: one order for all would send the items of all
    ingress replicas to the same one. ``loads``: work outstanding by replica, without this item.
    """
    hashes = {r: hashlib.blake2b(f"{key} {r}".encode(), digest_size=8).digest() for r in loads}
    home = max(loads, key=hashes.__getitem__)
    by_load = sorted(loads, key=lambda r: (-loads[r], hashes[r]), reverse=True)
    mean = (sum(loads.values()) + cost) / len(loads)
    if loads[home] + cost <= max(headroom * mean, cost):
        by_load.remove(home)
        by_load.insert(0, home)
    return by_load


def tiers(order: Sequence[str], loads: Mapping[str, float]) -> list[list[str]]:
    """The order of ``rank``, its first two together where they have the same load.

    An ingress replica among many has few calls under way, and so knows nothing of most encoders. Of two that it cannot
    tell apart the one with the shorter queue is to be taken: the power of two choices, for an item always the same two.
    """
    equal = len(order) > 1 and loads[order[1]] == loads[order[0]]
    first = [list(order[:2])] if equal else []
    return first + [[replica] for replica in order[2 * equal :]]


def work_of(request: StageRequest | MediaRequest) -> tuple[str, int]:
    """What names the item of an encode call, and its cost in embeddings."""
    if isinstance(request, MediaRequest):
        return request.media.key, request.cost
    item = request.prompt.items[0]
    return item.hash, item.num_embeds


class Loads:
    """Work outstanding by replica, from the calls that were sent and not answered."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[str, float, float]] = {}  # call → replica, cost, time by which it has to be routed

    def of(self, replicas: Sequence[str], now: float) -> dict[str, float]:
        for call, (_, _, routed_by) in list(self._calls.items()):
            if routed_by < now:  # cancelled while it waited for a replica
                del self._calls[call]
        loads = dict.fromkeys(replicas, 0.0)
        for replica, cost, _ in self._calls.values():
            if replica in loads:
                loads[replica] += cost
        return loads

    def chosen(self, call: str, replica: str, cost: float, now: float) -> None:
        """Counts from the choice on: items of one request are chosen for before the first of them is sent."""
        self._calls[call] = (replica, cost, now + FORGET_UNROUTED_S)

    def sent(self, call: str, replica: str) -> None:
        if call in self._calls:
            self._calls[call] = (replica, self._calls[call][1], float("inf"))

    def answered(self, call: str) -> None:
        self._calls.pop(call, None)


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

    Needs calls with internal request ids of their own (``encoding.py`` makes them in fresh contexts): Serve matches choice
    and call by that id.
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
