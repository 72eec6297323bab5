"""Which replica gets a prompt: the one where the fewest tokens are computed before its first token.

A replica's score is what its prefix cache does not hold of the prompt, which counts double, plus the work under way
there, plus what it was sent lately beyond its share. So a prompt goes where its prefix is while the load there is bounded,
and prompts that share nothing go to whoever has least to do. A prefix with which many prompts begin does not count: each
replica will have it. All of it is counted in tokens.

An ingress replica knows what it sent itself. Others may have sent the beginning of a conversation: all prefer the same
replica for it, by hash, and each learns how far that can be relied on. Pure bookkeeping: the simulation (``tools/sim``)
runs the same.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from serve_app.routing.prefix import BLOCK, LEARNING, Held, Prefix
from serve_app.routing.rules import rendezvous, tiers

WORTH = 2.0
"""A token to compute counts as so many of the work under way. A prompt that waits for its prefix waits alone; one that is
computed elsewhere delays those after it too."""

LONG_QUEUE = 2.0
"""Calls of others count beyond so many, and so many times those at each other replica. The lengths that Ray Serve knows are
seconds old: shorter queues say nothing."""

HEADROOM = 1.25
"""What a replica was sent lately counts against it above so many times the mean of all."""

HALF_LIFE_S = 30.0
"""What was sent counts half after so long."""

STAYS = 0.5
"""The share of a session's prompt that counts as held where the session was last, even if the prompt begins anew."""

COMMON = 4
"""A prefix from which so many times as many prompts have gone on as there are replicas is worth having on each of them."""

MAX_REMEMBERED = 16384
"""Sessions, and ends of prefixes."""


@dataclass
class _Call:
    """A prompt on its way to a replica, or there."""

    prefix: Prefix
    needs: int
    replica: str = ""
    held: int = 0
    """Blocks that the replica is expected to hold."""
    age: int = 0
    guessed: bool = False
    """Whether the replica was preferred for what others may have sent there."""
    missing: float = 0.0
    """Tokens that the replica is expected to compute."""
    cost: float = 0.0
    """Tokens that it counts for while it is under way."""
    told: bool = False
    """Whether the replica has told what it found."""


@dataclass
class _Load:
    busy: float = 0.0
    """Tokens of calls under way."""
    calls: int = 0
    recent: float = 0.0
    """Tokens of all calls that were sent, the older ones less."""


class _Seen(NamedTuple):
    """A replica as a prompt sees it."""

    held: int
    """Blocks that it holds."""
    missing: float
    """Tokens that it is expected to compute."""
    score: float
    near: int
    """The greatest: its home, as all ingress replicas see it."""
    guessed: bool
    """Whether it may have more than it is known to hold, as others send such prompts there."""


class _Home(NamedTuple):
    """The replica that is preferred for a prompt that no replica is known to hold."""

    replica: str
    share: float
    """How much of the prompt counts as held there."""
    guessed: bool


@dataclass
class Affinity:
    """What one ingress replica knows of the replicas of one stage."""

    max_blocks: int
    """Blocks to remember, of all replicas together: 125 bytes each."""
    sequence_tokens: float = 0.0
    """What a call counts for from its first token on: a sequence that is decoded."""
    clock: Callable[[], float] = time.monotonic
    right: float = 0.0
    """The share of the latest expectations that came true."""
    guess: float = 0.5
    """The share of the latest prompts whose beginning others had sent where all prefer it."""
    _held: dict[str, Held] = field(default_factory=dict)
    _loads: dict[str, _Load] = field(default_factory=dict)
    _calls: dict[str, _Call] = field(default_factory=dict)
    _sessions: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _gone_on: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """By block: the prompts that differed from all before it after it."""
    _mean_cost: float = 0.0
    _decayed_at: float = 0.0

    @property
    def blocks(self) -> int:
        """Blocks that are remembered."""
        return sum(map(len, self._held.values()))

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        for known in (self._held, self._loads):
            for gone in known.keys() - replicas:
                del known[gone]

    def expected(self, prefix: Prefix, queues: Mapping[str, int]) -> tuple[int, float]:
        """Tokens of a prompt that are held by the replica which would get it now, and how likely it is that they are."""
        if not queues:
            return 0, 0.0
        seen = self._look(prefix, queues)
        best = min(seen, key=lambda name: seen[name].score)
        held, depth = self._of(best), seen[best].held
        return depth * BLOCK, min(self.right, held.share(held.age(prefix.keys, depth)))

    # ---- a call, from its plan to its end

    def expect(self, call: str, prefix: Prefix, needs: int = 0) -> None:
        """A call will be made. ``needs``: tokens that its replica has to hold, as it gets nothing to compute them from."""
        self._calls[call] = _Call(prefix, needs)
        if deepest := max((held.leading(prefix.keys) for held in self._held.values()), default=0):
            last = prefix.keys[deepest - 1]
            self._gone_on[last] = self._gone_on.pop(last, 0) + 1
            if len(self._gone_on) > MAX_REMEMBERED:
                self._gone_on.popitem(last=False)

    def order(self, call: str, queues: Mapping[str, int]) -> list[list[str]]:
        """The replicas in the order in which a call tries them. Of those in one list the shorter queue decides.

        ``queues``: calls at each replica that Ray Serve knows of, those of other ingress replicas too. From now on the call
        counts for the first. Empty: the call was not announced.
        """
        made = self._calls.get(call)
        if made is None or not queues:
            return []
        self._leave(made)
        seen = self._look(made.prefix, queues, call)
        short = {name: seen[name].held * BLOCK < made.needs for name in queues}
        names = sorted(queues, key=lambda name: (short[name], seen[name].score, -seen[name].near))
        self._go(made, names[0], seen[names[0]].missing, seen[names[0]].guessed)
        return tiers(names, {name: each.score for name, each in seen.items()})

    def sent(self, call: str, replica: str) -> None:
        """Ray Serve has sent a call to a replica: to the first of its order, or to another as that was full."""
        made = self._calls.get(call)
        if made is not None and made.replica != replica:
            self._leave(made)
            self._go(made, replica)

    def began(self, call: str) -> None:
        """A call has its first token, and its sequence is decoded from now on."""
        made = self._calls.get(call)
        if made is not None and made.replica:
            self._load(made.replica).busy += self.sequence_tokens - made.cost
            made.cost = self.sequence_tokens

    def found(self, call: str, cached_tokens: int) -> int:
        """A replica tells how many tokens of a call's prompt it held. Returns how many were expected."""
        made = self._calls.get(call)
        if made is None or made.told or not made.replica:
            return 0
        made.told, expected = True, made.held * BLOCK
        share = min((cached_tokens + BLOCK) / expected, 1.0) if expected else 0.0  # engines have blocks of other sizes
        if expected:
            self.right += LEARNING * ((share == 1.0) - self.right)
            self._of(made.replica).learn(made.age, share)
        if made.guessed:
            self.guess += LEARNING * ((cached_tokens >= expected + BLOCK) - self.guess)
        self._load(made.replica).recent += made.prefix.tokens - cached_tokens - made.missing
        return expected

    def ended(self, call: str) -> None:
        """A call has ended, or failed."""
        made = self._calls.pop(call, None)
        if made is not None and made.replica:
            if not made.told:
                self._of(made.replica).drop(made.prefix.keys[made.held :])
            self._count(made, -1)

    def lost(self, call: str) -> None:
        """A call fails as its replica did not hold what it needed."""
        self.found(call, 0)
        if (made := self._calls.get(call)) is not None and made.replica:
            self._of(made.replica).drop(made.prefix.keys)

    # ---- the rule

    def _look(self, prefix: Prefix, queues: Mapping[str, int], call: str = "") -> dict[str, _Seen]:
        """The replicas as a prompt sees them. ``call`` decides between equal ones for a prompt without a whole block."""
        self._decay()
        loads = {name: self._load(name) for name in queues}
        depths = {name: self._of(name).leading(prefix.keys) for name in queues}
        deepest = max(depths.values())
        near = rendezvous(self._conversation(prefix, deepest) or call, queues)
        common = self._common(prefix, deepest, len(queues))
        home = self._home(prefix, depths, near, common)
        share = HEADROOM * sum(load.recent for load in loads.values()) / len(loads)
        calls = sum(load.calls for load in loads.values())
        each = sum(load.busy for load in loads.values()) / calls if calls else self._mean_cost
        others = {name: max(queues[name] - load.calls, 0) for name, load in loads.items()}
        all_others, rest = sum(others.values()), max(len(others) - 1, 1)
        seen = {}
        for name, load in loads.items():
            own, saved, guessed = prefix.tokens - max(depths[name], common) * BLOCK, 0.0, False
            if home is not None and home.replica == name:
                saved, guessed = own * home.share, home.guessed
            long = LONG_QUEUE * (1 + (all_others - others[name]) / rest)
            work = load.busy + max(others[name] - long, 0.0) * each
            score = WORTH * (own - saved) + work + max(load.recent - share, 0.0)
            missing = prefix.tokens - depths[name] * BLOCK - saved * guessed
            seen[name] = _Seen(depths[name], missing, score, near[name], guessed)
        return seen

    def _common(self, prefix: Prefix, deepest: int, replicas: int) -> int:
        """The first blocks of a prompt that are worth having on every replica, as many prompts begin with them."""
        often = deepest and self._gone_on.get(prefix.keys[deepest - 1], 0) >= COMMON * replicas
        return deepest if often else 0

    def _home(self, prefix: Prefix, depths: Mapping[str, int], near: Mapping[str, int], common: int) -> _Home | None:
        """None: one replica is known to hold the most of the prompt, or it has not one whole block."""
        last = self._sessions.get(prefix.session, "")
        if last in depths:
            return _Home(last, STAYS, guessed=False)
        deepest = max(depths.values())
        begun_here = deepest > common and list(depths.values()).count(deepest) == 1
        if not prefix.session and (begun_here or not prefix.keys):
            return None
        return _Home(max(near, key=near.__getitem__), self.guess, guessed=True)

    @staticmethod
    def _conversation(prefix: Prefix, deepest: int) -> str:
        """What all ingress replicas call a conversation: its session, or its first block that nobody holds. Many
        conversations share what goes before."""
        if prefix.session or not prefix.keys:
            return prefix.session
        return str(prefix.keys[min(deepest, len(prefix.keys) - 1)])

    # ---- counting

    def _go(self, made: _Call, replica: str, missing: float | None = None, guessed: bool = False) -> None:
        held, keys = self._of(replica), made.prefix.keys
        made.replica, made.guessed, made.held = replica, guessed, held.leading(keys)
        made.age = held.age(keys, made.held)
        held.use(keys, self.max_blocks // len(self._held))
        made.missing = made.prefix.tokens - made.held * BLOCK if missing is None else missing
        made.cost = max(made.missing, 1) + self.sequence_tokens
        self._mean_cost += LEARNING * (made.cost - self._mean_cost) if self._mean_cost else made.cost
        self._count(made, 1)
        self._load(replica).recent += made.cost
        if made.prefix.session:
            self._sessions[made.prefix.session] = replica
            self._sessions.move_to_end(made.prefix.session)
            if len(self._sessions) > MAX_REMEMBERED:
                self._sessions.popitem(last=False)

    def _leave(self, made: _Call) -> None:
        if made.replica:
            self._of(made.replica).drop(made.prefix.keys[made.held :])
            self._load(made.replica).recent -= made.cost
            self._count(made, -1)
            made.replica = ""

    def _count(self, made: _Call, by: int) -> None:
        load = self._load(made.replica)
        load.calls += by
        load.busy += by * made.cost

    def _decay(self) -> None:
        now = self.clock()
        factor = 0.5 ** ((now - self._decayed_at) / HALF_LIFE_S)
        self._decayed_at = now
        for load in self._loads.values():
            load.recent *= factor

    def _of(self, replica: str) -> Held:
        return self._held.setdefault(replica, Held())

    def _load(self, replica: str) -> _Load:
        return self._loads.setdefault(replica, _Load())
