"""What runs say: figures of one, spreads over rounds, ratios of two systems, and the targets they are held against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.null_engine import STEP_S
from benchmarks.report import Spread
from benchmarks.streams import PACE_MS, Wave
from benchmarks.targets import Target
from benchmarks.tokens.rows import (
    AT_ONCE,
    CARD,
    FIRST_TOKEN,
    IMAGES,
    LONG,
    MANY_CORES,
    NULL_E_P_D,
    NULL_E_PD,
    ONE,
    ONE_INGRESS,
    PROXY,
    REAL_E_P_D,
    REAL_E_PD,
    SCALED,
    SHORT,
    TWO_INGRESSES,
)

Run = dict[str, Any]
Document = dict[str, Any]
Figure = Callable[[Run], float]
LIKE = 0.15
"""The share by which the speeds of two runs may differ in a ratio."""
INGRESS, DECODE = "Ingress replica", "Decode replica"

# ---- of a run


def answered(run: Run) -> int:
    return Wave(**run["wave"]).requests - int(run["failed"])


def cpu_us(kind: str | None = None) -> Figure:
    """CPU µs per token, of one kind of process or of all."""

    def figure(run: Run) -> float:
        seconds = run["cpu_s"]
        spent = sum(seconds.values()) if kind is None else seconds.get(kind, 0.0)
        return float(spent) * 1e6 / (answered(run) * run["wave"]["tokens"])

    return figure


def cpu_ms(kind: str | None = None) -> Figure:
    """CPU ms per request."""
    per_token = cpu_us(kind)
    return lambda run: per_token(run) * float(run["wave"]["tokens"]) / 1000


def of(key: str) -> Figure:
    return lambda run: float(run[key])


def of_made(run: Run) -> float:
    """Tokens delivered of those that an engine at its pace would have made of these streams meanwhile."""
    return float(run["tokens_per_s"]) * STEP_S / Wave(**run["wave"]).streams


RATE, REQUESTS, TTFT, SPEED = of("tokens_per_s"), of("requests_per_s"), of("ttft_p50_ms"), of("speed_ms")


def at_pace(figure: Figure) -> Figure:
    """CPU time as it would be on the quiet machine."""
    return lambda run: figure(run) * PACE_MS / SPEED(run)


# ---- over the rounds


def runs(document: Document, system: str, wave: Wave) -> dict[int, Run]:
    """By round, where anything was answered."""
    return {
        run["round"]: run
        for run in document["runs"]
        if run["system"] == system and "error" not in run and Wave(**run["wave"]) == wave and answered(run)
    }


def spread(document: Document, system: str, wave: Wave, figure: Figure) -> Spread | None:
    return Spread.of([figure(run) for run in runs(document, system, wave).values()])


def ratio(document: Document, wave: Wave, figure: Figure, system: str, against: str) -> Spread | None:
    """Within each round, where both ran at a like speed."""
    ours, theirs = (runs(document, name, wave) for name in (system, against))
    pairs = [(ours[round_], theirs[round_]) for round_ in ours.keys() & theirs.keys()]
    like = [pair for pair in pairs if abs(SPEED(pair[0]) / SPEED(pair[1]) - 1) <= LIKE]
    return Spread.of([figure(one) / figure(other) for one, other in like if figure(other)])


def ingress_gain(document: Document) -> Spread | None:
    """Of a second ingress replica: in tokens/s where there are cores for it, else by what a token costs both."""
    if MANY_CORES:
        return ratio(document, SCALED, RATE, TWO_INGRESSES, ONE_INGRESS)
    found = ratio(document, SCALED, cpu_us(INGRESS), ONE_INGRESS, TWO_INGRESSES)
    return found and Spread(2 * found.median, 2 * found.least, 2 * found.most)


# ---- targets


@dataclass(frozen=True)
class RowTarget(Target):
    row: str


def at_most(row: str, title: str, limit: float, system: str, wave: Wave, figure: Figure) -> RowTarget:
    return RowTarget(title, limit, False, partial(spread, system=system, wave=wave, figure=at_pace(figure)), row)


def against(
    row: str, title: str, limit: float, wave: Wave, figure: Figure, system: str, other: str, at_least: bool = True
) -> RowTarget:
    found = partial(ratio, wave=wave, figure=figure, system=system, against=other)
    return RowTarget(f"{title}: {system}", limit, at_least, found, row)


TARGETS = [
    *(
        target
        for system in (NULL_E_PD, NULL_E_P_D)
        for target in (
            at_most("a", f"CPU µs per token, all processes: {system}", 120, system, CARD, cpu_us()),
            at_most("a", f"– decode replica: {system}", 15, system, CARD, cpu_us(DECODE)),
            RowTarget(
                f"– tokens delivered of those made: {system}",
                0.92,
                True,
                partial(spread, system=system, wave=CARD, figure=of_made),
                "a",
            ),
        )
    ),
    *(
        at_most("e", f"decode replica with a real engine, 64 streams, µs per token: {system}", 35, system, LONG, figure)
        for system in (REAL_E_PD, REAL_E_P_D)
        for figure in [cpu_us(DECODE)]
    ),
    at_most("b", "E+P+D, text, 1 token: CPU ms per request", 9, AT_ONCE, FIRST_TOKEN, cpu_ms()),
    against("e", "tokens/s against one engine, 64 × 256", 1.0, LONG, RATE, REAL_E_PD, ONE),
    against("e", "tokens/s against one engine, 64 × 256", 0.85, LONG, RATE, REAL_E_P_D, ONE),
    *(
        target
        for system in (REAL_E_P_D, REAL_E_PD)
        for target in (
            against("f", "requests/s against the proxy, 2 images, 8 × 16", 1.3, IMAGES, REQUESTS, system, PROXY),
            against("f", "requests/s against the proxy, text, 32 × 16", 1.0, SHORT, REQUESTS, system, PROXY),
            against("f", "requests/s against the proxy, 64 × 256", 1.3, LONG, REQUESTS, system, PROXY),
            against("f", "TTFT p50 against the proxy, 2 images, 8 × 16", 0.7, IMAGES, TTFT, system, PROXY, False),
        )
    ),
    RowTarget("two ingress replicas against one", 1.8, True, ingress_gain, "c"),
]
