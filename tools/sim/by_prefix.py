"""Production's choice of a prefill replica: ``Affinity``, one per ingress replica, with the queue lengths that Ray knows."""

from ray.serve._private.request_router.common import ReplicaQueueLengthCache

from serve_app.routing.affinity import Affinity
from tools.sim.loop import Loop
from tools.sim.pools import Pool
from tools.sim.replicas import Call, Replica


class ByPrefix:
    """As ``PrefixRouter`` and Ray's router around it.

    Lengths are those that replicas told when they took a call of this ingress replica, less the calls that have ended since.
    Ray forgets them after 10 s, and asks again only where it has to choose between replicas of one tier.
    """

    def __init__(self, loop: Loop, max_blocks: int) -> None:
        self.affinity = Affinity(max_blocks, clock=loop.clock)
        self._lengths = ReplicaQueueLengthCache(get_curr_time_s=loop.clock)

    def choose(self, call: Call, pool: Pool) -> Replica | None:
        prefix = call.request.prefix
        assert prefix is not None, "a prompt has its keys"
        queues = {name: self._lengths.get(name) or 0 for name in pool.names}
        tiers = self.affinity.order(call.key, queues)
        if not tiers:
            self.affinity.expect(call.key, prefix)
            tiers = self.affinity.order(call.key, queues)
        for tier in tiers:
            replica = pool.by_name[min(tier, key=lambda name: self._length(name, tier, pool))]
            if replica.ongoing < pool.max_ongoing:
                self._lengths.update(replica.name, replica.ongoing + 1)
                self.affinity.sent(call.key, replica.name)
                return replica
            self._lengths.update(replica.name, replica.ongoing)
        return None

    def _length(self, name: str, tier: list[str], pool: Pool) -> float:
        """Of those in a tier it takes the shortest that it knows; it asks them if it knows none."""
        if all(self._lengths.get(each) is None for each in tier):
            return pool.by_name[name].ongoing
        known = self._lengths.get(name)
        return float("inf") if known is None else known

    def answered(self, call: Call) -> None:
        if call.replica is not None:
            length = self._lengths.get(call.replica.name)
            if length is not None:
                self._lengths.update(call.replica.name, max(length - 1, 0))
            self.affinity.found(call.key, call.cached)
        self.affinity.ended(call.key)
