"""What `benchmarks/RESULTS.md` says of the runs in `benchmarks/results/bench.json`, and the plots beside it.

A ratio is one of two systems in the same round, under the same requests; given is the median over the rounds, and in
brackets the smallest and the largest.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import cpu
from benchmarks.load import TARGET, TEXT, Cell
from benchmarks.systems import SYSTEMS

PAGE = Path(__file__).parent / "RESULTS.md"
PLOTS = Path(__file__).parent / "results"
PROXY, ONE = "proxy", "one engine"
OURS = ("ours E+P+D", "ours E+P+D, short at D", "ours E+PD")

Document = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        return cls(statistics.median(values), min(values), max(values)) if values else None


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


@dataclass(frozen=True)
class Target:
    """A ratio to another system that is to be at least, or at most, so large."""

    title: str
    metric: Metric
    cell: Cell
    against: str
    limit: float
    at_least: bool = False

    def met(self, ratio: Spread) -> bool:
        return ratio.median >= self.limit if self.at_least else ratio.median <= self.limit


TARGETS = [
    Target("requests/s against the reference's way", RATE, TARGET, PROXY, 3.0, at_least=True),
    Target("requests/s against one engine", RATE, TARGET, ONE, 0.6, at_least=True),
    Target("time to first token p50 against the reference's way", TTFT[0], TARGET, PROXY, 0.35),
    Target("CPU-seconds per request against the reference's way", CPU, TARGET, PROXY, 0.4),
    Target("time per output token against one engine", TPOT, TARGET, ONE, 1.3),
    Target("text only, time to first token p50 against one engine", TTFT[0], TEXT, ONE, 1.5),
]
IDLE_LIMIT = 0.03


def systems_of(document: Document) -> list[str]:
    return [name for name in SYSTEMS if any(visit["system"] == name for visit in document["visits"])]


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


def text(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return "–"
    median, least, most = (f"{value:.{digits}f}" for value in (spread.median, spread.least, spread.most))
    return f"{median} ({least} – {most})" if least != most else median


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def verdict(target: Target, found: Spread | None) -> str:
    return "–" if found is None else f"{text(found)} {'met' if target.met(found) else '**missed**'}"


def idle(document: Document, system: str) -> tuple[Spread | None, Spread | None]:
    """Cores per engine, and cores of all other processes together."""
    found = [visit["idle"] for visit in document["visits"] if visit["system"] == system and "idle" in visit]
    per_engine = [each["cores"].get(cpu.ENGINES, 0.0) / each["engines"] for each in found if each["engines"]]
    around = [sum(each["cores"].values()) - each["cores"].get(cpu.ENGINES, 0.0) for each in found]
    return Spread.of(per_engine), Spread.of(around)


def failures(document: Document, system: str) -> tuple[int, int]:
    """Requests that failed, of how many."""
    found = [run for visit in document["visits"] if visit["system"] == system for run in visit["runs"]]
    return sum(run["failed"] for run in found), sum(run["requests"] for run in found)


def same_answers(found: dict[int, Run], expected: dict[int, Run]) -> str:
    """How many of the answers are one engine's: all systems decode greedily."""
    pairs = [
        pair
        for round_ in found.keys() & expected.keys()
        for pair in zip(*(each[round_].get("answers", "").split() for each in (found, expected)), strict=False)
    ]
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}" if pairs else "–"


def target_rows(document: Document) -> list[list[str]]:
    rows = []
    for target in TARGETS:
        found = [ratio(document, target.metric, target.cell, system, target.against) for system in OURS]
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g} ×"
        rows.append([target.title, limit, *(verdict(target, spread) for spread in found)])
    per_engine = [idle(document, system)[0] for system in OURS]
    states = ["–" if each is None else "met" if each.median < IDLE_LIMIT else "**missed**" for each in per_engine]
    cores = [f"{text(each, 3)} {state}" for each, state in zip(per_engine, states, strict=True)]
    rows.append(["idle, cores per engine", f"< {IDLE_LIMIT:g}", *cores])
    failed = [failures(document, system) for system in OURS]
    rows.append(["failed requests, all loads", "0", *(f"{count} of {of}" for count, of in failed)])
    return rows


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
        [f"{system} / {against}", *(text(ratio(document, metric, cell, system, against)) for metric in COMPARED)]
        for system in systems
        for against in (PROXY, ONE)
        if system in OURS and against in systems
    ]


INTRODUCTION = """\
# Benchmark

Written by `benchmarks/report.py` from `benchmarks/results/bench.json` (`{command}`). Rounds: {rounds}, on {cpus} cores
({processor}) {hardware}, model `{model}`; {versions}. Images of {image_size}×{image_size}, {text_tokens} text tokens.

One system runs at a time, in another order each round; in a round all get the same requests. Figures are the median over
the rounds and, in brackets, the smallest and the largest; ratios are taken within a round. CPU-seconds are those of all
processes of a system, Ray's included. `proxy` is the reference's way (`benchmarks/baselines/proxy.py`); `three engines` are
as many as E+P+D has, each by itself, behind the same proxy. That proxy passes streams on in pieces of 1,024 bytes, and
vLLM's load generator drops white space at the ends of a piece: hence their few failures and other answers.
"""


def cpu_table(document: Document, systems: list[str], cell: Cell) -> str:
    """CPU per request by kind of process, where a system has that kind."""
    found = {system: runs(document, system, cell) for system in systems}
    kinds = list(
        dict.fromkeys(kind for each in found.values() for run in each.values() for kind in run.get("cpu_s", {}))
    )
    rows = []
    for system, each in found.items():
        answered = [run for run in each.values() if run["completed"]]
        shares = [
            [1000 * run["cpu_s"][kind] / run["completed"] for run in answered if kind in run["cpu_s"]] for kind in kinds
        ]
        rows.append([system, *(text(Spread.of(share), 1) for share in shares)])
    return table(["system", *kinds], rows)


def page(document: Document) -> str:
    visits = document["visits"]
    systems = systems_of(document)
    cells = list(dict.fromkeys(Cell(**run["cell"]) for visit in visits for run in visit["runs"]))
    facts = document["machine"] | document["workload"] | {"command": document["command"]}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    facts["rounds"] = len({visit["round"] for visit in visits})
    parts = [
        INTRODUCTION.format(**facts),
        f"## Targets\n\n{TARGET.name}\n",
        table(["", "target", *OURS], target_rows(document)),
        "The targets with a null engine are not measured here.\n",
        "## Idle\n\nCores, over 10 s with all stages up and no requests.\n",
        table(
            ["system", "per engine", "all other processes"],
            [[system, *(text(each, 3) for each in idle(document, system))] for system in systems],
        ),
    ]
    parts += [f"## CPU-ms per request\n\n{TARGET.name}\n", cpu_table(document, systems, TARGET)]
    for cell in cells:
        header = ["system", *(metric.title for metric in METRICS), "failed", "answers as one engine's"]
        rounds = len({round_ for system in systems for round_ in runs(document, system, cell)})
        parts += [
            f"## {cell.name} ({rounds} round{'s' * (rounds != 1)})\n",
            table(header, cell_rows(document, systems, cell)),
        ]
        if rows := ratio_rows(document, systems, cell):
            parts.append(table(["ratio", *(metric.title for metric in COMPARED)], rows))
    errors = [f"- round {each['round'] + 1}, {each['system']}: {each['error']}" for each in visits if "error" in each]
    if errors:
        parts += ["## What went wrong\n", "\n".join(errors) + "\n"]
    return "\n".join(parts)


def plot(document: Document) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = systems_of(document)
    figure, axes = pyplot.subplots(1, len(COMPARED), figsize=(13, 3.5), layout="constrained")
    for axis, metric in zip(axes, COMPARED, strict=True):
        for place, system in enumerate(systems):
            if spread := Spread.of(list(values(runs(document, system, TARGET), metric).values())):
                below, above = spread.median - spread.least, spread.most - spread.median
                axis.bar(place, spread.median, yerr=[[below], [above]], capsize=4)
        axis.set_xticks(range(len(systems)), systems, rotation=40, ha="right")
        axis.set_title(metric.title)
    figure.suptitle(TARGET.name)
    figure.savefig(PLOTS / "bench.png", dpi=110)

    loads = [Cell(TARGET.images, TARGET.tokens, at_a_time) for at_a_time in (1, 8, 32)]
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for system in systems:
        found = [(cell, Spread.of(list(values(runs(document, system, cell), TTFT[0]).values()))) for cell in loads]
        known = [(cell.at_a_time, spread) for cell, spread in found if spread is not None]
        errors = [[s.median - s.least for _, s in known], [s.most - s.median for _, s in known]]
        axis.errorbar(
            [n or 0 for n, _ in known], [s.median for _, s in known], yerr=errors, marker="o", capsize=3, label=system
        )
    axis.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel=TTFT[0].title, title=TARGET.kind)
    axis.set_xticks([1, 8, 32], ["1", "8", "32"])
    axis.legend()
    figure.savefig(PLOTS / "bench_load.png", dpi=110)


def write(document: Document) -> None:
    PAGE.write_text(page(document))
    if find_spec("matplotlib") is None:
        print('no plots: matplotlib is not installed (pip install -e ".[bench]")')
        return
    plot(document)
