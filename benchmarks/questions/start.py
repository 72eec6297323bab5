"""From `make serve` to the first answer, with an empty page cache and a full one; and a replica more."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.questions.question import Document, Question, Run, Target, failure, runs_of, spread
from benchmarks.questions.systems import E_P_D
from benchmarks.report import Spread, table, text
from benchmarks.startup import MARKS, start

CACHES = ("cold", "warm")
PHASES = {
    "ray": "Ray runs",
    "config": "config checked",
    "engines": "engines loaded",
    "ingress": "ingress has seen every stage",
}


def measure(round_: int, quick: bool) -> Iterator[Run]:
    if quick:
        return
    for cache in CACHES:
        where: Run = {"system": E_P_D, "round": round_, "cache": cache}
        try:
            yield where | start(round_, cache)
        except Exception as error:  # what there is can be kept
            yield where | failure(error)


def up(run: Run) -> float:
    return float(run["up_s"])


def until(phase: str) -> Callable[[Run], float]:
    return lambda run: float(run["until_s"][phase])


def second(document: Document) -> Spread | None:
    """Seconds to a further replica, of all stages and starts."""
    return Spread.of([each for run in runs_of(document, E_P_D) for each in run["second_replica_s"].values()])


def answer(document: Document) -> str:
    cold, warm = (text(spread(document, E_P_D, up, cache=cache), 0) for cache in CACHES)
    rows = [
        [
            "with an empty page cache" if cache == "cold" else "with a full one",
            *(text(spread(document, E_P_D, until(phase), cache=cache), 0) for phase in MARKS),
            text(spread(document, E_P_D, up, cache=cache), 0),
            text(spread(document, E_P_D, lambda run: float(run["cpu_s"]), cache=cache), 0),
        ]
        for cache in CACHES
    ]
    return (
        f"`make serve` can answer after {cold} s with an empty page cache and {warm} s with a full one, on two cores. One "
        "process loads vLLM while Ray starts, and replicas and engines are forked from it (only with vLLM's CPU build: a "
        f"card forbids it). A second replica takes calls {text(second(document), 0)} s after it was asked for.\n\n"
        + table(["seconds until", *PHASES.values(), "it answers", "CPU-s"], rows)
    )


def plot(document: Document, figure: Any) -> None:
    axis = figure.subplots()
    for place, cache in enumerate(CACHES):
        before = 0.0
        for colour, phase in enumerate([*MARKS, "answers"]):
            found = spread(document, E_P_D, up if phase == "answers" else until(phase), cache=cache)
            if found and found.median > before:
                label = PHASES.get(phase, "answers") if not place else None
                axis.barh(place, found.median - before, left=before, color=f"C{colour}", label=label)
                before = found.median
    axis.set_yticks(range(len(CACHES)), ["empty page cache", "full page cache"])
    axis.set(xlabel="seconds from `make serve`")
    axis.legend(fontsize=7, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.3))


QUESTION = Question(
    name="start",
    title="How long does a start take?",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target("start with an empty page cache, s", 90, False, lambda found: spread(found, E_P_D, up, cache="cold")),
        Target("start with a full page cache, s", 40, False, lambda found: spread(found, E_P_D, up, cache="warm")),
        Target("a second replica, s", 20, False, second),
    ),
    setting="E+P+D on the built-in model of random weights; the second replica is one of encoder and one of decode.",
)
