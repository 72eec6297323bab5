"""What runs say: figures of one, spreads over rounds, ratios of the two arms, and the targets they are held against."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.report import Spread
from benchmarks.targets import Target

TWO_CHOICES, PREFIX = "two choices", "prefix"
Run = dict[str, Any]
Document = dict[str, Any]
Figure = Callable[[Run], float]
Cell = tuple[str, str]
"""A load, and the caches that it ran with."""


def of(key: str) -> Figure:
    return lambda run: float(run[key])


def cached_share(run: Run) -> float:
    return float(run["cached_tokens"] / run["prompt_tokens"])


def cached(run: Run) -> float:
    """Tokens per request."""
    return float(run["cached_tokens"] / run["requests"])


def most_work(run: Run) -> float:
    """Prompt tokens that the busiest prefill replica computed, by the mean of all."""
    tokens = list(run["work"].values())
    return float(max(tokens) / statistics.fmean(tokens))


def cpu_s(run: Run) -> float:
    """Of all processes of the server, per request."""
    return float(sum(run["cpu_s"].values()) / run["requests_meanwhile"])


def cores(run: Run) -> float:
    """That the server kept busy."""
    return float(sum(run["cpu_s"].values()) / run["took_s"])


TTFT, RATE = of("ttft_p50_ms"), of("requests_per_s")


def ttft_by_speed(run: Run) -> float:
    """In times of a piece of work that is measured beside the run: the machine's pace changes from one run to the next."""
    return TTFT(run) / float(run["speed_ms"])


def rate_by_speed(run: Run) -> float:
    """Requests in a thousand times that piece of work."""
    return RATE(run) * float(run["speed_ms"])


def runs(document: Document, arm: str, cell: Cell) -> dict[int, Run]:
    """By round, where anything was answered."""
    return {
        run["round"]: run
        for run in document["runs"]
        if run["arm"] == arm and "error" not in run and (run["load"], run["caches"]) == cell and run["requests"]
    }


def cells(document: Document) -> list[Cell]:
    """In the order in which they ran first."""
    return list(dict.fromkeys((run["load"], run["caches"]) for run in document["runs"] if "error" not in run))


def spread(document: Document, arm: str, cell: Cell, figure: Figure) -> Spread | None:
    return Spread.of([figure(run) for run in runs(document, arm, cell).values()])


def ratio(document: Document, cell: Cell, figure: Figure) -> Spread | None:
    """Of the prefix router to two choices, within each round."""
    ours, theirs = runs(document, PREFIX, cell), runs(document, TWO_CHOICES, cell)
    pairs = [(figure(ours[round_]), figure(theirs[round_])) for round_ in ours.keys() & theirs.keys()]
    return Spread.of([one / other for one, other in pairs if other])


def own(title: str, limit: float, cell: Cell, figure: Figure) -> Target:
    """At most so much with the prefix router."""
    found = partial(spread, arm=PREFIX, cell=cell, figure=figure)
    return Target(f"{cell[0]}: {title}", limit, False, found)


def against(title: str, limit: float, at_least: bool, cell: Cell, figure: Figure) -> Target:
    """The ratio to two choices."""
    return Target(f"{cell[0]}: {title} against two choices", limit, at_least, partial(ratio, cell=cell, figure=figure))
