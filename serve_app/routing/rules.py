"""Which encoder replica gets an item, and which stages a request goes through while a deploy goes on: pure functions.

An item goes to the replica that had it before while its load allows, else to the one with the least work. Load is counted
in embeddings (visual or audio tokens), not in calls: an item of a 4K image is the work of a hundred thumbnails.
The rule is consistent hashing with bounded loads (Mirrokni et al., 2016), with rendezvous hashing.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from serve_app.handoff.types import MediaRequest, StageRequest
from serve_app.stage import Stage

FORGET_UNROUTED_S = 60.0


def rendezvous(key: str, names: Iterable[str]) -> dict[str, int]:
    """A number for each name: the same in all processes. The name with the greatest is home to ``key``."""
    return {name: int.from_bytes(hashlib.blake2b(f"{key} {name}".encode(), digest_size=8).digest()) for name in names}


def rank(key: str, cost: float, loads: Mapping[str, float], headroom: float) -> list[str]:
    """Replicas in the order in which an item of ``cost`` tries them.

    First comes the replica that ``key`` hashes to, if with this item it has at most ``headroom`` × the mean load; then all
    others by load, and those of the same load in the order of their hashes: one order for all would send the items of all
    ingress replicas to the same one. ``loads``: work outstanding by replica, without this item.
    """
    hashes = rendezvous(key, loads)
    home = max(loads, key=hashes.__getitem__)
    mean = (sum(loads.values()) + cost) / len(loads)
    home_fits = loads[home] + cost <= max(headroom * mean, cost)
    return sorted(loads, key=lambda r: (home_fits and r == home, -loads[r], hashes[r]), reverse=True)


def tiers(order: Sequence[str], loads: Mapping[str, float]) -> list[list[str]]:
    """The order of ``rank``, its first two together where they have the same load.

    An ingress replica among many has few calls under way, and knows nothing of most encoders. Between two that look the same
    the shorter queue decides: the power of two choices, always of the same two for an item.
    """
    first = 2 if len(order) > 1 and loads[order[1]] == loads[order[0]] else 1
    return [list(order[:first]), *([replica] for replica in order[first:])]


def work_of(request: StageRequest | MediaRequest) -> tuple[str, int]:
    """The key of an encode call's item, and its cost in embeddings."""
    if isinstance(request, MediaRequest):
        return request.media.key, request.cost
    item = request.prompt.items[0]
    return item.hash, item.num_embeds


class Loads:
    """Work outstanding by replica, from the calls that were sent and not answered."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[str, float, float]] = {}  # call → replica, cost, time by which it has to be routed

    def of(self, replicas: Sequence[str], now: float) -> dict[str, float]:
        loads = dict.fromkeys(replicas, 0.0)
        for call, (replica, cost, routed_by) in list(self._calls.items()):
            if routed_by < now:  # cancelled while it waited for a replica
                self._calls.pop(call, None)
            elif replica in loads:
                loads[replica] += cost
        return loads

    def chosen(self, call: str, replica: str, cost: float, now: float) -> None:
        """Count a call from its choice on: all items of a request get their replicas before the first is sent."""
        self._calls[call] = (replica, cost, now + FORGET_UNROUTED_S)

    def sent(self, call: str, replica: str) -> None:
        if call in self._calls:
            self._calls[call] = (replica, self._calls[call][1], float("inf"))

    def answered(self, call: str) -> None:
        self._calls.pop(call, None)


# ---- a deploy goes on, and replicas of several weights run


class Way(NamedTuple):
    weights: str = ""
    """The weights that all stages are to have. Empty: any."""
    without: frozenset[Stage] = frozenset()
    """Stages to leave out: the next stage can go on from none of their replicas."""


def way(
    told: Mapping[Stage, Collection[str]], weights: str = "", choose: Callable[[Sequence[str]], str] = random.choice
) -> Way:
    """A request keeps to replicas of the same weights. A call that the next stage would refuse is not made: it would cost an
    encode or a prefill, and hold blocks until their lease ends. Decode goes on from prefill, which goes on from encoders.

    ``told``: known weights of each stage's replicas; ``weights``: those that made the output tokens so far.
    """
    without = set()
    taken = {weights} if weights else set(told.get(Stage.DECODE, ()))
    for stage in (Stage.PREFILL, Stage.ENCODER):
        given = set(told.get(stage, ()))
        if not given:  # nothing is known
            continue
        if not taken or given <= taken:
            taken = given
        elif not (common := given & taken):
            without.add(stage)
        else:
            weights = weights or choose(sorted(common))
            taken = {weights}
    return Way(weights, frozenset(without))
