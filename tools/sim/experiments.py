"""The experiments: traffic, strategies and shapes, and processes that play them.

Not in ``__main__``, which a spawned process cannot import.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from multiprocessing import get_context
from typing import Any

from ray.serve.config import AutoscalingConfig

from serve_app.stage import Stage
from tools.sim import traffic as traffics
from tools.sim.app import NO_LIMIT, UNBOUND, Shape
from tools.sim.prefix import STRATEGIES as BY_PREFIX
from tools.sim.prefix import cases, prefix
from tools.sim.run import SLO, Result, Strategy, simulate
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Kind, Traffic

VIDEO = Kind(images=1, embeds=24_000, text_tokens=500, output_tokens=600)
TEXT = Kind(text_tokens=4_000, output_tokens=1_000)
IMAGES = Kind(images=4, embeds=2_700, text_tokens=500, output_tokens=300)

SLOS = {
    "routing": SLO(5.0, 0.05),
    "scale": SLO(5.0, 0.05),
    "burst": SLO(3.0, 0.05),
    "day": SLO(3.0, 0.05),
    "prefix": SLO(2.0, 0.05),
}
CARDS = 12
FULL = 0.7
"""Share of what its cards could do that a stage is loaded with."""
PLAIN_TARGET, TUNED_TARGET = 2.0, 1.0
"""Calls per encoder or prefill replica that plain autoscaling aims at: Ray's default, and the best of 1, 2 and 4 here."""
SIGNALS = {"metrics_interval_s": 2.0, "look_back_period_s": 10.0, "upscale_delay_s": 0.0}
"""Of all that scale: both rules do better with them than with Ray's defaults."""
GIVEN_UP_S, PLAIN_GIVEN_UP_S, SOON_S = 120.0, 300.0, 60.0
"""``downscale_delay_s``: what is best for each rule of 60, 120 and 300. A replica that is missed then takes a start-up."""


@dataclass(frozen=True)
class Job:
    """One simulation of an experiment."""

    experiment: str
    size: int
    """Replicas per stage, or cards together."""
    strategy: str
    seed: int
    quick: bool = False
    traffic: str = ""
    """Of an experiment with several."""


def counts(encoder: int, prefill: int, decode: int) -> dict[Stage, int]:
    return {Stage.ENCODER: encoder, Stage.PREFILL: prefill, Stage.DECODE: decode}


def alone(times: ServiceTimes, kind: Kind) -> dict[Stage, float]:
    return times.alone([kind.embeds] * kind.images, kind.text_tokens, kind.output_tokens)


def split(need: Mapping[Stage, float], cards: int) -> dict[Stage, int]:
    """Cards in proportion to need, at least one for each stage, all of them given."""
    given = dict.fromkeys(need, 1)
    for _ in range(cards - len(given)):
        given[max(given, key=lambda stage: need[stage] / given[stage])] += 1
    return given


def both(one: Mapping[Stage, float], share: float, other: Mapping[Stage, float]) -> dict[Stage, float]:
    return {stage: (1 - share) * one[stage] + share * other[stage] for stage in one}


def by_work(most: int, encoders: int = 1, given_up_s: float = GIVEN_UP_S) -> dict[Stage, AutoscalingConfig]:
    """Production's policies with their defaults."""

    def scaled(policy: str, least: int) -> AutoscalingConfig:
        named = {"policy_function": f"serve_app.scaling.policies:{policy}"}
        return AutoscalingConfig(
            min_replicas=least, max_replicas=most, policy=named, downscale_delay_s=given_up_s, **SIGNALS
        )

    return {
        Stage.ENCODER: scaled("WorkPolicy", encoders),
        Stage.PREFILL: scaled("WorkPolicy", 1),
        Stage.DECODE: scaled("DecodePolicy", 1),
    }


def by_requests(
    most: int, running: float, encoders: int = 1, target: float = PLAIN_TARGET
) -> dict[Stage, AutoscalingConfig]:
    """Ray's own policy; ``running``: sequences per decode replica, set by hand for the traffic."""

    def scaled(target: float, least: int) -> AutoscalingConfig:
        return AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=target,
            downscale_delay_s=PLAIN_GIVEN_UP_S,
            **SIGNALS,
        )

    return {
        Stage.ENCODER: scaled(target, encoders),
        Stage.PREFILL: scaled(target, 1),
        Stage.DECODE: scaled(running, 1),
    }


def fitting(times: ServiceTimes, kind: Kind) -> float:
    """Sequences that a decode replica should run: a quarter of those that its slots and its KV cache hold.

    Fewer sequences are decoded faster, so those that are there when there are many replicas say too little of how many
    replicas are needed.
    """
    held = kind.text_tokens + kind.images * kind.embeds + kind.output_tokens / 2
    return max(0.25 * min(times.slots, times.kv_tokens / held), 1.0)


# ---- the experiments

OURS, HASTY = "by work (ours)", "by work, given up after 60 s"
RAYS, TUNED = "by requests (Ray's)", "by requests, target of 1"


def routing(job: Job, times: ServiceTimes) -> tuple[Traffic, Strategy, Shape, float]:
    """Fixed replicas, 70 % busy: does the way of a request scale? Encoders by production's rule and by Ray's."""
    rate = FULL * job.size / max(alone(times, VIDEO).values())
    seconds = 30.0 if job.quick or job.size >= 1000 else 120.0
    shape = Shape(ingresses=ceil(job.size / 2), two_choices_for_encoders=job.strategy == "two choices")
    if job.strategy == "rank, few ingress replicas":
        shape = replace(shape, ingresses=ceil(job.size / 8), admission=UNBOUND, encode=NO_LIMIT)
    strategy = Strategy(job.strategy, dict.fromkeys(Stage, job.size))
    return traffics.steady("routing", rate, seconds, VIDEO), strategy, shape, 15.0


def scale(job: Job, times: ServiceTimes) -> tuple[Traffic, Strategy, Shape, float]:
    """Load doubles within 100 seconds, to 70 % of what ``size`` replicas per stage can do."""
    need = alone(times, VIDEO)
    seconds, top = (120.0 if job.quick else 240.0), FULL * job.size / max(need.values())

    def rate(now: float) -> float:
        return top * (0.5 + 0.5 * min(max((now - seconds / 4) / 100.0, 0.0), 1.0))

    traffic = Traffic("scale", seconds, rate, top, (VIDEO,))
    cards, few, running = 3 * job.size, ceil(0.6 * job.size), fitting(times, VIDEO)
    strategy = {
        "static, equal": Strategy("", dict.fromkeys(Stage, job.size)),
        "static, split for this traffic": Strategy("", split(need, cards)),
        "static, split for text": Strategy("", split(both(alone(times, TEXT), 0.1, need), cards)),
        OURS: Strategy("", dict.fromkeys(Stage, few), by_work(cards), float(cards)),
        RAYS: Strategy("", dict.fromkeys(Stage, few), by_requests(cards, running)),
        TUNED: Strategy("", dict.fromkeys(Stage, few), by_requests(cards, running, target=TUNED_TARGET)),
    }[job.strategy]
    return traffic, strategy, Shape(ingresses=ceil(job.size / 2), cards=cards, two_choices_for_encoders=True), 0.0


def burst(job: Job, times: ServiceTimes) -> tuple[Traffic, Strategy, Shape, float]:
    """Text that keeps a third of the cards busy; for five minutes, images that need as much again.

    They come when everybody has had time to give up what text does not need, and not at the very moment of it.
    """
    text, images = alone(times, TEXT), alone(times, IMAGES)
    share = job.size / 3
    begins, ends, seconds = (100.0, 200.0, 300.0) if job.quick else (420.0, 720.0, 1020.0)
    rates = share / sum(text.values()), share / sum(images.values())
    traffic = traffics.burst(*rates, (TEXT, IMAGES), begins, ends, seconds)
    mixed = {stage: rates[0] * text[stage] + rates[1] * images[stage] for stage in text}
    return traffic, mixed_strategy(job, times, text, mixed, TEXT), Shape(ingresses=4, cards=job.size), 30.0


def day(job: Job, times: ServiceTimes) -> tuple[Traffic, Strategy, Shape, float]:
    """A day within 30 minutes; no images in its first and last quarter."""
    text, images = alone(times, TEXT), alone(times, IMAGES)
    mixed = both(text, 0.6, images)
    traffic = traffics.day(FULL * job.size / sum(mixed.values()), (TEXT, IMAGES), 300.0 if job.quick else 1800.0)
    strategy = mixed_strategy(job, times, text, mixed, TEXT, encoders=0)
    return traffic, strategy, Shape(ingresses=4, cards=job.size), 0.0


def mixed_strategy(
    job: Job,
    times: ServiceTimes,
    text: Mapping[Stage, float],
    mixed: Mapping[Stage, float],
    kind: Kind,
    encoders: int = 1,
) -> Strategy:
    cards, running = job.size, fitting(times, kind)
    start = split(text, cards) if encoders else counts(0, cards // 4, cards // 4)
    return {
        "static, equal": Strategy("", dict.fromkeys(Stage, cards // 3)),
        "static, split for the images": Strategy("", split(mixed, cards)),
        "static, split for text": Strategy("", split(text, cards)),
        OURS: Strategy("", start, by_work(cards, encoders), float(cards)),
        HASTY: Strategy("", start, by_work(cards, encoders, SOON_S), float(cards)),
        RAYS: Strategy("", start, by_requests(cards, running, encoders)),
        TUNED: Strategy("", start, by_requests(cards, running, encoders, TUNED_TARGET)),
    }[job.strategy]


def prefixes(job: Job, times: ServiceTimes) -> tuple[Traffic, Strategy, Shape, float]:
    """Prompts that begin as others did. Prefill by production's rule and by Ray's."""
    return prefix(job.size, job.strategy, job.traffic, job.quick, times)


EXPERIMENTS = {"routing": routing, "scale": scale, "burst": burst, "day": day, "prefix": prefixes}
STATIC = ("static, equal", "static, split for text")
SCALED = (OURS, RAYS, TUNED)
OVER_TIME = (OURS, RAYS)
"""Plots show these over time: those of seed 0, of a burst and a day."""
STRATEGIES = {
    "routing": ("rank", "rank, few ingress replicas", "two choices"),
    "scale": (*STATIC, "static, split for this traffic", *SCALED),
    "burst": (*STATIC, "static, split for the images", *SCALED, HASTY),
    "day": (*STATIC, "static, split for the images", *SCALED, HASTY),
    "prefix": BY_PREFIX,
}


def jobs(quick: bool, full: bool) -> Iterator[Job]:
    sizes = {
        "burst": [CARDS],
        "day": [CARDS],
        "scale": [10, 1] if quick else [1000, 300, 100, 10, 1] if full else [100, 10, 1],
        "routing": [10, 1] if quick else [1000, 100, 10, 1],
    }
    for experiment, of_it in sizes.items():
        for size in of_it:
            for strategy in STRATEGIES[experiment]:
                for seed in range(1 if quick or size >= 300 else 3):
                    yield Job(experiment, size, strategy, seed, quick)
    for size, strategy, traffic in cases(quick):
        for seed in range(1 if quick or size >= 100 else 2 if size < 10 or full else 1):
            yield Job("prefix", size, strategy, seed, quick, traffic)


def do(job: Job, times: ServiceTimes) -> tuple[Job, Result, float]:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    began = time.process_time()
    traffic, strategy, shape, warm_s = EXPERIMENTS[job.experiment](job, times)
    result = simulate(times, traffic, strategy, shape, SLOS[job.experiment], job.seed, warm_s)
    return job, result, time.process_time() - began


def row_of(job: Job, result: Result, cpu_s: float) -> dict[str, Any]:
    """What is written of a simulation: of most without its timeline."""
    row = asdict(job) | asdict(result) | {"cpu_s": round(cpu_s, 1)}
    if job.seed or job.experiment not in ("burst", "day") or job.strategy not in OVER_TIME:
        del row["timeline"]
    return row


def run_all(todo: list[Job], processes: int, times: ServiceTimes) -> list[dict[str, Any]]:
    rows = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job, result, cpu_s in pool.map(partial(do, times=times), todo):
            rows.append(row_of(job, result, cpu_s))
            print(
                f"{job.experiment:8} {job.size:5} {job.strategy:33} seed {job.seed}: good {result.good:.1%}, "
                f"TTFT p99 {result.ttft_p99_s:.2f} s, {result.gpu_s_per_good:.2f} GPU-s per good one ({cpu_s:.0f} s)",
                flush=True,
            )
    return rows
