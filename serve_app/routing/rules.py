"""Which encoder replica gets an item: pure functions of its key, its cost and the load of each replica.

An item goes to the encoder replica that had it before while its load allows, else to the one with least work. Load is
counted in embeddings (visual or audio tokens), not in calls: an item of a 4K image is the work of a hundred thumbnails.
The rule is consistent hashing with bounded loads (Mirrokni et al., 2016), with rendezvous hashing.
"""

import hashlib
from collections.abc import Mapping, Sequence

from serve_app.handoff.types import MediaRequest, StageRequest

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
