"""The scaling loop against a measured one: a run of ``benchmarks.autoscale`` is played again, with its policies and delays.

Two things are taken from that run: the CPU time of a start, and the cores that it had. Its record does not say what other
programs took, so they are set by the rate of its first requests; all later ones, and every decision, are the simulation's.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingConfig

from serve_app.stage import Stage
from tools.sim.app import App, Shape
from tools.sim.control import Controller
from tools.sim.loop import Loop, SharedCores
from tools.sim.run import quantile
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Kind, Request, request

LOOK_S = 1.0
BISECTIONS = 7


@dataclass(frozen=True)
class Phase:
    """Requests that were asked for in it; times of the first token."""

    kind: str
    from_s: float
    to_s: float
    requests: int
    ttft_p50_s: float
    ttft_p90_s: float


@dataclass(frozen=True)
class Seen:
    phases: list[Phase]
    decided: list[tuple[str, float, int]]
    """Stage, when, and how many replicas it wanted then."""
    changes: dict[str, list[tuple[float, int]]]
    """When the replicas of a stage became how many; first what it began with."""


def measured(document: Mapping[str, Any]) -> Seen:
    decided = zip(document["decisions"], document["decided_at_s"], strict=True)
    return Seen(
        [Phase(**phase) for phase in document["seen"]],
        [(name.lower(), at, after) for (name, _, after), at in decided],
        {stage: [(at, count) for at, count in changes] for stage, changes in document["changes"].items()},
    )


def start_cpu_s(document: Mapping[str, Any]) -> float:
    return mean(start["cpu_s"] for start in document["starts"])


def cores_left(document: Mapping[str, Any], times: ServiceTimes, most: float) -> float:
    """Those with which as many requests are served in the first phase that has any."""
    wanted = measured(document).phases[0].requests
    quiet = next(index for index, (kind, _) in enumerate(document["phases"]) if kind != "quiet")
    first = {**document, "phases": document["phases"][: quiet + 1]}
    least = most / 4
    for _ in range(BISECTIONS):
        middle = (least + most) / 2
        if simulated(first, times, middle).phases[0].requests < wanted:
            least = middle
        else:
            most = middle
    return most


def simulated(document: Mapping[str, Any], times: ServiceTimes, cores: float, seed: int = 1) -> Seen:
    """``cores``: those that are left to the application."""
    loop = Loop()
    times = times.model_copy(update={"start_up_s": dict.fromkeys(Stage, 0.0), "start_up_cpu_s": start_cpu_s(document)})
    app = App(
        loop,
        times,
        Shape(),
        seed,
        SharedCores(loop, cores),
    )
    for pool in app.pools.values():
        pool.scale(1, at_once=True)
    ends = list(itertools.accumulate(seconds for _, seconds in document["phases"]))
    configs = {
        stage: AutoscalingConfig.model_validate(document["deployments"][stage.capitalize()]["autoscaling_config"])
        for stage in Stage
    }
    Controller(loop, app.pools, configs, None).start(ends[-1])

    kinds, chance, asked = kinds_of(document), np.random.default_rng(seed), itertools.count()
    idle = document["workers"]

    def now_asked() -> str:
        index = next((index for index, end in enumerate(ends) if loop.now < end), None)
        return "quiet" if index is None else document["phases"][index][0]

    def ask(ended: Request | None = None) -> None:
        nonlocal idle
        if (kind := now_asked()) == "quiet":
            idle += 1
        else:
            app.arrive(request(next(asked), loop.now, kinds[kind], chance))

    def enter() -> None:
        nonlocal idle
        if now_asked() != "quiet":
            waiting, idle = idle, 0
            for _ in range(waiting):
                ask()

    app.on_end = ask
    for moment in [0.0, *ends[:-1]]:
        loop.at(moment, enter)
    changes: dict[str, list[tuple[float, int]]] = {stage: [] for stage in Stage}
    decided: list[tuple[str, float, int]] = []
    wanted = dict.fromkeys(Stage, 1)

    def look() -> None:
        for stage, pool in app.pools.items():
            if not changes[stage] or changes[stage][-1][1] != len(pool.running):
                changes[stage].append((loop.now, len(pool.running)))
            if pool.target != wanted[stage]:
                wanted[stage] = pool.target
                decided.append((stage, loop.now, pool.target))

    loop.every(LOOK_S, look, ends[-1])
    loop.run(ends[-1])
    phases = [
        phase(kind, start, end, app.ended)
        for (kind, _), start, end in zip(document["phases"], [0.0, *ends[:-1]], ends, strict=True)
    ]
    return Seen([each for each in phases if each.requests], decided, changes)


def kinds_of(document: Mapping[str, Any]) -> dict[str, Kind]:
    images, embeds = document["images"]["per request"], document["images"]["tokens"]
    prompt, answer = document["prompt_tokens"], document["output_tokens"]
    return {
        "text": Kind(0, 0, prompt["text"], answer["text"], scatter=0),
        "image": Kind(images, embeds, prompt["image"] - images * embeds, answer["image"], scatter=0),
    }


def phase(kind: str, start: float, end: float, ended: list[Request]) -> Phase:
    ttft = [each.ttft_s for each in ended if start <= each.at < end and each.ttft_s is not None]
    return Phase(kind, start, end, len(ttft), quantile(ttft, 0.5), quantile(ttft, 0.9))
