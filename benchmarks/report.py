"""Figures over rounds, tables, and ``RESULTS.md``: what each question's runs answer.

A ratio is one of two systems in the same round, under the same requests; given is the median over the rounds, and in
brackets the smallest and the largest.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.questions.question import Question

Document = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        return cls(statistics.median(values), min(values), max(values)) if values else None


def text(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return "–"
    median, least, most = (f"{value:.{digits}f}" for value in (spread.median, spread.least, spread.most))
    return f"{median} ({least} – {most})" if least != most else median


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def target_rows(found: "Mapping[Question, Document]") -> list[list[str]]:
    return [
        target.line(document) or [target.title, target.limits, "–", "not measured"]
        for question, document in found.items()
        for target in question.targets
    ]


INTRODUCTION = """\
# What stages are worth

Written by `benchmarks/bench.py` from `results/*.json`; `python -m benchmarks.bench --report` does it again. On {cpus} \
cores ({processor}) {hardware}; {versions}. Each engine has a core, as if it were a card: what is shown is who waits \
for whom, not how fast a card is. Where no model is named it is `benchmarks/questions/model.py`, of random weights: 0.1 s \
to encode a picture of 448×448, 0.26 s to prefill a thousand tokens, 5 ms for a step of decode. One system runs at a time, \
in another order each round; in a round all get the same requests. Figures are the median over the rounds and, in brackets, \
the smallest and the largest; ratios are taken within a round.
"""


def page(found: "Mapping[Question, Document]") -> str:
    """``found``: the questions with their results, in order."""
    first = next(iter(found.values()))
    facts = dict(first["machine"], versions=", ".join(f"{name} {each}" for name, each in first["versions"].items()))
    parts = [INTRODUCTION.format(**facts), table(["", "target", "found", ""], target_rows(found))]
    for question, document in found.items():
        rounds = len({run.get("round") for run in document["runs"]})
        errors = [f"{run['system']} did not run: {run['error'][:200]}." for run in document["runs"] if "error" in run]
        command = f"`python -m benchmarks.bench --only {question.name}`, {rounds} round{'s' * (rounds != 1)}"
        if question.command:
            command = f"`{question.command}`"
        parts += [
            f"## {question.title}\n",
            f"![{question.title}](results/{question.name}.png)\n",
            " ".join(filter(None, [f"{question.setting} {command}.", *errors])) + "\n",
            question.answer(document),
        ]
    return "\n".join(parts)
