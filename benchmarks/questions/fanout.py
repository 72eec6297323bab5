"""A request of eight pictures over one, two, four and eight encoders. What is its first token's time, and what does the
fan-out itself cost?

Two cores cannot encode eight pictures at the same time. So this is measured twice: with real engines, an encoder per core;
and with null engines (``benchmarks/null_engine.py``), whose encoders have 0.1 s for a picture, one after another, while they
use no core. There the ideal is known: the pictures of the busiest encoder, 0.1 s each.
"""

import math
import random
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import null_engine
from benchmarks.conversations.clients import engines as engines_told
from benchmarks.questions import clients
from benchmarks.questions.model import SIDE
from benchmarks.questions.question import Document, Question, Run, failure, runs_of
from benchmarks.questions.systems import DECODE, ENCODER, arguments, pin
from benchmarks.report import Spread, table, text
from benchmarks.streams import WORDS, share
from serve_app.stage import Stage
from tools.harness.servers import Server, serve_run

PICTURES = 8
PICTURE_S = 0.1
"""Of a null encoder; about what the real one has for it."""
REAL, NULL = "real engines", "null engines"
ENCODERS = {REAL: (1, 2), NULL: (1, 2, 4)}
AT_A_TIME = (1, 2)
REQUESTS = {REAL: 8, NULL: 16}
STEP_TOKENS = 2048
STEP_S = 0.005
MAKER = "benchmarks.questions.fanout:asks"
TIMING = re.compile(r'([\w.]+);dur=([\d.]+)(?:;desc="([^"]*)")?')


def asks(seed: int, count: int) -> list[clients.Ask]:
    """Requests of pictures that no other has."""
    said = random.Random(seed)
    found = []
    for _ in range(count):
        seeds = [said.getrandbits(40) for _ in range(PICTURES)]
        content = [clients.picture(each, SIDE) for each in seeds]
        content.append({"type": "text", "text": " ".join(said.choices(WORDS, k=20))})
        found.append(clients.Ask(0.0, "pictures", clients.chat(content, 2)))
    return found


def server(folder: Path, kind: str, encoders: int) -> AbstractContextManager[Server]:
    args = arguments(STEP_TOKENS) | {"accelerator": "cpu", "prefill": None}
    replicas = {"Ingress": 1, ENCODER: encoders, DECODE: 1}
    fixed = {name: {"num_replicas": count, "autoscaling_config": None} for name, count in replicas.items()}
    if kind == REAL:
        return serve_run(folder, args, fixed)
    null = {"null_item_s": PICTURE_S, "null_step_s": STEP_S}
    return serve_run(folder, args | null, fixed, import_path=null_engine.APP)


def encoders_up(one: Server) -> int:
    return sum(stage == Stage.ENCODER for stage, _ in engines_told(one.get("/metrics").text))


def visit(kind: str, encoders: int, round_: int) -> list[Run]:
    where: Run = {"system": kind, "round": round_, "encoders": encoders}
    warm_up = {"seed": 1_000_000 + round_, "count": 2, "at_a_time": 1}
    loads = [
        {
            "seed": 100 * round_ + 10 * encoders + at_a_time,
            "count": REQUESTS[kind],
            "at_a_time": at_a_time,
            "timing": True,
        }
        for at_a_time in AT_A_TIME
    ]
    try:
        with tempfile.TemporaryDirectory(prefix="fanout-") as folder, server(Path(folder), kind, encoders) as one:
            one.wait_until(lambda: encoders_up(one) == encoders, f"{encoders} encoders", 240, every_s=1.0)
            if kind == REAL:
                pin(one, {ENCODER: (0, 1), DECODE: 1})
            log = Path(folder) / "clients.log"
            runs = clients.drive(one.url, one.mark, MAKER, [warm_up, *loads], log)[1:]
        return [where | {"at_a_time": run["load"]["at_a_time"]} | compact(run) for run in runs]
    except Exception as error:  # one system's failure is a result, not the end of the others'
        return [where | failure(error)]


def compact(run: Run) -> Run:
    """TTFT of the requests in order, the pictures of each that the busiest encoder had, and the medians of their steps."""
    whole = [each for each in run["requests"] if "failed" not in each]
    told = [TIMING.findall(each["timing"]) for each in whole]
    steps = [{name: float(ms) for name, ms, _ in each if "." not in name} for each in told]
    names = dict.fromkeys(name for each in steps for name in each)
    return {
        "failed": len(run["requests"]) - len(whole),
        "errors": sorted({each["failed"] for each in run["requests"] if "failed" in each})[:3],
        "ttft_ms": [round(1000 * each["ttft"], 1) for each in whole],
        "busiest": [busiest(each) for each in told],
        "steps_ms": {name: statistics.median(each.get(name, 0.0) for each in steps) for name in names},
        "cpu_s": run["cpu_s"],
        "took_s": run["took_s"],
        "other_cores": run["other_cores"],
        "speed_ms": run["speed_ms"],
    }


def busiest(told: list[tuple[str, str, str]]) -> int:
    """Items of a request that one encoder had, of its header ``server-timing``."""
    replicas = Counter(replica for name, _, replica in told if name.startswith("encode."))
    return max(replicas.values(), default=0)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    """Nothing where it is to be quick."""
    for kind, encoders in [] if quick else [(kind, count) for kind, counts in ENCODERS.items() for count in counts]:
        yield from visit(kind, encoders, round_)


def ideal_ms(encoders: int, at_a_time: int = 1) -> float:
    """Of null encoders, to the last picture of the requests that are under way."""
    return 1000 * PICTURE_S * math.ceil(at_a_time * PICTURES / encoders)


def half(run: Run) -> float:
    return share(run["ttft_ms"], 50)


def slowest(run: Run) -> float:
    return max(run["ttft_ms"])


def cost(run: Run) -> float:
    """What is more than the ideal, at p50."""
    return half(run) - ideal_ms(run["encoders"], run["at_a_time"])


def besides(run: Run) -> float:
    """What is more than the busiest encoder needs, at p50 (one request at a time)."""
    pairs = zip(run["ttft_ms"], run["busiest"], strict=True)
    return share([ttft - 1000 * PICTURE_S * count for ttft, count in pairs], 50)


def busiest_mean(run: Run) -> float:
    return statistics.fmean(run["busiest"])


def at(document: Document, kind: str, encoders: int, at_a_time: int, figure: Callable[[Run], float]) -> Spread | None:
    runs = [run for run in runs_of(document, kind, encoders=encoders, at_a_time=at_a_time) if run["ttft_ms"]]
    return Spread.of([figure(run) for run in runs])


def listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def answer(document: Document) -> str:
    def told(kind: str, figure: Callable[[Run], float], digits: int = 0) -> str:
        found = [at(document, kind, count, 1, figure) for count in ENCODERS[kind]]
        return ", ".join(f"{each.median:.{digits}f}" if each else "–" for each in found)

    counts, even = ENCODERS[NULL], [PICTURES // count for count in ENCODERS[NULL]]
    said = (
        f"With {listed(counts)} null encoders that have 0.1 s for a picture, the first token of a request of {PICTURES} "
        f"pictures comes after {told(NULL, half)} ms: {told(NULL, cost)} ms later than with even shares and no cost of the "
        f"fan-out. The busiest encoder had {told(NULL, busiest_mean, 1)} of the pictures on average, where even is "
        f"{listed(even)}; all that is not its work takes {told(NULL, besides)} ms. "
        f"With {listed(ENCODERS[REAL])} real encoders, each with a core, the first token comes after {told(REAL, half)} ms, "
        f"prefill included."
    )
    rows = []
    for kind, counts in ENCODERS.items():
        for encoders in counts:
            found = [at(document, kind, encoders, together, half) for together in AT_A_TIME]
            more = [at(document, kind, encoders, together, slowest) for together in AT_A_TIME]
            failed = sum(run["failed"] for run in runs_of(document, kind, encoders=encoders))
            if any(found):
                needed = [f"{ideal_ms(encoders):.0f}" if kind == NULL else "–"]
                cells = [text(each, 0) for pair in zip(found, more, strict=True) for each in pair]
                rows.append([f"{kind}, {encoders}", *needed, *cells, str(failed)])
    header = [
        "encoders",
        "they need (ms)",
        "TTFT p50, one at a time",
        "slowest",
        "two at a time: p50",
        "slowest",
        "failed",
    ]
    return said + "\n\n" + table(header, rows)


def plot(document: Document, figure: Any) -> None:
    axis = figure.subplots()
    counts = ENCODERS[NULL]
    axis.plot(counts, [*map(ideal_ms, counts)], color="grey", linestyle="--", label="encoders need (null engines)")
    for kind, colour in ((NULL, "tab:blue"), (REAL, "tab:orange")):
        found = [(count, spread) for count in ENCODERS[kind] if (spread := at(document, kind, count, 1, half))]
        errors = [[s.median - s.least for _, s in found], [s.most - s.median for _, s in found]]
        axis.errorbar(
            [count for count, _ in found],
            [s.median for _, s in found],
            yerr=errors,
            marker="o",
            capsize=3,
            color=colour,
            label=kind + ", prefill included" * (kind == REAL),
        )
    axis.set(xscale="log", xlabel="encoders", ylabel=f"TTFT p50 of {PICTURES} pictures (ms)", ylim=(0, None))
    axis.set_xticks(counts, [*map(str, counts)])
    axis.minorticks_off()
    axis.legend()


QUESTION = Question(
    "fanout",
    "One request over many encoders",
    measure,
    answer,
    plot,
    setting=f"E+PD; requests of {PICTURES} new pictures of {SIDE}×{SIDE} and 20 words, one and two at a time.",
)
