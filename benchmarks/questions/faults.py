"""The same kills and the same overload: what fails, what is answered wrongly, and when all is well again.

A steady load of one picture and 16 tokens per request; the engine of a stage is killed in its midst. Then four times as many
requests as can be answered, and a low load after them. Every request has a picture of its own, so that no cache answers it,
and is compared with what one engine says.
"""

import functools
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.questions.clients import Ask, chat, drive, picture
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, runs_of
from benchmarks.questions.systems import DECODE, E_P_D, ENCODER, PREFILL, REFERENCE, System, engine_processes
from benchmarks.report import Spread, table
from benchmarks.systems import behind_proxy, ours, reference_engine
from serve_app.stage import Stage
from tools.harness.servers import Server, cpu_config, vllm_server, wait_for_replicas

TOKENS = 16
SIDE = 224
"""Pixels of a picture's side."""
PER_S = 2.0
KILL_S = 5.0
"""Seconds of steady load before the kill."""
OVERLOAD, OVERLOAD_S = 4, 10.0
LOW_S = 20.0
"""Seconds of steady load after the overload."""
PROBE, AT_A_TIME = 48, 8
"""Requests that tell how many a system can answer in a second."""
SOON_S = 5.0
"""A request that takes longer is answered late."""
HANGS_S = 60.0
LIMIT_S = 90.0
"""Clients give up."""
FAULTS = {"encoder": ENCODER, "prefill": PREFILL, "decode": DECODE}
TOO_MUCH = "overload"
PHASES = [TOO_MUCH, *FAULTS]
FIRST = {phase: 10_000 * number for number, phase in enumerate(PHASES, 1)}
"""Number of each phase's first picture."""
LOW, PROBED = 5_000, 8_000
"""From the first picture of the overload on: pictures of the load after it, and of the requests that tell the capacity."""
COMPARED = 60
"""Requests of the overload itself that are compared with one engine's."""


# ---- in the clients' process


def ask(at: float, number: int) -> Ask:
    return Ask(
        at, str(number), chat([picture(number, SIDE), {"type": "text", "text": "What is in this picture?"}], TOKENS)
    )


def steady(first: int, seconds: float, begin: float = 0.0) -> list[Ask]:
    return [ask(begin + number / PER_S, first + number) for number in range(int(PER_S * seconds))]


def killing(first: int, seconds: float, pid: int) -> list[Ask]:
    """A steady load in whose midst a process is killed."""
    timer = threading.Timer(KILL_S, kill, [pid])
    timer.daemon = True
    timer.start()
    return steady(first, seconds)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def at_once(first: int, requests: int) -> list[Ask]:
    return [ask(0.0, first + number) for number in range(requests)]


def overload(first: int, per_s: float) -> list[Ask]:
    much = [ask(number / per_s, first + number) for number in range(int(OVERLOAD_S * per_s))]
    return much + steady(first + LOW, LOW_S, OVERLOAD_S)


# ---- the systems


@contextmanager
def scripts(folder: Path) -> Iterator[Server]:
    """The reference as its scripts start it: nothing starts a server again that ended."""
    storage = folder / "ec"
    storage.mkdir()
    config = cpu_config({"ec": {"connector": "ECExampleConnector", "storage_path": str(storage)}})
    with behind_proxy(folder, [reference_engine(config, stage) for stage in Stage]) as server:
        yield server


SYSTEMS: dict[str, System] = {REFERENCE: scripts, E_P_D: lambda folder: ours(folder, {})}
AFTER_S = {
    REFERENCE: dict.fromkeys(FAULTS, 10.0),
    E_P_D: {"encoder": 15.0, "prefill": 25.0, "decode": 50.0},
}
"""Seconds of steady load after a kill: so many that a system is well again, if it ever is."""
LIVES = {REFERENCE: [[TOO_MUCH, "encoder"], ["prefill"], ["decode"]], E_P_D: [PHASES]}
"""The phases that a system goes through from each start to its end: one whose engine is not started again ends with it."""


# ---- a round


@functools.cache
def answers_of_one_engine() -> dict[str, str]:
    """Checksums of its answers by the pictures' numbers."""
    wanted = [(FIRST[phase], int(PER_S * (KILL_S + AFTER_S[E_P_D][phase]))) for phase in FAULTS]
    wanted += [(FIRST[TOO_MUCH], COMPARED), (FIRST[TOO_MUCH] + LOW, int(PER_S * LOW_S))]
    loads = [{"first": first, "requests": requests, "at_a_time": AT_A_TIME} for first, requests in wanted]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, vllm_server(Path(folder), {}) as server:
        runs = drive(server.url, server.mark, f"{__name__}:at_once", loads, Path(folder) / "clients.log")
    rows = [row for run in runs for row in run["requests"]]
    if failed := [row["failed"] for row in rows if "failed" in row]:
        raise RuntimeError(f"one engine failed {len(failed)} of {len(rows)} requests: {failed[0]}")
    return {row["kind"]: row["text"] for row in rows}


def verdict(row: dict[str, Any], right: dict[str, str]) -> str:
    """What became of a request; ``refused``: at once, with a status that says that there is too much."""
    if "failed" in row:
        return "refused" if row["failed"].startswith(("429 ", "503 ")) and row["took"] < SOON_S else "failed"
    if right.get(row["kind"], row["text"]) != row["text"]:
        return "wrong"
    return "right" if row["took"] <= SOON_S else "late"


def judged(rows: list[dict[str, Any]], right: dict[str, str], since: float) -> Run:
    """What became of a phase's requests. ``since``: the second in which the engine was killed, or the overload ended; from
    ``recovered_s`` after it on, all answers were right and in time (None: not to the end)."""
    rows = sorted(rows, key=lambda row: float(row["at"]))
    verdicts = [verdict(row, right) for row in rows]
    bad = [row["at"] for row, said in zip(rows, verdicts, strict=True) if said != "right"]
    again = next((row["at"] for row in rows if row["at"] > max(bad, default=-1.0)), None)
    seconds: dict[int, list[int]] = {}
    for row, said in zip(rows, verdicts, strict=True):
        each = seconds.setdefault(math.floor(row["at"] - since), [0, 0])
        each[0] += said == "right"
        each[1] += 1
    return {
        "requests": len(rows),
        **{said: verdicts.count(said) for said in ("failed", "refused", "wrong", "late")},
        "compared": sum(row["kind"] in right and "failed" not in row for row in rows),
        "hanging": sum(row["took"] > HANGS_S for row in rows),
        "slowest_s": max(row["took"] for row in rows),
        "recovered_s": 0.0 if not bad else None if again is None else max(again - since, 0.0),
        "seconds": [[second, *seconds[second]] for second in sorted(seconds)],
        "why": next((row["failed"][:200] for row in rows if "failed" in row), ""),
    }


def play(server: Server, maker: str, load: dict[str, Any]) -> Run:
    (run,) = drive(server.url, server.mark, f"{__name__}:{maker}", [load], server.log.parent / "clients.log")
    return run


def one_kill(server: Server, name: str, phase: str, right: dict[str, str]) -> Run:
    load = {"first": FIRST[phase], "seconds": KILL_S + AFTER_S[name][phase], "limit_s": LIMIT_S}
    run = play(server, "killing", load | {"pid": engine_processes(server)[FAULTS[phase]][0].pid})
    return {"phase": phase, "speed_ms": run["speed_ms"]} | judged(run["requests"], right, KILL_S)


def too_much(server: Server, right: dict[str, str]) -> Run:
    first = FIRST[TOO_MUCH]
    probe = play(server, "at_once", {"first": first + PROBED, "requests": PROBE, "at_a_time": AT_A_TIME})
    capacity = PROBE / max(row["at"] + row["took"] for row in probe["requests"])
    run = play(server, "overload", {"first": first, "per_s": OVERLOAD * capacity, "limit_s": LIMIT_S})
    found = judged(run["requests"], right, OVERLOAD_S)
    return {"phase": TOO_MUCH, "capacity": capacity, "speed_ms": run["speed_ms"]} | found


def visit(name: str, phases: list[str], round_: int, right: dict[str, str]) -> Iterator[Run]:
    """A system from its start to its end. Where it fails, that is a result, and not the end of the others'."""
    where: Run = {"system": name, "round": round_}
    try:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder, SYSTEMS[name](Path(folder)) as server:
            play(server, "at_once", {"first": 1, "requests": PROBE, "at_a_time": AT_A_TIME})  # to warm up
            for phase in phases:
                if name == E_P_D:
                    wait_for_replicas(server, 1)
                yield where | (too_much(server, right) if phase == TOO_MUCH else one_kill(server, name, phase, right))
    except Exception as error:
        yield where | failure(error)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    if quick:
        return
    right = answers_of_one_engine()
    for name in order(list(SYSTEMS), round_):
        for phases in LIVES[name]:
            yield from visit(name, phases, round_, right)


# ---- what is told


def total(document: Document, name: str, figure: str, **where: Any) -> int:
    return int(sum(run[figure] for run in runs_of(document, name, **where)))


def kills(document: Document, name: str, figure: str) -> int:
    return sum(total(document, name, figure, phase=phase) for phase in FAULTS)


def recovered(runs: list[Run]) -> str:
    """The slowest of the rounds."""
    if not runs:
        return "–"
    found = [run["recovered_s"] for run in runs]
    return "never" if None in found else f"{max(found):.0f}"


def answer(document: Document) -> str:
    def said(name: str, figure: str) -> str:
        return f"{kills(document, name, figure)} of {kills(document, name, 'requests')}"

    wrong = [sum(total(document, name, "wrong", phase=phase) for phase in PHASES) for name in SYSTEMS]
    told = [f"{phase} {recovered(runs_of(document, E_P_D, phase=phase))}" for phase in FAULTS]
    slowest = max((run["slowest_s"] for phase in FAULTS for run in runs_of(document, E_P_D, phase=phase)), default=0.0)
    sentences = (
        f"When a stage's engine is killed, E+P+D fails {said(E_P_D, 'failed')} requests and the reference "
        f"{said(REFERENCE, 'failed')}: nothing starts its servers again, and no stage does another's work. E+P+D "
        f"answers all rightly and in time again after so many seconds: {', '.join(told)}; the longest wait was "
        f"{slowest:.0f} s. Of all answers {wrong[1]} of E+P+D and {wrong[0]} of the reference were not one engine's."
    )
    names = ["failed", "refused", "late", "wrong", "over 60 s"]
    keys = ["failed", "refused", "late", "wrong", "hanging"]
    rows = []
    for phase in PHASES:
        title = "four times the capacity for 10 s" if phase == TOO_MUCH else f"kill of {phase}'s engine"
        for name in SYSTEMS:
            counts = [total(document, name, key, phase=phase) for key in ("requests", *keys)]
            if counts[0]:
                runs = runs_of(document, name, phase=phase)
                rows.append([title, name, *map(str, counts), recovered(runs)])
    return sentences + "\n\n" + table(["", "", "requests", *names, "well again after s"], rows)


def plot(document: Document, figure: Any) -> None:
    """Of the requests of each second, the share that was answered rightly and in time."""
    axes = figure.subplots(2, 2, sharey=True)
    for axis, phase in zip(axes.flat, PHASES, strict=True):
        for name, width in zip(SYSTEMS, (3.0, 1.5), strict=True):
            seconds: dict[int, list[int]] = {}
            for run in runs_of(document, name, phase=phase):
                for second, well, all_ in run["seconds"]:
                    each = seconds.setdefault(second, [0, 0])
                    each[0] += well
                    each[1] += all_
            at = sorted(seconds)
            share = [100 * seconds[second][0] / seconds[second][1] for second in at]
            axis.step(at, share, where="post", linewidth=width, label=name)
        axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        what = "after the overload's end" if phase == TOO_MUCH else f"after {phase}'s engine is killed"
        axis.set(xlabel=f"seconds {what}", ylim=(-4, 104))
    for row in axes:
        row[0].set_ylabel("% right within 5 s")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))


def none_of(figure: str, phases: list[str]) -> Callable[[Document], Spread | None]:
    """How many of E+P+D's requests, round by round."""

    def found(document: Document) -> Spread | None:
        rounds: dict[int, float] = {}
        for phase in phases:
            for run in runs_of(document, E_P_D, phase=phase):
                rounds[run["round"]] = rounds.get(run["round"], 0.0) + run[figure]
        return Spread.of(list(rounds.values()))

    return found


QUESTION = Question(
    name="faults",
    title="The same kill, the same overload",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target("kills: requests of E+P+D that fail", 0, False, none_of("failed", list(FAULTS))),
        Target("kills and overload: wrong answers of E+P+D", 0, False, none_of("wrong", PHASES)),
    ),
    setting=(
        "Two requests a second with a picture of their own and 16 tokens; SIGKILL of one engine after 5 s; and four times "
        "the requests that each system can answer, for 10 s. The reference is what its scripts start; right is what one "
        "engine answers, in time is within 5 s."
    ),
)
