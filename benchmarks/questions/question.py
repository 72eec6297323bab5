"""A question that people decide by: how it is measured, and how its answer is shown in RESULTS.md."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Spread
from benchmarks.targets import Target

Run = dict[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Question:
    name: str
    """Of its results, ``results/<name>.json`` and ``.png``, and on the command line."""
    title: str
    measure: Callable[[int, bool], Iterator[Run]]
    """Runs of a round as they come, each with ``system`` and ``round``; quick: only what the headline needs."""
    answer: Callable[[Document], str]
    """Three sentences with what was found, and at most a small table: what wins, what loses, by how much."""
    plot: Callable[[Document, Any], None]
    """Draws into a matplotlib figure."""
    targets: tuple[Target, ...] = ()
    setting: str = ""
    """A sentence on what was put to which systems."""
    command: str = ""
    """That measures it, where it is not this benchmark."""


def failure(error: Exception) -> Run:
    """What a run tells of a system that failed to run: a result, not the end of the others'."""
    return {"error": f"{type(error).__name__}: {error}"[-2000:]}


def runs_of(document: Document, system: str, **where: Any) -> list[Run]:
    """Runs of a system that did not fail to run, in which each key of ``where`` has that value."""
    return [
        run
        for run in document["runs"]
        if run["system"] == system
        and "error" not in run
        and all(run.get(key, run.get("load", {}).get(key)) == value for key, value in where.items())
    ]


def by_round(document: Document, system: str, figure: Callable[[Run], float], **where: Any) -> dict[int, float]:
    return {run["round"]: figure(run) for run in runs_of(document, system, **where)}


def spread(document: Document, system: str, figure: Callable[[Run], float], **where: Any) -> Spread | None:
    return Spread.of(list(by_round(document, system, figure, **where).values()))


def ratio(document: Document, system: str, against: str, figure: Callable[[Run], float], **where: Any) -> Spread | None:
    """Within each round in which both ran."""
    ours, theirs = (by_round(document, name, figure, **where) for name in (system, against))
    return Spread.of(
        [ours[round_] / theirs[round_] for round_ in sorted(ours.keys() & theirs.keys()) if theirs[round_]]
    )


def order(names: list[str], round_: int) -> list[str]:
    """Every round begins with the next system, so that none always runs first."""
    start = round_ % len(names)
    return names[start:] + names[:start]
