"""Ours against the reference's proxy and against engines by themselves, on this machine.

``python -m benchmarks.bench`` starts one system after the other, in another order every round, puts the same requests to
each, and writes ``benchmarks/results/bench.json``, ``benchmarks/RESULTS.md`` and plots. ``--quick``: only the load that the
targets are set for, and text. A full run takes hours; ``--add`` adds rounds to what is there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import cpu, load, report
from benchmarks.systems import SYSTEMS, System
from serve_app.demo import ensure_demo_model
from tools.harness import record
from tools.harness.servers import Server

RESULT = Path(__file__).parent / "results" / "bench.json"
IDLE_S = 10.0


def order(names: list[str], round_: int) -> list[str]:
    """Every round begins with the next system, so that none always runs first."""
    start = round_ % len(names)
    return names[start:] + names[:start]


def idle(server: Server) -> dict[str, Any]:
    """CPU seconds per second by kind of process, of a server that nobody asks anything."""
    before = cpu.look(server.mark)
    time.sleep(IDLE_S)
    after = cpu.look(server.mark)
    seconds = cpu.between(before, after)
    return {
        "engines": cpu.count(after.values(), cpu.ENGINES),
        "cores": {kind: spent / IDLE_S for kind, spent in seconds.items()},
    }


def visit(name: str, start: System, round_: int, cells: list[load.Cell], tokenizer: str) -> dict[str, Any]:
    """One system in one round: started, warmed up, idle, under load, ended."""
    found: dict[str, Any] = {"system": name, "round": round_, "runs": []}
    seeds = seeds_of(round_)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, start(Path(folder)) as server:
            found["start_s"] = time.monotonic() - began

            def drive(some: list[load.Cell]) -> list[dict[str, Any]]:
                jobs = [(cell, next(seeds)) for cell in some]
                return load.drive(server.url, server.mark, tokenizer, jobs, Path(folder) / "load.log")

            drive(load.QUICK)  # to warm up: what it measures is not kept
            found["idle"] = idle(server)
            found["runs"] = drive(cells)
    except Exception as error:  # one system's failure is a result, not the end of the others'
        found["error"] = f"{type(error).__name__}: {error}"[-3000:]
    return found


def visit_all(
    document: dict[str, Any],
    result: Path,
    systems: Mapping[str, System],
    rounds: range,
    cells: list[load.Cell],
    tokenizer: str,
) -> None:
    """Every system in every round, added to the document, which is written each time: what there is can be kept."""
    for round_ in rounds:
        for name in order(list(systems), round_):
            document["visits"].append(found := visit(name, systems[name], round_, cells, tokenizer))
            record.write(document, result)
            print(f"round {round_ + 1}, {name}: {found.get('error') or summary(found)}", flush=True)


def seeds_of(round_: int) -> Iterator[int]:
    """The same for all systems of a round."""
    return iter(range(1000 * round_ + 1, 1000 * (round_ + 1)))


def loads(cells: list[load.Cell]) -> dict[str, Any]:
    """What a report says of its requests."""
    return {
        "workload": {"image_size": load.IMAGE_SIZE, "text_tokens": load.TEXT_TOKENS, "cells": len(cells)},
        "seeds": "1000 × round + number of the run, the same for every system",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the target's load and text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--add", action="store_true", help="keep the rounds of the last run")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--report", action="store_true", help="write the report of the last run again")
    options = parser.parse_args()
    if not options.report:
        cells = load.QUICK if options.quick else load.ALL
        document = record.about("benchmarks.bench") | loads(cells) | {"visits": []}
        begun = 0
        if options.add:
            last = json.loads(RESULT.read_text())
            document |= {"command": f"{last['command']}; {document['command']}", "visits": last["visits"]}
            begun = 1 + max(found["round"] for found in last["visits"])
        systems = {name: SYSTEMS[name] for name in options.systems}
        tokenizer = str(ensure_demo_model(name="demo-random"))
        visit_all(document, RESULT, systems, range(begun, begun + options.rounds), cells, tokenizer)
    report.write(json.loads(RESULT.read_text()))


def summary(found: dict[str, Any]) -> str:
    rates = [f"{run.get('request_throughput', 0):.1f}" for run in found["runs"]]
    failed = sum(run["failed"] for run in found["runs"])
    return f"up after {found['start_s']:.0f} s; requests/s {', '.join(rates)}; {failed} failed"


if __name__ == "__main__":
    main()
