"""How right is the simulation behind `python -m tools.sim plan`? ``benchmarks.measure_service`` measures and compares."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.questions.question import Document, Question, Run, Target
from benchmarks.report import Spread

ERRORS = {"per_s_error": ("requests/s", 0.15), "ttft_error": ("TTFT p50", 0.25)}
"""Of runs that were not fitted: title, and what was aimed at."""


def measure(round_: int, quick: bool) -> Iterator[Run]:
    """By `make measure`."""
    return iter(())


def errors(document: Document, key: str) -> list[float]:
    return [abs(each[key]) for each in document["held_out"]]


def largest(key: str) -> Callable[[Document], Spread | None]:
    def found(document: Document) -> Spread | None:
        every = errors(document, key)
        return Spread(max(every), max(every), max(every)) if every else None

    return found


def answer(document: Document) -> str:
    within = {key: sum(each <= limit for each in errors(document, key)) for key, (_, limit) in ERRORS.items()}
    count = len(document["held_out"])
    told = "; ".join(
        f"{title} is at most {max(errors(document, key)):.0%} wrong, and within {limit:.0%} in {within[key]}"
        for key, (title, limit) in ERRORS.items()
    )
    return (
        f"Of {count} runs that the service times were not fitted on, {told}. `python -m tools.sim plan traffic.yaml` says "
        "with them, or with a user's own, how many replicas per stage an SLO takes, and states this error. What the "
        "simulation may claim, and what of the scaling rules it may not, is in "
        "[`tools/sim/README.md`](../tools/sim/README.md).\n"
    )


def plot(document: Document, figure: Any) -> None:
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(axes, ("per_s", "ttft_p50_s"), ("requests/s", "TTFT p50, s"), strict=True):
        measured = [each[name] for each in document["held_out"]]
        simulated = [each[f"{name}_simulated"] for each in document["held_out"]]
        most = 1.1 * max(measured + simulated)
        axis.plot([0, most], [0, most], color="grey", linewidth=0.8)
        axis.scatter(measured, simulated)
        axis.set(xlabel=f"measured {title}", ylabel="simulated", xlim=(0, most), ylim=(0, most))


QUESTION = Question(
    name="service_times",
    title="How many replicas do I need?",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=tuple(
        Target(f"simulation, runs not fitted: largest error of {title}", limit, False, largest(key))
        for key, (title, limit) in ERRORS.items()
    ),
    setting="Closed loops and Poisson processes of 0 to 4 pictures, E+P+D and E+PD; lines are where both agree.",
    command="make measure",
)
