"""Service times from measured runs, and the error of the simulation on runs that they were not fitted on."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
from scipy.optimize import nnls

from serve_app.stage import Stage
from tools.sim.app import App, Shape
from tools.sim.loop import Loop, SharedCores
from tools.sim.run import quantile
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Kind, Request, request, steady

SIMULATED_S = 60.0


class Group(StrEnum):
    """Processes by whom they work for."""

    INGRESS = "ingress"
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    AROUND = "around"


@dataclass(frozen=True)
class Run:
    """A measured run of requests of one kind."""

    name: str
    seconds: float
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

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        return cls(**document | {"cpu_s": {Group(name): spent for name, spent in document["cpu_s"].items()}})

    @property
    def kind(self) -> Kind:
        text = self.prompt_tokens - self.images * self.embeds
        return Kind(self.images, self.embeds, text, self.output_tokens, scatter=0)


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
    """Service times in CPU seconds, and the cores that are busy when nothing is asked."""

    def solve(group: Group, *columns: Iterable[float]) -> list[float]:
        """Coefficients, none below 0, that minimise the squared relative errors; the last one is per second."""
        spent = np.array([run.cpu_s[group] for run in runs])
        table = np.array([*columns, [run.seconds for run in runs]]).T
        return [float(each) for each in nnls(table / spent[:, None], np.ones(len(runs)))[0]]

    requests = [float(run.requests) for run in runs]
    items = [float(run.requests * run.images) for run in runs]
    embeds = [float(run.requests * run.images * run.embeds) for run in runs]
    prompts = [float(run.requests * run.prompt_tokens) for run in runs]
    tokens = [float(run.requests * run.output_tokens) for run in runs]

    render_s, render_item_s, chunk_s, idle_ingress = solve(Group.INGRESS, requests, items, tokens)
    around_s, around_item_s, around_chunk_s, idle_around = solve(Group.AROUND, requests, items, tokens)
    encode_s, encode_embed_s, idle_encoder = solve(Group.ENCODER, items, embeds)
    step_s, token_s, idle_prefill = solve(Group.PREFILL, [run.prefill_steps for run in runs], prompts)
    pull_s, decode_step_s, sequence_s, idle_decode = solve(
        Group.DECODE, requests, [run.decode_steps for run in runs], tokens
    )
    service = ServiceTimes(
        note=f"measured on {cores:g} cores that all stages and the client share, with the demo model",
        around_s=around_s,
        around_item_s=around_item_s,
        around_chunk_s=around_chunk_s,
        render_s=render_s,
        render_item_s=render_item_s,
        chunk_s=chunk_s,
        hop_s=0.0,
        encode_s=encode_s,
        encode_embed_s=encode_embed_s,
        prefill_step_s=step_s,
        prefill_token_s=token_s,
        pull_s=pull_s,
        pull_token_s=0.0,
        decode_step_s=decode_step_s,
        decode_sequence_s=sequence_s,
        decode_kv_token_s=0.0,
        batch_tokens=2048,
        slots=256,
        kv_tokens=10**6,
        start_up_s=dict.fromkeys(Stage, 40.0),
    )
    idle = idle_ingress + idle_around + idle_encoder + idle_prefill + idle_decode
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


def replay(run: Run, service: ServiceTimes, idle: float, cores: float, seed: int = 1) -> tuple[float, float]:
    """The run in the simulation, on the cores that it had: requests per second, and TTFT p50."""
    loop = Loop()
    app = App(loop, service, Shape(), seed, SharedCores(loop, max(cores - idle - run.other_cores, 0.1)))
    for pool in app.pools.values():
        pool.scale(1, at_once=True)
    if run.rate is not None:
        app.play(steady(run.name, run.rate, SIMULATED_S, run.kind).requests(seed))
    else:
        chance = np.random.default_rng(seed)

        def next_one(ended: Request | None = None) -> None:
            if loop.now < SIMULATED_S:
                app.arrive(request(len(app.ended), loop.now, run.kind, chance))

        app.on_end = next_one
        for _ in range(run.at_a_time or 1):
            loop.at(0.0, next_one)
    loop.run(SIMULATED_S)
    served = [each for each in app.ended if each.outcome == "ok" and each.at > SIMULATED_S / 10]
    counted = sum(each.ended_at is not None and each.ended_at > SIMULATED_S / 10 for each in app.ended)
    return counted / (0.9 * SIMULATED_S), quantile([each.ttft_s for each in served], 0.5)
