"""The same two cores for E+PD and for two plain engines: how many requests per second are answered within an SLO?"""

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.questions import clients
from benchmarks.questions.model import SIDE
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, runs_of
from benchmarks.questions.systems import E_PD, TWO, System, arguments, engines, stages
from benchmarks.report import Spread, table, text
from benchmarks.streams import WORDS

MAKER = "benchmarks.questions.goodput:asks"
STEP_TOKENS = 256
SYSTEMS: dict[str, System] = {
    TWO: lambda folder: engines(folder, arguments(STEP_TOKENS), 2),
    E_PD: lambda folder: stages(folder, arguments(STEP_TOKENS), E_PD),
}
TEXT_WORDS, ANSWER_TOKENS = 50, 64
SECONDS, LEAST_REQUESTS = 25.0, 24
"""Of a rate: so long, or until it has had so many."""
RATES: dict[int, tuple[float, ...]] = {
    0: (8, 16, 24, 32),
    1: (1, 2, 3.5, 5, 6.5),
    2: (0.5, 1.2, 2.0, 2.8),
    4: (0.25, 0.5, 0.8, 1.2, 1.6, 2.0),
    8: (0.2, 0.35, 0.5, 0.65, 0.8),
}
"""Requests per second by pictures per request, up to what either system can bear."""
QUICK_RATES = {4: (0.8, 1.2)}
GIVEN_UP = 0.5
"""No higher rate is tried from this share within the SLO on."""
ENOUGH = 0.9
"""The share of requests within the SLO that a rate must have."""


@dataclass(frozen=True)
class Load:
    images: int
    rate: float
    seed: int
    seconds: float


@dataclass(frozen=True)
class SLO:
    """``of``: which of a request's figures on times between tokens, in seconds."""

    title: str
    of: str
    limit_s: float

    def met(self, images: int, request: dict[str, float]) -> bool:
        return 0 < request["ttft"] <= ttft_limit_s(images) and request[self.of] <= self.limit_s


SLOS = (
    SLO("no pause above 100 ms", "worst", 0.1),
    SLO("no pause above 250 ms", "worst", 0.25),
    SLO("30 ms per token", "tpot", 0.03),
)
COLUMNS = ("ttft", "tpot", "worst")


def ttft_limit_s(images: int) -> float:
    """About three times what it takes when nothing else is asked."""
    return 0.5 + 0.5 * images


def asks(images: int, rate: float, seed: int, seconds: float) -> list[clients.Ask]:
    """A Poisson process that has as many requests as its rate says."""
    said = random.Random(f"{seed} {images} {rate}")
    found = []
    for at in sorted(said.uniform(0, seconds) for _ in range(round(rate * seconds))):
        content = [clients.picture(said.getrandbits(40), SIDE) for _ in range(images)]
        words = " ".join([str(said.random()), *said.choices(WORDS, k=TEXT_WORDS)])
        content.append({"type": "text", "text": words})
        found.append(clients.Ask(at, "all", clients.chat(content, ANSWER_TOKENS)))
    return found


def compact(run: Run) -> Run:
    """A row of ``COLUMNS`` per request, zeros where it failed."""
    requests = [[0, 0, 0] if "failed" in each else [each[name] for name in COLUMNS] for each in run.pop("requests")]
    return run | {"requests": requests}


def share(run: Run, slo: SLO) -> float:
    """Of its requests, within the SLO."""
    found = [slo.met(run["load"]["images"], dict(zip(COLUMNS, row, strict=True))) for row in run["requests"]]
    return sum(found) / len(found) if found else 0.0


def visit(name: str, round_: int, rates: Mapping[int, Sequence[float]]) -> Iterator[Run]:
    where: Run = {"system": name, "round": round_}
    try:
        with tempfile.TemporaryDirectory(prefix="goodput-") as folder, SYSTEMS[name](Path(folder)) as server:

            def drive(load: Load) -> Run:
                (run,) = clients.drive(server.url, server.mark, MAKER, [load], Path(folder) / "clients.log")
                return compact(run)

            drive(Load(1, 1.0, 99, 8.0))  # to warm up
            for images, some in rates.items():
                for rate in some:
                    seconds = max(SECONDS, LEAST_REQUESTS / rate)
                    yield where | (run := drive(Load(images, rate, 1 + round_, seconds)))
                    if max(share(run, slo) for slo in SLOS) < GIVEN_UP:
                        break
    except Exception as error:  # one system's failure is a result, not the end of the others'
        yield where | failure(error)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    for name in order(list(SYSTEMS), round_):
        yield from visit(name, round_, QUICK_RATES if quick else RATES)


# ---- the answer


def goodput(document: Document, system: str, images: int, slo: SLO, round_: int) -> float | None:
    """The rate up to which ``ENOUGH`` of the requests are within the SLO, between two measured rates by a straight line.
    None where even the lowest rate was too high."""
    runs = sorted(runs_of(document, system, images=images), key=lambda run: run["load"]["rate"])
    known = [(run["load"]["rate"], share(run, slo)) for run in runs if run["round"] == round_]
    best: float | None = None
    for (rate, good), (next_rate, next_good) in zip(known, [*known[1:], (None, 0.0)], strict=True):
        if good < ENOUGH:
            break
        best = rate
        if next_rate is not None and next_good < ENOUGH:
            best = rate + (next_rate - rate) * (good - ENOUGH) / (good - next_good)
    return best


def goodputs(document: Document, system: str, images: int, slo: SLO) -> dict[int, float]:
    """By round; 0 where even the lowest rate was too high."""
    rounds = {run["round"] for run in runs_of(document, system, images=images)}
    return {round_: goodput(document, system, images, slo, round_) or 0.0 for round_ in sorted(rounds)}


def lowest(document: Document, images: int) -> float:
    return min(float(run["load"]["rate"]) for run in document["runs"] if run.get("load", {}).get("images") == images)


def highest(document: Document, images: int) -> float:
    return max(float(run["load"]["rate"]) for run in document["runs"] if run.get("load", {}).get("images") == images)


def gain(document: Document, images: int, slo: SLO) -> Spread | None:
    """Of E+PD over two engines, within each round. Where even the lowest rate was too high for these, they count as if it
    had not been: the gain is larger."""
    ours, theirs = (goodputs(document, name, images, slo) for name in (E_PD, TWO))
    return Spread.of(
        [
            ours[round_] / (theirs[round_] or lowest(document, images))
            for round_ in ours.keys() & theirs.keys()
            if ours[round_]
        ]
    )


def told(document: Document, images: int, slo: SLO) -> str:
    """Goodput of two engines / of E+PD = its gain. What was enough at the highest rate too may be more."""
    shown, below = [], f"< {lowest(document, images):g}"
    for name in (TWO, E_PD):
        found = list(goodputs(document, name, images, slo).values())
        most = "≥ " * (max(found, default=0.0) >= highest(document, images))
        shown.append("–" if not found else most + text(Spread.of(found), 1) if all(found) else below)
    found_gain = gain(document, images, slo)
    more = "> " * (shown[0] == below)
    return " / ".join(shown) + (f" = **{more}{text(found_gain, 1)} ×**" if found_gain else "")


def images_of(document: Document) -> list[int]:
    return sorted({run["load"]["images"] for run in document["runs"] if "load" in run})


def answer(document: Document) -> str:
    rows = [[str(images), *(told(document, images, slo) for slo in SLOS)] for images in images_of(document)]
    wins = [images for images in images_of(document) if (found := gain(document, images, SLOS[0])) and found.median > 1]
    crossing = (
        f"E+PD wins from {min(wins)} picture{'s' * (min(wins) != 1)} per request on" if wins else "E+PD never wins"
    )
    first, more = ttft_limit_s(0), ttft_limit_s(1) - ttft_limit_s(0)
    return (
        f"Requests per second of which {ENOUGH:.0%} are within the SLO, two engines / E+PD, by pictures per request. The "
        f"SLO is {first:g} s to the first token, {more:g} s more per picture, and what is above the column. Where pauses "
        f"count, {crossing}: an engine that encodes stops all its answers. Where a quarter of a second is no pause, or only "
        "the mean counts, two engines are as good: whole requests spread more evenly than stages, and a request's pictures "
        "wait for each other at one encoder. Without pictures the encoder's core has nothing to do: two engines win.\n\n"
        + table(["pictures", *(slo.title for slo in SLOS)], rows)
    )


def plot(document: Document, figure: Any) -> None:
    images = images_of(document)
    axes = figure.subplots(1, len(images), sharey=True)
    for axis, count in zip(axes if len(images) > 1 else [axes], images, strict=True):
        for colour, name in enumerate(SYSTEMS):
            for line, slo in zip(("-", ":"), (SLOS[0], SLOS[-1]), strict=True):
                shares: dict[float, list[float]] = {}
                for run in runs_of(document, name, images=count):
                    shares.setdefault(run["load"]["rate"], []).append(100 * share(run, slo))
                rates = sorted(shares)
                means = [sum(shares[rate]) / len(shares[rate]) for rate in rates]
                label = f"{name}, {slo.title}" if axis is axes[0] else None
                axis.plot(rates, means, line, marker="o", markersize=3, color=f"C{colour + 1}", label=label)
        axis.axhline(100 * ENOUGH, color="grey", linewidth=0.5)
        axis.set(title=f"{count} picture{'s' * (count != 1)}", xlabel="requests/s")
    axes[0].set(ylabel="% within the SLO", ylim=(0, 104))
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)


QUESTION = Question(
    name="goodput",
    title="Two cards: two engines, or an encoder and an engine?",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target(
            f"goodput with 4 pictures, {SLOS[0].title}: E+PD against two engines on the same cores",
            1.3,
            True,
            lambda document: gain(document, 4, SLOS[0]),
        ),
        Target(
            "the same with 8 pictures",
            1.3,
            True,
            lambda document: gain(document, 8, SLOS[0]),
        ),
    ),
    setting=(
        f"Requests of {TEXT_WORDS} words, pictures of {SIDE}×{SIDE} and {ANSWER_TOKENS} tokens of answer, as a Poisson "
        f"process of {SECONDS:g} s per rate, or longer for {LEAST_REQUESTS} requests; steps of {STEP_TOKENS} tokens at "
        "most in all engines."
    ),
)
