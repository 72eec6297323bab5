"""How many replicas a stage needs, from the work that waits for it. Pure arithmetic: no Ray, no clock.

There is a gap between two limits, so that the number of replicas does not go up and down with every wave:

- It grows if new work would wait longer than ``target_queue_s``, to as many as would do all of it by then.
- It shrinks only if those that stay could carry the present work at ``max_utilization``, and have room for what waits.

``share`` decides which stage gets the next GPU when they are short. ``scaling.policies`` brings these rules to Ray Serve.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf

from pydantic import BaseModel, ConfigDict, Field

UP_MARGIN = 0.1
"""A wish for more replicas has to exceed their number by this share."""

KEEP_MARGIN = 0.1
"""A stage gives a GPU to another only if that one waits longer by this share."""


class Targets(BaseModel):
    """What a stage is scaled for: ``policy_kwargs`` of its policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_queue_s: float = Field(1.0, gt=0, description="Longest time that new work should wait in this stage.")
    max_utilization: float = Field(
        0.5, gt=0, le=1, description="Share of their rate that fewer replicas may be used at, before one goes."
    )


class DecodeTargets(Targets):
    max_utilization: float = Field(0.7, gt=0, le=1, description="The same share, of ``target_running``.")
    target_running: float | None = Field(
        None, gt=0, description="Sequences that a replica runs at a time. None: a quarter of those that its engine can."
    )
    target_kv_use: float = Field(0.8, gt=0, le=1, description="Share of its KV cache that a replica uses.")


FULL_SLOTS = 0.25
"""Share of an engine's slots that stands for ``target_running``. Not all: few sequences on each of many replicas are decoded
faster, so that their number is lower than it would be on fewer replicas."""

KEEP_REQUESTS = 0.7
"""Share of their target that fewer ingress replicas may have under way, before one goes."""


@dataclass(frozen=True)
class Load:
    """What a stage has to do. Work is in the unit of the stage; see ``stages.workload``."""

    outstanding: float
    """Work of the calls that replicas have."""
    calls: float
    """Calls that replicas have."""
    queued_calls: float
    """Calls that wait at the ingress for a replica."""
    mean_work: float
    """Work of a call."""
    carried: float
    """Work per second of all replicas together."""
    rate: float | None
    """Work per second that one replica can do; None until it is measured."""

    @property
    def work(self) -> float:
        return self.outstanding + self.queued_calls * self.mean_work


@dataclass(frozen=True)
class DecodeLoad(Load):
    slots: float = 0.0
    """Sequences that one replica can run at a time; 0: not known."""
    kv_use: float = 0.0
    """Shares of KV caches in use, summed over the replicas."""


def replicas_for_work(load: Load, current: int, targets: Targets) -> float | None:
    """Replicas of an encoder or prefill stage, not rounded; None if no rate is known."""
    if load.rate is None:
        return None
    # A call is on one replica: more replicas than calls would not help.
    queue = min(load.work / (load.rate * targets.target_queue_s), load.calls + load.queued_calls)
    carry = load.carried / (load.rate * targets.max_utilization)
    return steady(current, queue, max(carry, queue / targets.max_utilization))


def replicas_for_sequences(load: DecodeLoad, current: int, targets: DecodeTargets) -> float | None:
    """Replicas of a decode stage, not rounded; None if no batch size is known. What exceeds a replica's batch waits."""
    full = targets.target_running or FULL_SLOTS * load.slots
    if not full:
        return None
    sequences = load.calls + load.queued_calls
    needed = max(sequences / full, load.kv_use / targets.target_kv_use)
    waiting = load.queued_calls + max(load.calls - current * load.slots, 0.0) if load.slots else load.queued_calls
    if waiting and load.rate is not None:
        needed = max(needed, min(current + waiting / (load.rate * targets.target_queue_s), sequences))
    return steady(current, needed, needed / targets.max_utilization)


def replicas_for_requests(requests: float, current: int, target: float) -> float:
    """Replicas of the ingress, not rounded, if each is to have ``target`` requests under way."""
    needed = requests / target
    return steady(current, needed, needed / KEEP_REQUESTS)


def steady(current: int, more: float, keep: float) -> float:
    """``more`` if that is clearly above ``current``, ``keep`` if that is at least one below, else ``current``."""
    if more > current * (1 + UP_MARGIN):
        return more
    if ceil(keep) < current:
        return keep
    return float(current)


@dataclass(frozen=True)
class Wish:
    """What a stage asks for."""

    replicas: float
    """Not rounded. Divided by the replicas that it has, it is the queueing time divided by its target."""
    current: int
    minimum: int
    gpus: float
    """GPUs of one replica."""


def share(wishes: Mapping[str, Wish], gpus: float) -> dict[str, int]:
    """Replicas by stage, for wishes that may need more GPUs than there are.

    Every stage gets its minimum, and no other gets more than it wishes for. Each next GPU goes to the stage that would wait
    longest by its own measure, which keeps replicas in the proportion of the wishes. A stage keeps what it has unless
    another waits clearly longer.
    """
    given = {name: wish.minimum for name, wish in wishes.items()}
    left = gpus - sum(wishes[name].gpus * count for name, count in given.items())

    def wait(name: str) -> float:
        wish, count = wishes[name], given[name]
        waits = wish.replicas / count if count else inf
        return waits * (1 + KEEP_MARGIN) if count < wish.current else waits

    while True:
        open_wishes = [
            name
            for name, wish in wishes.items()
            if given[name] < ceil(wish.replicas) and (not wish.gpus or wish.gpus <= left + 1e-6)
        ]
        if not open_wishes:
            return given
        name = max(open_wishes, key=wait)
        given[name] += 1
        left -= wishes[name].gpus
