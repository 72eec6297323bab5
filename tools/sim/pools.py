"""The replicas of a stage: which of them gets a call, and how they come and go.

Encoders are chosen by production's ``rank`` and ``tiers`` over production's ``Loads``, one per ingress replica, as
``LeastCostRouter`` does; ``TwoChoices`` is Ray Serve's own rule (``PowerOfTwoChoicesRequestRouter``), for the other stages
and to compare.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

from serve_app.routing import rules
from serve_app.stage import Stage
from tools.sim.loop import Action, Loop
from tools.sim.replicas import Call, Replica


class Router(Protocol):
    def choose(self, call: Call, pool: "Pool") -> Replica | None:
        """A running replica that takes one more call; None: none does."""

    def answered(self, call: Call) -> None: ...


class TwoChoices:
    """The one with fewer calls of two at random. It sees the true counts; Ray's may be seconds old."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def choose(self, call: Call, pool: "Pool") -> Replica | None:
        running = pool.running
        for _ in range(2):
            if len(running) > 2:
                first = int(self._chance.random() * len(running))
                second = int(self._chance.random() * (len(running) - 1))
                two = [running[first], running[second + (second >= first)]]
            else:
                two = self._chance.sample(running, len(running))
            open_ = [replica for replica in two if replica.ongoing < pool.max_ongoing]
            if open_:
                return min(open_, key=lambda replica: replica.ongoing)
        return next((replica for replica in running if replica.ongoing < pool.max_ongoing), None)

    def answered(self, call: Call) -> None:
        pass


class LeastCost:
    """Production's choice of an encoder, as one ingress replica makes it from the calls that it knows of: its own."""

    def __init__(self, loop: Loop, headroom: float) -> None:
        self._loop, self._headroom = loop, headroom
        self._loads = rules.Loads()

    def choose(self, call: Call, pool: "Pool") -> Replica | None:
        if not pool.running:
            return None
        now = self._loop.now
        loads = self._loads.of(pool.names, now)
        for tier in rules.tiers(rules.rank(call.key, call.work, loads, self._headroom), loads):
            open_ = [name for name in tier if pool.by_name[name].ongoing < pool.max_ongoing]
            if open_:
                name = min(open_, key=lambda name: pool.by_name[name].ongoing)
                self._loads.chosen(call.key, name, call.work, now)
                self._loads.sent(call.key, name)
                return pool.by_name[name]
        return None

    def answered(self, call: Call) -> None:
        self._loads.answered(call.key)


class Cards:
    """The GPUs of the cluster. Replicas that find none wait for one."""

    def __init__(self, total: float = float("inf")) -> None:
        self.total = self.free = total
        self._waiting: deque[tuple[float, Callable[[], bool]]] = deque()

    def ask(self, gpus: float, start: Callable[[], bool]) -> None:
        """``start`` is called when they are there; it returns whether it still wants them."""
        self._waiting.append((gpus, start))
        self._serve()

    def give_back(self, gpus: float) -> None:
        self.free += gpus
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free + 1e-9:
            gpus, start = self._waiting.popleft()
            self.free -= gpus
            if not start():
                self.free += gpus


class Pool:
    """One stage. A call that finds no replica waits at the handle, first come first served."""

    def __init__(
        self,
        stage: Stage,
        loop: Loop,
        make: Callable[[str], Replica],
        start_up_s: float,
        max_ongoing: int,
        max_queued: int,
        cards: Cards,
        gpus: float = 1.0,
        lease_s: float = 0.0,
        start_work: Callable[[Action], None] = lambda done: done(),
    ) -> None:
        self.stage, self.max_ongoing, self.max_queued, self.gpus = stage, max_ongoing, max_queued, gpus
        self.target = 0
        self.running: list[Replica] = []
        self.names: list[str] = []
        self.by_name: dict[str, Replica] = {}
        self.waiting: deque[tuple[Call, Router]] = deque()
        self.draining: set[Replica] = set()
        self._loop, self._make, self._start_up_s, self._lease_s = loop, make, start_up_s, lease_s
        self._start_work = start_work
        self._cards = cards
        self._starting: list[dict[str, bool]] = []
        self._made = 0
        self._holding = 0.0
        self._gpu_seconds = 0.0
        self._seen_at = 0.0

    # ---- calls

    def call(self, call: Call, router: Router) -> bool:
        """False: the queue is full, and the call is refused."""
        call.asked_at = self._loop.now
        if self.waiting or not self._send(call, router):
            if len(self.waiting) >= self.max_queued:
                return False
            self.waiting.append((call, router))
        return True

    def forget(self, call: Call) -> None:
        """The caller waits no longer. What a replica has begun it finishes."""
        for entry in self.waiting:
            if entry[0] is call:
                self.waiting.remove(entry)
                return

    def _send(self, call: Call, router: Router) -> bool:
        replica = router.choose(call, self)
        if replica is None:
            return False
        replica.take(call)
        return True

    def _send_waiting(self) -> None:
        while self.waiting and self._send(*self.waiting[0]):
            self.waiting.popleft()

    @property
    def ongoing(self) -> int:
        """Calls under way and waiting, those included that draining replicas still have."""
        return sum(r.ongoing for r in self.running) + sum(r.ongoing for r in self.draining) + len(self.waiting)

    # ---- replicas

    def scale(self, target: int, at_once: bool = False) -> None:
        """Start or drain replicas. ``at_once``: they were there before the simulation began."""
        self.target = target
        while len(self.running) + len(self._starting) < target:
            self._start(at_once)
        while len(self.running) + len(self._starting) > target:
            if self._starting:  # Ray stops those first that do not run yet
                self._starting.pop()["wanted"] = False
            else:
                self._drain(self.running[-1])

    def _start(self, at_once: bool) -> None:
        state = {"wanted": True}
        self._starting.append(state)

        def has_cards() -> bool:
            if state["wanted"]:
                self._hold(self.gpus)
                if not at_once:
                    self._loop.after(self._start_up_s, lambda: self._start_work(is_up))
                else:
                    is_up()
            return state["wanted"]

        def is_up() -> None:
            if not state["wanted"]:
                self._release()
                return
            self._starting.remove(state)
            self._made += 1
            replica = self._make(f"{self.stage}-{self._made}")
            replica.ended = lambda: self._ended(replica)
            self.running.append(replica)
            self._renamed()
            self._send_waiting()

        self._cards.ask(self.gpus, has_cards)

    def _drain(self, replica: Replica) -> None:
        self.running.remove(replica)
        self._renamed()
        self.draining.add(replica)
        # Embeddings that were answered may still be pulled within their lease.
        replica.leased_until = self._loop.now + self._lease_s
        self._loop.at(replica.leased_until, lambda: self._ended(replica))

    def _ended(self, replica: Replica) -> None:
        if replica in self.draining:
            if not replica.ongoing and not replica.held and self._loop.now >= replica.leased_until:
                self.draining.discard(replica)
                self._release()
        elif self.waiting:
            self._send_waiting()

    def _renamed(self) -> None:
        self.by_name = {replica.name: replica for replica in self.running}
        self.names = list(self.by_name)

    def pulled(self, replica: Replica) -> None:
        """What a replica held for another has been pulled."""
        replica.held -= 1
        self._ended(replica)

    # ---- cards

    def _hold(self, gpus: float) -> None:
        self.gpu_seconds  # noqa: B018
        self._holding += gpus

    def _release(self) -> None:
        self._hold(-self.gpus)
        self._cards.give_back(self.gpus)

    def _count(self) -> None:
        self._gpu_seconds += self._holding * (self._loop.now - self._seen_at)
        self._seen_at = self._loop.now

    @property
    def gpu_seconds(self) -> float:
        """Card-seconds that its replicas have had up to now: starting, running and draining."""
        self._count()
        return self._gpu_seconds
