"""Figures of runs on a card over the rounds. A ratio is one of two systems in the same round, under the same requests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.load import Cell
from benchmarks.report import Spread, text

ONE = "one engine"

Document = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """``of`` a run: None where the run has no such figure, as when nothing was answered."""

    title: str
    of: Callable[[Run], float | None]
    digits: int = 0


def cpu_per_request(run: Run) -> float | None:
    return sum(run["cpu_s"].values()) / run["completed"] if run["completed"] else None


def reported(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.get(key) if run["completed"] else None


RATE = Metric("requests/s", reported("request_throughput"), 1)
TTFT = [Metric(f"TTFT p{share} ms", reported(f"p{share}_ttft_ms")) for share in (50, 90, 99)]
TPOT = Metric("TPOT ms", reported("median_tpot_ms"), 1)
CPU = Metric("CPU-s per request", cpu_per_request, 3)
METRICS = [RATE, *TTFT, TPOT, CPU]
COMPARED = [RATE, TTFT[0], TPOT, CPU]


def systems_of(document: Document) -> list[str]:
    return list(dict.fromkeys(visit["system"] for visit in document["visits"]))


def runs(document: Document, system: str, cell: Cell) -> dict[int, Run]:
    """By round."""
    return {
        visit["round"]: run
        for visit in document["visits"]
        for run in visit["runs"]
        if visit["system"] == system and Cell(**run["cell"]) == cell
    }


def values(found: dict[int, Run], metric: Metric) -> dict[int, float]:
    figures = {round_: metric.of(run) for round_, run in found.items()}
    return {round_: figure for round_, figure in figures.items() if figure is not None}


def ratio(document: Document, metric: Metric, cell: Cell, system: str, against: str) -> Spread | None:
    """Over the rounds in which both systems have the figure."""
    ours, theirs = (values(runs(document, name, cell), metric) for name in (system, against))
    return Spread.of([ours[round_] / theirs[round_] for round_ in ours.keys() & theirs.keys() if theirs[round_]])


def same_answers(found: dict[int, Run], expected: dict[int, Run]) -> str:
    """How many of the answers are one engine's: all systems decode greedily."""
    pairs = [
        pair
        for round_ in found.keys() & expected.keys()
        for pair in zip(*(each[round_].get("answers", "").split() for each in (found, expected)), strict=False)
    ]
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}" if pairs else "–"


def cell_rows(document: Document, systems: list[str], cell: Cell) -> list[list[str]]:
    rows = []
    for system in systems:
        found = runs(document, system, cell)
        figures = [text(Spread.of(list(values(found, metric).values())), metric.digits) for metric in METRICS]
        failed, asked = (sum(run[key] for run in found.values()) for key in ("failed", "requests"))
        same = same_answers(found, runs(document, ONE, cell))
        rows.append([system, *figures, f"{failed} of {asked}", same])
    return rows


def ratio_rows(document: Document, systems: list[str], cell: Cell) -> list[list[str]]:
    return [
        [f"{system} / {ONE}", *(text(ratio(document, metric, cell, system, ONE)) for metric in COMPARED)]
        for system in systems
        if system != ONE and ONE in systems
    ]
