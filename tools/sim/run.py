"""One simulation: traffic, service times and a strategy in; what clients saw and what it cost out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingConfig

from serve_app.stage import Stage
from tools.sim.app import App, Shape
from tools.sim.control import Controller
from tools.sim.loop import Loop, SharedCores
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
        return (
            request.outcome == "ok"
            and request.ttft_s is not None
            and request.ttft_s <= self.ttft_s
            and request.tpot_s <= self.tpot_s
        )


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
    app.play(traffic.requests(seed))
    timeline: dict[str, list[float]] = {"at_s": [], "per_s": []}
    loop.every(SAMPLE_S, lambda: sample(app, traffic, timeline), traffic.seconds)

    spent = dict.fromkeys((warm_s, traffic.seconds), 0.0)
    for moment in spent:
        loop.at(moment, lambda moment=moment: spent.update({moment: gpu_seconds(app)}))
    loop.run()
    counted = [request for request in app.ended if request.at >= warm_s]
    gpu_s = spent[traffic.seconds] - (spent[warm_s] if warm_s else 0.0)
    return summary(counted, gpu_s, traffic.seconds - warm_s, slo, timeline)


def gpu_seconds(app: App) -> float:
    return sum(pool.gpu_seconds for pool in app.pools.values())


def sample(app: App, traffic: Traffic, timeline: dict[str, list[float]]) -> None:
    timeline["at_s"].append(app.loop.now)
    timeline["per_s"].append(traffic.rate(app.loop.now))
    for stage, pool in app.pools.items():
        timeline.setdefault(stage, []).append(len(pool.running))


def summary(
    requests: Sequence[Request], gpu_s: float, seconds: float, slo: SLO, timeline: dict[str, list[float]]
) -> Result:
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
        outcomes=outcomes,
        timeline=timeline,
    )


def quantile(values: Sequence[Any], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")
