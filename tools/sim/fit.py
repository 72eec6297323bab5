"""Service times from measured runs, and the error of the simulation on runs that they were not fitted on."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import log
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.optimize import nnls

from serve_app.stage import Stage
from tools.sim.app import App, Shape
from tools.sim.loop import Loop, SharedCores
from tools.sim.run import quantile
from tools.sim.service import ServiceTimes, Topology
from tools.sim.traffic import Kind, Request, request

BATCH_TOKENS, SLOTS, KV_TOKENS = 2048, 64, 65_536
"""Of the engines that were measured."""


PULL_STEPS = (1, 2, 4)


class Group(StrEnum):
    """Processes by whom they work for."""

    INGRESS = "ingress"
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODER_REPLICA = "encoder replica"
    PREFILL_REPLICA = "prefill replica"
    DECODE_REPLICA = "decode replica"
    AROUND = "around"


@dataclass(frozen=True)
class Run:
    """A measured run of requests of one kind."""

    name: str
    seconds: float
    """Until the last request ended."""
    asked_s: float
    """New ones came for so long."""
    at_a_time: int | None
    """None: a Poisson process of ``rate``."""
    rate: float | None
    requests: int
    failures: int
    images: int
    embeds: int
    """Of one image."""
    prompt_tokens: int
    output_tokens: int
    prefill_steps: float
    decode_steps: float
    cpu_s: dict[Group, float]
    other_cores: float
    """Cores that programs which have nothing to do with it kept busy."""
    load: float
    per_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    encoder_steps: float
    topology: Topology
    steps_p50_s: dict[str, float]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        return cls(**document | {"cpu_s": {Group(name): spent for name, spent in document["cpu_s"].items()}})

    @property
    def kind(self) -> Kind:
        text = self.prompt_tokens - self.images * self.embeds
        return Kind(self.images, self.embeds, text, self.output_tokens, scatter=0)


@dataclass(frozen=True)
class Fitted:
    """A result of ``benchmarks.measure_service``."""

    times: ServiceTimes
    cores: float
    """Those that are left where nothing is asked."""

    @classmethod
    def read(cls, path: Path) -> Self:
        document = json.loads(path.read_text())
        times = ServiceTimes.model_validate(document["service_times"])
        return cls(times, document["machine"]["cpus"] - document["idle_cores"])


@dataclass(frozen=True)
class Check:
    """Simulated against measured. Errors are shares of what was measured; above 0 the simulation says more."""

    name: str
    per_s: float
    per_s_simulated: float
    per_s_error: float
    ttft_p50_s: float
    ttft_p50_s_simulated: float
    ttft_error: float


def fit(runs: list[Run], cores: float) -> tuple[ServiceTimes, float]:
    """Service times in CPU seconds, and the cores that are busy when nothing is asked.
    ``pull_steps`` is that with which the simulation of these runs is the least wrong."""

    def wrong(fitted: tuple[ServiceTimes, float]) -> float:
        checks = [check(run, *fitted, cores) for run in runs]
        return sum(log(1 + each.per_s_error) ** 2 + log(1 + each.ttft_error) ** 2 for each in checks)

    service, idle = solved(runs, cores)
    return min(((service.model_copy(update={"pull_steps": steps}), idle) for steps in PULL_STEPS), key=wrong)


def solved(runs: list[Run], cores: float) -> tuple[ServiceTimes, float]:
    """What least squares find; how long a pull waits is not among it."""

    def solve(group: Group, *columns: Iterable[float]) -> list[float]:
        """Coefficients, none below 0, that minimise the squared relative errors; the last one is per second."""
        spent = np.array([run.cpu_s[group] for run in runs])
        table = np.array([*columns, [run.seconds for run in runs]]).T
        return [float(each) for each in nnls(table / spent[:, None], np.ones(len(runs)))[0]]

    requests = [float(run.requests) for run in runs]
    items = [float(run.requests * run.images) for run in runs]
    embeds = [float(run.requests * run.images * run.embeds) for run in runs]
    prompts = [float(run.requests * run.prompt_tokens) for run in runs]
    words = [float(run.requests * run.kind.text_tokens) for run in runs]
    tokens = [float(run.requests * run.output_tokens) for run in runs]

    render_s, render_item_s, chunk_s, idle_ingress = solve(Group.INGRESS, requests, items, tokens)
    around_s, around_item_s, around_chunk_s, idle_around = solve(Group.AROUND, requests, items, tokens)
    prepare_s, prepare_embed_s, idle_preparing = solve(Group.ENCODER_REPLICA, items, embeds)
    beside = [each * each / max(run.encoder_steps, 1.0) for each, run in zip(embeds, runs, strict=True)]
    encode_step_s, encode_s, encode_embed_s, encode_beside_s, idle_encoder = solve(
        Group.ENCODER, [run.encoder_steps for run in runs], items, embeds, beside
    )
    prefill_call_s, idle_prefill_replica = solve(Group.PREFILL_REPLICA, requests)
    step_s, token_s, embed_s, idle_prefill = solve(Group.PREFILL, [run.prefill_steps for run in runs], words, embeds)
    decode_call_s, relay_s, idle_decode_replica = solve(Group.DECODE_REPLICA, requests, tokens)
    pull_token_s, decode_step_s, sequence_s, idle_decode = solve(
        Group.DECODE, prompts, [run.decode_steps for run in runs], tokens
    )
    service = ServiceTimes(
        note=f"measured on {cores:g} cores that all stages and the client share, with the model of benchmarks.questions",
        around_s=around_s,
        around_item_s=around_item_s,
        around_chunk_s=around_chunk_s,
        render_s=render_s,
        render_item_s=render_item_s,
        chunk_s=chunk_s,
        hop_s=0.0,
        prepare_s=prepare_s,
        prepare_embed_s=prepare_embed_s,
        encode_step_s=encode_step_s,
        encode_s=encode_s,
        encode_embed_s=encode_embed_s,
        encode_beside_s=encode_beside_s,
        prefill_call_s=prefill_call_s,
        prefill_step_s=step_s,
        prefill_token_s=token_s,
        prefill_embed_s=embed_s,
        decode_call_s=decode_call_s,
        pull_s=0.0,
        pull_token_s=pull_token_s,
        decode_step_s=decode_step_s,
        decode_sequence_s=sequence_s + relay_s,
        decode_kv_token_s=0.0,
        pull_steps=PULL_STEPS[0],
        encode_embeds=BATCH_TOKENS,
        batch_tokens=BATCH_TOKENS,
        slots=SLOTS,
        kv_tokens=KV_TOKENS,
        start_up_s=dict.fromkeys(Stage, 40.0),
    )
    idle = idle_ingress + idle_around + idle_encoder + idle_prefill + idle_decode
    idle += idle_preparing + idle_prefill_replica + idle_decode_replica
    return service.model_copy(update={"hop_s": hop_s(runs, service, idle, cores)}), idle


def hop_s(runs: list[Run], service: ServiceTimes, idle: float, cores: float) -> float:
    """What is missing in the time to a first token where one request is alone, by the calls that it makes."""
    missing = []
    for run in runs:
        if run.at_a_time == 1:
            _, simulated = replay(run, service, idle, cores)
            missing.append((run.ttft_p50_s - simulated) / (3 if run.images else 2))
    return max(float(np.mean(missing)), 0.0)


def check(run: Run, service: ServiceTimes, idle: float, cores: float) -> Check:
    per_s, ttft_s = replay(run, service, idle, cores)
    return Check(run.name, run.per_s, per_s, per_s / run.per_s - 1, run.ttft_p50_s, ttft_s, ttft_s / run.ttft_p50_s - 1)


def replay(run: Run, service: ServiceTimes, idle: float, cores: float) -> tuple[float, float]:
    """The run in the simulation, on the cores that it had: requests per second, and TTFT p50."""
    loop = Loop()
    shared = SharedCores(loop, max(cores - idle - run.other_cores, 0.1))
    app = App(loop, service, Shape(topology=run.topology), 1, shared)
    for pool in app.pools.values():
        pool.scale(1, at_once=True)
    numbers, chance = itertools.count(), np.random.default_rng(1)

    def ask(ended: Request | None = None) -> None:
        if loop.now < run.asked_s:
            app.arrive(request(next(numbers), loop.now, run.kind, chance))

    if run.rate is None:
        app.on_end = ask
        for _ in range(run.at_a_time or 1):
            loop.at(0.0, ask)
    else:
        for moment in arrivals(run.rate, run.asked_s):
            loop.at(moment, ask)
    loop.run()
    served = [each for each in app.ended if each.outcome == "ok"]
    return len(served) / loop.now, quantile([each.ttft_s for each in served], 0.5)


def arrivals(rate: float, seconds: float) -> Iterator[float]:
    """Moments of a Poisson process, the same in a measured run and in its simulation."""
    chance, now = random.Random(1), 0.0
    while now < seconds:
        yield now
        now += chance.expovariate(rate)
