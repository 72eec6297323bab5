"""What a token costs around the engines, and what that makes of rates: the rows of the targets, one command.

``python -m benchmarks.tokens`` starts one system after the other, in another order every round, and prints a table per row
and the targets: medians over the rounds, with the smallest and the largest. All runs stay in
``benchmarks/results/tokens.json``; ``--add`` adds rounds to what is there.

a  engines that make a token per stream every 25 ms, as a card's, and cost nothing (``null_engine.py``)
b  the same without a pace, text of one token
c  two ingress replicas against one, as in a
d  real engines by ``chunk_interval_s``
e  real engines against one engine, long answers
f  real engines against the reference's proxy

CPU time is that of all processes of a system, Ray's idle ones included (``others``). The clients are a process of their own
that is not counted, but on a small machine takes its part of the cores; so do other programs: both are told. ``speed``: CPU
ms of a fixed piece of Python meanwhile; figures compare at like values. So CPU time is held against its target as it would
be at ``PACE_MS``, and only pairs of like speed count for a ratio; the tables have what was measured.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cpu, streams
from benchmarks.bench import head, order
from benchmarks.null_engine import APP, STEP_S
from benchmarks.report import Spread, table, text
from benchmarks.streams import PACE_MS, Wave
from benchmarks.systems import System, ours, reference
from tools.harness.servers import Server, vllm_server

RESULT = Path(__file__).parent / "results" / "tokens.json"
CORES = os.cpu_count() or 1
MANY_CORES = CORES >= 8
"""Enough for two ingress replicas, the rest of the system and the clients."""

Run = dict[str, Any]
Document = dict[str, Any]
Figure = Callable[[Run], float]

# ---- systems

Args = dict[str, Any]
E_PD: Args = {"prefill": None}
E_P_D: Args = {}
CROWD: Args = {"engine_args": {"max_num_seqs": 128}}
"""The demo model's engines would run 32 requests at a time."""
WIDE: Args = {"engine_args": {"max_num_seqs": 1024}, "decode": {"max_ongoing_requests": 1024}}
INTERVALS_S = (0.0, 0.01, 0.02, 0.05)


@contextmanager
def two_ingresses(folder: Path) -> Iterator[Server]:
    with ours(folder, E_PD | WIDE, APP, ingresses=2) as server:

        def both() -> bool:
            return bool(server.get("/status").json()[0]["replicas"] == {"RUNNING": 2})

        server.wait_until(both, "the second ingress", 120)
        yield server


NULL_E_PD, NULL_E_P_D, AT_ONCE = "null E+PD", "null E+P+D", "null E+P+D, no pace"
NULL_SLOWER = "null E+PD, 0.05 s"
ONE_INGRESS, TWO_INGRESSES = "null E+PD, one ingress", "null E+PD, two ingresses"
ONE, PROXY, REAL_E_PD, REAL_E_P_D = "one engine", "proxy", "E+PD", "E+P+D"
BY_INTERVAL = {f"E+PD, {interval_s:g} s": interval_s for interval_s in INTERVALS_S}

SYSTEMS: dict[str, System] = {
    NULL_E_PD: lambda folder: ours(folder, E_PD, APP),
    NULL_E_P_D: lambda folder: ours(folder, E_P_D, APP),
    AT_ONCE: lambda folder: ours(folder, E_P_D | {"null_step_s": 0.0}, APP),
    NULL_SLOWER: lambda folder: ours(folder, E_PD | {"chunk_interval_s": 0.05}, APP),
    ONE_INGRESS: lambda folder: ours(folder, E_PD | WIDE, APP),
    TWO_INGRESSES: two_ingresses,
    **{
        name: partial(ours, topology=E_PD | CROWD | {"chunk_interval_s": interval_s})
        for name, interval_s in BY_INTERVAL.items()
    },
    ONE: lambda folder: vllm_server(folder, CROWD),
    PROXY: lambda folder: reference(folder, CROWD),
    REAL_E_PD: lambda folder: ours(folder, E_PD | CROWD),
    REAL_E_P_D: lambda folder: ours(folder, E_P_D | CROWD),
}

# ---- rows

CARD = Wave(128, 200)
FIRST_TOKEN = Wave(16, 1, answers=64)
SCALED = Wave(640 if MANY_CORES else 128, 200)
LONG = Wave(64, 256, answers=2)
IMAGES, SHORT = Wave(8, 16, answers=16, images=2), Wave(32, 16, answers=24)


@dataclass(frozen=True)
class Row:
    title: str
    systems: tuple[str, ...]
    waves: tuple[Wave, ...]
    per: str = "token"
    """What CPU time is divided by: µs per token, or ms per request."""


ROWS = {
    "a": Row(
        f"Engines at a card's pace, {STEP_S * 1000:g} ms a token, text",
        (NULL_E_PD, NULL_SLOWER, NULL_E_P_D),
        (Wave(8, 200), Wave(32, 200), CARD),
    ),
    "b": Row("Engines without a pace, text, one token", (AT_ONCE,), (FIRST_TOKEN,), "request"),
    "c": Row("Ingress replicas", (ONE_INGRESS, TWO_INGRESSES), (SCALED,)),
    "d": Row(
        "Real engines by `chunk_interval_s`",
        tuple(BY_INTERVAL),
        (Wave(8, 256, answers=3), Wave(32, 256, answers=2), Wave(128, 128)),
    ),
    "e": Row("Real engines against one engine", (ONE, REAL_E_PD, REAL_E_P_D), (LONG,)),
    "f": Row(
        "Real engines against the reference's proxy", (PROXY, REAL_E_PD, REAL_E_P_D), (IMAGES, SHORT, LONG), "request"
    ),
}
QUICK = {"a": Row(ROWS["a"].title, (NULL_E_P_D,), (CARD,)), "b": ROWS["b"]}


def plan(rows: Iterable[Row]) -> dict[str, list[Wave]]:
    """Of each system the waves that some row needs, each once."""
    found: dict[str, list[Wave]] = {}
    for row in rows:
        for system in row.systems:
            waves = found.setdefault(system, [])
            waves += [wave for wave in row.waves if wave not in waves]
    return found


def warm_up(waves: list[Wave]) -> list[Wave]:
    with_images = [Wave(4, 4, answers=4, images=2)] if any(wave.images for wave in waves) else []
    return [*with_images, Wave(max(wave.streams for wave in waves), 4, answers=2)]


def visit(system: str, waves: list[Wave], round_: int, patience_s: float) -> list[Run]:
    """One system in one round: started, warmed up, measured, ended. Its failure is a result, not the end of the others'."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="tokens-") as folder, SYSTEMS[system](Path(folder)) as server:
            first = warm_up(waves)
            log = Path(folder) / "streams.log"
            streams.drive(server.url, server.mark, first, 1_000_000 * round_, log)
            runs = streams.drive(server.url, server.mark, waves, 1_000_000 * round_ + 500_000, log, patience_s)
    except Exception as error:
        return [{"system": system, "round": round_, "error": f"{type(error).__name__}: {error}"[-2000:]}]
    print(f"round {round_ + 1}, {system}: {time.monotonic() - began:.0f} s", flush=True)
    return [{"system": system, "round": round_} | run for run in runs]


def write(document: Document, path: Path) -> None:
    """A run a line."""
    runs = ",\n".join(json.dumps(run, default=str) for run in document["runs"])
    above = json.dumps({key: value for key, value in document.items() if key != "runs"}, indent=1)
    path.write_text(f'{above[:-2]},\n "runs": [\n{runs}\n]}}\n')


def short(value: Any) -> Any:
    """A run with four digits of each figure."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- figures


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


def of(key: str, times: float = 1.0) -> Figure:
    return lambda run: float(run[key]) * times


def of_made(run: Run) -> float:
    """Tokens delivered of those that an engine at its pace would have made of these streams meanwhile."""
    return float(run["tokens_per_s"]) * STEP_S / Wave(**run["wave"]).streams


RATE, REQUESTS, TTFT, SPEED = of("tokens_per_s"), of("requests_per_s"), of("ttft_p50_ms"), of("speed_ms")
LIKE = 0.15
INGRESS, DECODE = "Ingress replica", "Decode replica"
KINDS = (
    INGRESS, "HTTP proxy", DECODE, "Prefill replica", "Encoder replica", cpu.ENGINES, "API servers", cpu.OTHERS
)  # fmt: skip


def values(document: Document, system: str, wave: Wave, figure: Figure) -> dict[int, float]:
    """By round, where anything was answered."""
    return {
        run["round"]: figure(run)
        for run in document["runs"]
        if run["system"] == system and "error" not in run and Wave(**run["wave"]) == wave and answered(run)
    }


def spread(document: Document, system: str, wave: Wave, figure: Figure) -> Spread | None:
    return Spread.of(list(values(document, system, wave, figure).values()))


def at_pace(figure: Figure) -> Figure:
    """CPU time as it would be on the quiet machine."""
    return lambda run: figure(run) * PACE_MS / SPEED(run)


def ratio(document: Document, wave: Wave, figure: Figure, system: str, against: str) -> Spread | None:
    """Within each round, where both ran at a like speed."""
    ours, theirs = (values(document, name, wave, figure) for name in (system, against))
    our_speed, their_speed = (values(document, name, wave, SPEED) for name in (system, against))
    return Spread.of(
        [
            ours[round_] / theirs[round_]
            for round_ in ours.keys() & theirs.keys()
            if theirs[round_] and abs(our_speed[round_] / their_speed[round_] - 1) <= LIKE
        ]
    )


def ingress_gain(document: Document) -> Spread | None:
    """Of a second ingress replica: in tokens/s where there are cores for it, else by what a token costs both."""
    if MANY_CORES:
        return ratio(document, SCALED, RATE, TWO_INGRESSES, ONE_INGRESS)
    found = ratio(document, SCALED, cpu_us(INGRESS), ONE_INGRESS, TWO_INGRESSES)
    return found and Spread(2 * found.median, 2 * found.least, 2 * found.most)


@dataclass(frozen=True)
class Target:
    row: str
    title: str
    limit: float
    at_least: bool
    figure: Callable[[Document], Spread | None]

    def line(self, document: Document) -> list[str] | None:
        if (found := self.figure(document)) is None:
            return None
        met = found.median >= self.limit if self.at_least else found.median <= self.limit
        digits = 2 if self.limit < 5 else 1
        said = f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        return [self.title, said, text(found, digits), "met" if met else "**missed**"]


def at_most(row: str, title: str, limit: float, system: str, wave: Wave, figure: Figure) -> Target:
    return Target(row, title, limit, False, partial(spread, system=system, wave=wave, figure=at_pace(figure)))


def against(
    row: str, title: str, limit: float, wave: Wave, figure: Figure, system: str, other: str, at_least: bool = True
) -> Target:
    found = partial(ratio, wave=wave, figure=figure, system=system, against=other)
    return Target(row, f"{title}: {system}", limit, at_least, found)


TARGETS = [
    *(
        target
        for system in (NULL_E_PD, NULL_E_P_D)
        for target in (
            at_most("a", f"CPU µs per token, all processes: {system}", 120, system, CARD, cpu_us()),
            at_most("a", f"– decode replica: {system}", 15, system, CARD, cpu_us(DECODE)),
            Target(
                "a",
                f"– tokens delivered of those made: {system}",
                0.92,
                True,
                partial(spread, system=system, wave=CARD, figure=of_made),
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
    Target("c", "two ingress replicas against one", 1.8, True, ingress_gain),
]

# ---- the page


def row_table(document: Document, row: Row) -> str:
    cost, unit = (cpu_us, "µs per token") if row.per == "token" else (cpu_ms, "ms per request")
    columns: list[tuple[str, Figure, int]] = [
        ("speed ms", SPEED, 2),
        ("tokens/s", RATE, 0),
        ("requests/s", REQUESTS, 1),
        ("TTFT p50 ms", TTFT, 0),
    ]
    if any(wave.tokens > 1 for wave in row.waves):
        columns += [
            ("TPOT p50 ms", of("tpot_p50_ms"), 1),
            ("p99", of("tpot_p99_ms"), 1),
            ("pause p99 ms", of("gap_p99_ms"), 0),
            ("chunks per token", of("chunks_per_token"), 2),
        ]
    if row is ROWS["a"] or row is QUICK["a"]:
        columns.append(("of those made", of_made, 2))
    runs = [run for run in document["runs"] if run["system"] in row.systems and "error" not in run]
    kinds = [kind for kind in KINDS if any(run["cpu_s"].get(kind, 0.0) > 0 for run in runs)]
    digits = 0 if row.per == "token" else 1
    columns.append((f"CPU {unit}", cost(), digits))
    columns += [(kind.removesuffix(" replica"), cost(kind), digits) for kind in kinds]
    columns += [
        ("clients, cores", lambda run: float(run["client_cpu_s"]) / float(run["took_s"]), 2),
        ("other programs, cores", of("other_cores"), 2),
    ]
    lines = []
    for wave in row.waves:
        for system in row.systems:
            failed = [run["failed"] for run in runs if run["system"] == system and Wave(**run["wave"]) == wave]
            if failed:
                figures = [text(spread(document, system, wave, figure), digits) for _, figure, digits in columns]
                lines.append([system, wave.name, *figures, f"{sum(failed)} of {len(failed) * wave.requests}"])
    return table(["system", "streams × tokens", *(title for title, _, _ in columns), "failed"], lines)


def page(document: Document, rows: dict[str, Row]) -> str:
    parts = []
    for name, row in rows.items():
        if any(run["system"] in row.systems for run in document["runs"]):
            parts.append(f"## {name}. {row.title}\n\n{row_table(document, row)}")
    lines = [line for target in TARGETS if target.row in rows and (line := target.line(document))]
    if lines:
        parts.append("## Targets\n\n" + table(["", "target", "found", ""], lines))
    errors = [
        f"- {run['system']}, round {run['round'] + 1}: {run['error']}" for run in document["runs"] if "error" in run
    ]
    if errors:
        parts.append("## Failed to run\n\n" + "\n".join(errors) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="128 streams and one token, E+P+D, null engines, one round"
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument(
        "--wait", type=float, default=0.0, help="seconds, at most, before each wave for a quiet machine"
    )
    parser.add_argument("--add", action="store_true", help="keep the rounds of the last run")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="print the tables of the last run again")
    options = parser.parse_args()
    rows = QUICK if options.quick else {name: ROWS[name] for name in options.rows.split(",")}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended
    if not options.report:
        waves = plan(rows.values())
        document = head("benchmarks.tokens", [], "without a GPU", "demo-random") | {"runs": []}
        document = {key: document[key] for key in ("command", "machine", "versions", "runs")}
        begun = 0
        if options.add and options.out.exists():
            last = json.loads(options.out.read_text())
            document |= {"command": f"{last['command']}; {document['command']}", "runs": last["runs"]}
            begun = 1 + max(run["round"] for run in last["runs"])
        for round_ in range(begun, begun + (options.rounds or (1 if options.quick else 3))):
            for system in order(list(waves), round_):
                document["runs"] += [short(run) for run in visit(system, waves[system], round_, options.wait)]
                write(document, options.out)
    print(page(json.loads(options.out.read_text()), rows))


if __name__ == "__main__":
    main()
