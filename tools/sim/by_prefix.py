"""Who prefills, as one ingress replica chooses it: production's ``Affinity`` or Ray's two choices. Both have the queue
lengths that Ray knows there, not the true ones."""

import random

from ray.serve._private.request_router.common import ReplicaQueueLengthCache

from serve_app.routing.affinity import Affinity
from tools.sim.loop import Loop
from tools.sim.pools import Pool
from tools.sim.replicas import Call, Replica


class KnownLengths:
    """Ray's cache in one ingress replica, and its choice by it.

    A length is what the replica told when it took a call of this ingress replica, less the calls of this one that have ended
    since. Ray forgets it after 10 s.
    """

    def __init__(self, loop: Loop) -> None:
        self._cache = ReplicaQueueLengthCache(get_curr_time_s=loop.clock)

    def of(self, name: str) -> int:
        return self._cache.get(name) or 0

    def take(self, tier: list[str], pool: Pool) -> Replica | None:
        """Of some replicas the one with the shortest known length that takes a call. Ray asks those that it knows nothing
        of, and waits for their reply if it knows of none."""
        open_ = [name for name in tier if pool.by_name[name].ongoing < pool.max_ongoing]
        known = [name for name in open_ if self._cache.get(name) is not None]
        for name in open_:
            if name not in known:
                self._cache.update(name, pool.by_name[name].ongoing)
        if not open_:
            return None
        replica = pool.by_name[min(known or open_, key=self.of)]
        self._cache.update(replica.name, replica.ongoing + 1)
        return replica

    def answered(self, replica: Replica) -> None:
        if (length := self._cache.get(replica.name)) is not None:
            self._cache.update(replica.name, max(length - 1, 0))


class KnownTwo:
    """Ray's rule as it is: the one of two at random whose known queue is shorter."""

    def __init__(self, loop: Loop, chance: random.Random) -> None:
        self._lengths, self._chance = KnownLengths(loop), chance

    def choose(self, call: Call, pool: Pool) -> Replica | None:
        for _ in range(2):
            two = self._chance.sample(pool.names, min(len(pool.names), 2))
            if (replica := self._lengths.take(two, pool)) is not None:
                return replica
        return self._lengths.take(pool.names, pool)

    def answered(self, call: Call) -> None:
        if call.replica is not None:
            self._lengths.answered(call.replica)


class ByPrefix:
    """As ``PrefixRouter``."""

    def __init__(self, loop: Loop, max_blocks: int) -> None:
        self.affinity = Affinity(max_blocks, clock=loop.clock)
        self._lengths = KnownLengths(loop)

    def choose(self, call: Call, pool: Pool) -> Replica | None:
        prefix = call.request.prefix
        assert prefix is not None, "a prompt has its keys"
        queues = {name: self._lengths.of(name) for name in pool.names}
        tiers = self.affinity.order(call.key, queues)
        if not tiers:
            self.affinity.expect(call.key, prefix)
            tiers = self.affinity.order(call.key, queues)
        for tier in tiers:
            if (replica := self._lengths.take(tier, pool)) is not None:
                self.affinity.sent(call.key, replica.name)
                return replica
        return None

    def answered(self, call: Call) -> None:
        if call.replica is not None:
            self._lengths.answered(call.replica)
            self.affinity.found(call.key, call.cached)
        self.affinity.ended(call.key)
