"""How many replicas per stage for an SLO: ``python -m tools.sim plan traffic.yaml``.

It begins with the fewest replicas that could do the work if nothing ever waited (``ServiceTimes.alone`` times the rate), and
simulates. While too few requests are within the SLO it adds a replica to the stage where calls wait longest, or to decode
where tokens come too slowly; in the end it takes away what is not needed after all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.stage import Stage
from tools.sim.app import REPLICAS, Shape
from tools.sim.run import SLO, Result, Strategy, simulate
from tools.sim.service import ServiceTimes, Topology
from tools.sim.traffic import Kind, Traffic

ASSUMED = Path(__file__).parent / "service_times_assumed.json"
WARM_S = 30.0
REQUESTS = 2000
"""Of one simulation, about; but it is ``SECONDS`` long at least."""
SECONDS = 120.0
INGRESS_USE = 0.5
"""Share of its event loop that an ingress replica uses at most."""
SEED = 1


class PlanError(Exception):
    """A plan cannot be made. One sentence says why."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Objective(Strict):
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    share: float = Field(0.95, gt=0, le=1)


class KindOfRequest(Strict):
    weight: float = Field(1.0, gt=0)
    images: int = Field(0, ge=0)
    image_tokens: int = Field(0, ge=0, description="Of one image.")
    text_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    scatter: float = Field(0.4, ge=0, description="Standard deviation of the logarithm of each size.")

    @model_validator(mode="after")
    def sized(self) -> Self:
        if self.images and not self.image_tokens:
            raise ValueError("images need `image_tokens`")
        return self

    @property
    def kind(self) -> Kind:
        return Kind(self.images, self.image_tokens, self.text_tokens, self.output_tokens, self.scatter)


class Demand(Strict):
    """A traffic file."""

    slo: Objective
    per_s: float = Field(gt=0, description="Requests per second.")
    kinds: list[KindOfRequest] = Field(min_length=1)
    cards: int = Field(32, ge=2, description="At most.")
    service_times: Path | None = Field(None, description="Result of `make measure`, or a file like the assumed times.")

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            asked = yaml.safe_load(path.read_text())
            if not isinstance(asked, dict):
                raise PlanError(f"{path} should be a mapping, as tools/sim/traffic.yaml is.")
            return cls.model_validate(asked)
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise PlanError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
        except ValidationError as error:
            raise PlanError(f"{path}: {sentence(error)}") from None

    @property
    def shares(self) -> tuple[float, ...]:
        total = sum(kind.weight for kind in self.kinds)
        return tuple(kind.weight / total for kind in self.kinds)

    @property
    def traffic(self) -> Traffic:
        kinds = tuple(kind.kind for kind in self.kinds)
        seconds = WARM_S + max(SECONDS, REQUESTS / self.per_s)
        return Traffic("plan", seconds, lambda _: self.per_s, self.per_s, kinds, lambda _: self.shares)


@dataclass(frozen=True)
class Known:
    """Service times, and what is known of their error."""

    times: ServiceTimes
    error: str

    @classmethod
    def read(cls, path: Path | None) -> Self:
        path = path or ASSUMED
        try:
            document = json.loads(path.read_text())
            measured = document if "service_times" in document else {"service_times": document, "held_out": []}
            times = ServiceTimes.model_validate(measured["service_times"])
        except OSError as error:
            raise PlanError(f"The service times {path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise PlanError(f"The service times {path}: {sentence(error)}") from None
        except ValueError as error:
            raise PlanError(f"The service times {path} are not JSON: {error}.") from None
        runs = measured["held_out"]
        if not runs:
            return cls(times, f"Service times: {times.note}. No error is known: take this for an order of magnitude.")
        most = {name: max(abs(run[name]) for run in runs) for name in ("per_s_error", "ttft_error")}
        return cls(
            times,
            f"Service times: {times.note}. Error of the simulation in {len(runs)} runs that they were not fitted on: "
            f"requests/s up to {most['per_s_error']:.0%}, TTFT p50 up to {most['ttft_error']:.0%}.",
        )


@dataclass(frozen=True)
class Plan:
    topology: Topology
    replicas: Mapping[Stage, int]
    result: Result
    met: bool
    use: Mapping[Stage, float]
    """Share of what its replicas could do at most that each stage is asked for."""

    @property
    def cards(self) -> int:
        return sum(self.replicas.values())


def sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return f"there is no key `{place}`."
    said = first["msg"].removeprefix("Value error, ")
    if said.startswith("Input "):
        return f"`{place}` {said.removeprefix('Input ')}."
    return f"`{place}`: {said[0].lower()}{said[1:]}."


def needed(demand: Demand, times: ServiceTimes, topology: Topology) -> dict[Stage, float]:
    """Replica-seconds per second of each stage, with full batches."""
    need = dict.fromkeys(Stage, 0.0)
    for asked, share in zip(demand.kinds, demand.shares, strict=True):
        kind = asked.kind
        own = times.alone([kind.embeds] * kind.images, kind.text_tokens, kind.output_tokens)
        for stage, seconds in own.items():
            need[stage] += demand.per_s * share * seconds
    if topology == "E+PD":
        need[Stage.DECODE] += need.pop(Stage.PREFILL)
    return need


def ingresses(demand: Demand, times: ServiceTimes) -> int:
    busy = sum(
        share * (times.render_s + times.render_item_s * kind.images + times.chunk_s * kind.output_tokens)
        for kind, share in zip(demand.kinds, demand.shares, strict=True)
    )
    return floor(demand.per_s * busy / INGRESS_USE) + 1


def plan(demand: Demand, times: ServiceTimes, topology: Topology) -> Plan:
    """The fewest cards that this search finds; ``met`` is false where the allowed ones are not enough."""
    need = needed(demand, times, topology)
    least = {stage: floor(need[stage]) + 1 for stage in REPLICAS[topology]}
    if not need[Stage.ENCODER]:
        least[Stage.ENCODER] = 0
    tried: dict[tuple[int, ...], Result] = {}

    def play(replicas: Mapping[Stage, int]) -> Result:
        key = tuple(replicas.values())
        if key not in tried:
            tried[key] = forecast(demand, times, topology, replicas)
        return tried[key]

    def meets(replicas: Mapping[Stage, int]) -> bool:
        return play(replicas).good >= demand.slo.share

    replicas = dict(least)
    while not meets(replicas) and sum(replicas.values()) < demand.cards:
        replicas[short(play(replicas), demand.slo)] += 1
    met = sum(replicas.values()) <= demand.cards and meets(replicas)
    while met and (fewer := next(filter(meets, one_less(replicas, least)), None)):
        replicas = fewer
    use = {stage: need[stage] / count for stage, count in replicas.items() if count}
    return Plan(topology, replicas, play(replicas), met, use)


def one_less(replicas: Mapping[Stage, int], least: Mapping[Stage, int]) -> Iterator[dict[Stage, int]]:
    for stage, count in replicas.items():
        if count > least[stage]:
            yield {**replicas, stage: count - 1}


def short(result: Result, slo: Objective) -> Stage:
    """The stage that needs a replica more."""
    if result.late <= 1 - slo.share:
        return Stage.DECODE
    return max(result.waits_s, key=lambda stage: result.waits_s[stage])


def forecast(demand: Demand, times: ServiceTimes, topology: Topology, replicas: Mapping[Stage, int]) -> Result:
    shape = Shape(topology=topology, ingresses=ingresses(demand, times))
    slo = SLO(demand.slo.ttft_s, demand.slo.tpot_s)
    return simulate(times, demand.traffic, Strategy("plan", replicas), shape, slo, SEED, WARM_S)


def report(demand: Demand, known: Known) -> str:
    slo = demand.slo
    lines = [
        f"{demand.per_s:g} requests/s; {slo.share:.0%} of them with a first token within {slo.ttft_s:g} s, and "
        f"{slo.tpot_s * 1000:g} ms per token.",
        "",
        f"{'':7} {'cards':>5}  {'encoder':>10} {'prefill':>10} {'decode':>10}  {'within':>6}  {'TTFT p50':>8} {'p99':>7}  "
        f"{'TPOT p99':>8}",
    ]
    plans = [plan(demand, known.times, topology) for topology in REPLICAS]
    lines += [line(each) for each in plans]
    lines += [
        f"{each.topology}: {demand.cards} cards are not enough. {lacking(each)}" for each in plans if not each.met
    ]
    lines += ["", f"Ingress replicas (no card): {ingresses(demand, known.times)}."]
    lines += ["In brackets: share of what a stage could do with full batches.", known.error]
    return "\n".join(lines)


def lacking(plan: Plan) -> str:
    stage, wait_s = max(plan.result.waits_s.items(), key=lambda wait: wait[1])
    return f"With these, calls wait longest at {stage}: {wait_s:.1f} s on average."


def line(plan: Plan) -> str:
    def cell(stage: Stage) -> str:
        count = plan.replicas.get(stage)
        return f"{count} ({plan.use[stage]:.0%})" if count else "-"

    result = plan.result
    return (
        f"{plan.topology:7} {plan.cards:5}  {cell(Stage.ENCODER):>10} {cell(Stage.PREFILL):>10} {cell(Stage.DECODE):>10}  "
        f"{result.good:6.1%}  {result.ttft_p50_s:6.2f} s {result.ttft_p99_s:5.2f} s  {result.tpot_p99_s * 1000:5.0f} ms"
    )
