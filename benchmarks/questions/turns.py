"""Conversations of eight turns about the same pictures. What is computed again, and how long do users wait?"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.conversations import clients
from benchmarks.conversations.loads import Load
from benchmarks.questions.model import SIDE
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, ratio, runs_of, spread
from benchmarks.questions.systems import (
    E_P_D,
    E_PD,
    ONE,
    REFERENCE,
    System,
    arguments,
    behind_reference,
    engines,
    stages,
)
from benchmarks.report import table, text
from benchmarks.systems import PROXY_OPTION
from serve_app.stage import Stage
from tools.harness.servers import Server

STEP_TOKENS = 2048
"""In a step at most, and so the encoder cache of an engine: eight pictures."""
LOAD = Load(
    "turns",
    users=4,
    sessions=2,
    turns=8,
    think_s=0.8,
    pictures="first",
    kept=3,
    side=SIDE,
    system=500,
    question=(20, 60),
    answer=32,
)
SYSTEMS: dict[str, System] = {
    E_PD: lambda folder: stages(folder, arguments(STEP_TOKENS), E_PD),
    E_P_D: lambda folder: stages(folder, arguments(STEP_TOKENS), E_P_D),
    REFERENCE: lambda folder: behind_reference(folder, arguments(STEP_TOKENS)),
    ONE: lambda folder: engines(folder, arguments(STEP_TOKENS), 1),
}
KEPT = (
    *("took_s", "failed", "requests", "requests_per_s", "prompt_tokens_meanwhile", "requests_meanwhile", "engines"),
    *("ttft_first_p50_ms", "ttft_first_p99_ms", "ttft_later_p50_ms", "ttft_later_p99_ms", "by_turn"),
    *("cpu_s", "client_cpu_s", "other_cores", "speed_ms"),
)


def pages(server: Server) -> dict[str, str]:
    """Where the engines' metrics are, by stage where the page does not tell it: behind the proxy each has a server."""
    command = [str(word) for word in server.process.args]  # type: ignore[union-attr]
    behind = {stage: command.index(option) + 1 for stage, option in PROXY_OPTION.items() if option in command}
    return {stage: f"{command[at]}/metrics" for stage, at in behind.items()} or {"": f"{server.url}/metrics"}


def visit(name: str, round_: int) -> Run:
    found: Run = {"system": name, "round": round_}
    try:
        with tempfile.TemporaryDirectory(prefix="turns-") as folder, SYSTEMS[name](Path(folder)) as server:
            log = Path(folder) / "clients.log"
            (run,) = clients.drive(server.url, server.mark, [LOAD], round_, log, pages=pages(server))
        if not run["requests"]:
            raise RuntimeError("nothing was answered")
        return found | {key: run[key] for key in KEPT}
    except Exception as error:  # one system's failure is a result, not the end of the others'
        return found | failure(error)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    """Nothing where it is to be quick."""
    for name in order(list(SYSTEMS), round_) if not quick else []:
        yield visit(name, round_)


def calls(run: Run) -> float:
    """Of encoders, per conversation."""
    return sum(requests for stage, _, requests in run["engines"] if stage == Stage.ENCODER) / conversations(run)


def conversations(run: Run) -> float:
    return float(run["requests_meanwhile"]) / LOAD.turns


def cached(run: Run) -> float:
    """The share of prompts that was computed by nobody."""
    computed = sum(tokens for stage, tokens, _ in run["engines"] if stage != Stage.ENCODER)
    return 1 - computed / float(run["prompt_tokens_meanwhile"])


def per_minute(run: Run) -> float:
    return 60 * conversations(run) / float(run["took_s"])


Figure = Callable[[Run], float]


def of(key: str) -> Figure:
    return lambda run: float(run[key])


FIRST, LATER, LAST = of("ttft_first_p50_ms"), of("ttft_later_p50_ms"), of("ttft_later_p99_ms")
COLUMNS: list[tuple[str, Figure, int]] = [
    ("first turn: TTFT p50 ms", FIRST, 0),
    ("later turns: p50", LATER, 0),
    ("p99", LAST, 0),
    ("conversations per minute", per_minute, 1),
    ("cached of the prompts", cached, 2),
    ("encoder calls per conversation", calls, 1),
]
TARGETS = (
    Target(
        f"TTFT p50 of later turns, {E_PD} against the reference",
        0.7,
        False,
        partial(ratio, system=E_PD, against=REFERENCE, figure=LATER),
    ),
)


def answer(document: Document) -> str:
    rows = []
    for name in SYSTEMS:
        if found := runs_of(document, name):
            figures = [text(spread(document, name, figure), digits) for _, figure, digits in COLUMNS]
            asked = sum(run["failed"] + run["requests"] for run in found)
            rows.append([name, *figures, f"{sum(run['failed'] for run in found)} of {asked}"])
    return said(document) + "\n\n" + table(["", *(title for title, _, _ in COLUMNS), "failed"], rows)


def said(document: Document) -> str:
    """What was found, in three sentences."""

    def at(name: str, figure: Figure, digits: int = 0) -> str:
        found = spread(document, name, figure)
        return f"{found.median:.{digits}f}" if found else "–"

    def against(system: str, other: str, figure: Figure) -> str:
        found = ratio(document, system, other, figure)
        return f"{text(found)} ×" if found else "–"

    waits = ", ".join(f"{name} after {at(name, LATER)} ({at(name, LAST)})" for name in SYSTEMS)
    shares = [found.median for name in SYSTEMS if (found := spread(document, name, cached))]
    return (
        f"From the second turn on, first tokens come, p50 and p99 in ms, from {waits}: {E_PD} to the reference "
        f"{against(E_PD, REFERENCE, LATER)}, to one engine {against(E_PD, ONE, LATER)} at p50. "
        f"Every system has {min(shares, default=0):.2f} to {max(shares, default=0):.2f} of the prompts in its prefix cache; "
        f"but the reference calls its encoder for each picture in each turn, {at(REFERENCE, calls)} times per conversation "
        f"(it looks up most), and {E_PD} {at(E_PD, calls)} times, for it knows which pictures the prefix cache has. "
        f"In the same time {E_PD} has {against(E_PD, REFERENCE, per_minute)} the conversations of the reference, "
        f"{against(E_PD, ONE, per_minute)} those of one engine, which has one core less, and "
        f"{against(E_PD, E_P_D, per_minute)} those of {E_P_D}, whose encoder and prefill share a core."
    )


TICKS_MS = [50, 100, 200, 500, 1000]


def plot(document: Document, figure: Any) -> None:
    """Left: how long users wait, by turn. Right: how often encoders are asked."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for name in SYSTEMS:
        runs = runs_of(document, name)
        if not runs:
            continue
        by_turn = list(zip(*([each["ttft_p50_ms"] for each in run["by_turn"]] for run in runs), strict=True))
        places = range(1, 1 + len(by_turn))
        (line,) = left.plot(places, [statistics.median(each) for each in by_turn], marker="o", label=name)
        left.fill_between(places, [*map(min, by_turn)], [*map(max, by_turn)], color=line.get_color(), alpha=0.2, lw=0)
        if any(calls(run) for run in runs):
            right.bar(name, statistics.median(map(calls, runs)), color=line.get_color())
    left.set(xlabel="turn", ylabel="TTFT p50 (ms)", yscale="log")
    left.set_yticks(TICKS_MS, [*map(str, TICKS_MS)])
    left.minorticks_off()
    left.legend()
    right.set(ylabel="encoder calls per conversation")
    right.tick_params(axis="x", rotation=30)


QUESTION = Question(
    "turns",
    "Conversations about the same pictures",
    measure,
    answer,
    plot,
    TARGETS,
    f"{LOAD.users} users with {LOAD.turns} turns each, {LOAD.think_s:g} s of thought on average before each, {LOAD.kept} "
    f"pictures that come with every turn as clients send them, a system prompt of {LOAD.system} words that all share and "
    f"answers of {LOAD.answer} tokens; the answers in the history are fixed, so that all systems get the same prompts.",
)
