"""One simulation: traffic, service times and a strategy in; what clients saw and what it cost out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingConfig

from serve_app.stage import Stage
from tools.sim.app import App, Shape
from tools.sim.control import Controller
from tools.sim.loop import Loop, SharedCores
from tools.sim.pools import Pool
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Request, Traffic

SAMPLE_S = 5.0


@dataclass(frozen=True)
class Strategy:
    """How many replicas: those of ``start`` for good, or from there on as policies decide."""

    name: str
    start: Mapping[Stage, int]
    scaling: Mapping[Stage, AutoscalingConfig] = field(default_factory=dict)
    gpus: float | None = None
    """Budget of the application's policy; None: stages decide alone."""


@dataclass(frozen=True)
class SLO:
    ttft_s: float
    tpot_s: float

    def met(self, request: Request) -> bool:
        return not self.late(request) and request.tpot_s <= self.tpot_s

    def late(self, request: Request) -> bool:
        """Failed, or too late with its first token."""
        return request.outcome != "ok" or request.ttft_s is None or request.ttft_s > self.ttft_s


@dataclass(frozen=True)
class Result:
    requests: int
    good: float
    """Share of requests that ended well within the SLO."""
    failed: float
    goodput_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    gpu_s_per_request: float
    gpu_s_per_good: float
    at_prefill: float
    """Share of items that prefill encoded."""
    cached: float
    """Share of prompt tokens that prefill had in its cache."""
    most_work: float
    """Tokens that the prefill replica with the most computed, in means of all."""
    late: float
    """Share of requests that failed, or had their first token too late."""
    waits_s: dict[Stage, float]
    """Of each stage with replicas: how long its calls waited until their work began, on average."""
    outcomes: dict[str, int]
    timeline: dict[str, list[float]]


def simulate(
    times: ServiceTimes,
    traffic: Traffic,
    strategy: Strategy,
    shape: Shape,
    slo: SLO,
    seed: int,
    warm_s: float = 0.0,
    shared_cores: float | None = None,
) -> Result:
    """``warm_s``: requests that come before are served and not counted, nor is what replicas cost until then."""
    loop = Loop()
    app = App(loop, times, shape, seed, SharedCores(loop, shared_cores) if shared_cores else None)
    for stage, count in strategy.start.items():
        app.pools[stage].scale(count, at_once=True)
    Controller(loop, app.pools, strategy.scaling, strategy.gpus).start(traffic.seconds)
    app.on_end = partial(go_on, app, traffic)
    app.play(traffic.requests(seed))
    timeline: dict[str, list[float]] = {"at_s": [], "per_s": []}
    loop.every(SAMPLE_S, lambda: sample(app, traffic, timeline), traffic.seconds)

    spent = dict.fromkeys((warm_s, traffic.seconds), 0.0)
    for moment in spent:
        loop.at(moment, lambda moment=moment: spent.update({moment: gpu_seconds(app)}))
    loop.run()
    counted = [request for request in app.ended if request.at >= warm_s]
    gpu_s = spent[traffic.seconds] - (spent[warm_s] if warm_s else 0.0)
    return summary(counted, gpu_s, traffic.seconds - warm_s, slo, timeline, app)


def go_on(app: App, traffic: Traffic, ended: Request) -> None:
    """The client asks again."""
    if (following := traffic.then(ended, app.loop.now)) is not None:
        app.loop.at(following.at, partial(app.arrive, following))


def gpu_seconds(app: App) -> float:
    return sum(pool.gpu_seconds for pool in app.pools.values())


def sample(app: App, traffic: Traffic, timeline: dict[str, list[float]]) -> None:
    timeline["at_s"].append(app.loop.now)
    timeline["per_s"].append(traffic.rate(app.loop.now))
    for stage, pool in app.pools.items():
        timeline.setdefault(stage, []).append(len(pool.running))


def summary(
    requests: Sequence[Request],
    gpu_s: float,
    seconds: float,
    slo: SLO,
    timeline: dict[str, list[float]],
    app: App,
) -> Result:
    prefills = len(app.pools[Stage.PREFILL].running) if Stage.PREFILL in app.pools else 0
    good = sum(slo.met(request) for request in requests)
    served = [request for request in requests if request.outcome == "ok"]
    ttft = [request.ttft_s for request in served if request.ttft_s is not None]
    tpot = [request.tpot_s for request in served]
    items = sum(len(request.embeds) for request in requests)
    outcomes: dict[str, int] = {}
    for request in requests:
        outcomes[str(request.outcome)] = outcomes.get(str(request.outcome), 0) + 1
    return Result(
        requests=len(requests),
        good=good / max(len(requests), 1),
        failed=1 - len(served) / max(len(requests), 1),
        goodput_per_s=good / seconds,
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p99_s=quantile(ttft, 0.99),
        tpot_p99_s=quantile(tpot, 0.99),
        gpu_s_per_request=gpu_s / max(len(requests), 1),
        gpu_s_per_good=gpu_s / max(good, 1),
        at_prefill=sum(request.at_prefill for request in requests) / max(items, 1),
        cached=sum(request.cached_tokens for request in served) / max(sum(r.prompt_tokens for r in served), 1),
        most_work=most_work(served, max(prefills, 1)),
        late=sum(slo.late(request) for request in requests) / max(len(requests), 1),
        waits_s={stage: wait_s(pool) for stage, pool in app.pools.items() if pool.running},
        outcomes=outcomes,
        timeline=timeline,
    )


def wait_s(pool: Pool) -> float:
    begun = sum(replica.begun for replica in pool.running)
    return sum(replica.waited_s for replica in pool.running) / max(begun, 1)


def most_work(served: Sequence[Request], replicas: int) -> float:
    computed: dict[str, int] = {}
    for request in served:
        own = request.prompt_tokens - request.cached_tokens
        computed[request.prefilled_by] = computed.get(request.prefilled_by, 0) + own
    return max(computed.values()) * replicas / sum(computed.values()) if computed else float("nan")


def quantile(values: Sequence[Any], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")
