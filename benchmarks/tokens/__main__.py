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
import signal
import tempfile
import time
from pathlib import Path

from benchmarks import streams
from benchmarks.questions.question import failure, order
from benchmarks.streams import Wave
from benchmarks.tokens.figures import Document, Run
from benchmarks.tokens.page import page
from benchmarks.tokens.rows import QUICK, ROWS, SYSTEMS, Row, plan
from tools.harness import record

RESULT = Path(__file__).parents[1] / "results" / "tokens.json"


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
        return [{"system": system, "round": round_} | failure(error)]
    print(f"round {round_ + 1}, {system}: {time.monotonic() - began:.0f} s", flush=True)
    return [{"system": system, "round": round_} | run for run in runs]


def measure(rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Round by round; what there is is written after each visit."""
    waves, begun = plan(rows.values()), 0
    document: Document = record.about("benchmarks.tokens") | {"runs": []}
    if options.add and options.out.exists():
        last = json.loads(options.out.read_text())
        document |= {"command": f"{last['command']}; {document['command']}", "runs": last["runs"]}
        begun = 1 + max(run["round"] for run in last["runs"])
    for round_ in range(begun, begun + (options.rounds or (1 if options.quick else 3))):
        for system in order(list(waves), round_):
            document["runs"] += visit(system, waves[system], round_, options.wait)
            record.write(document, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = QUICK if options.quick else {name: ROWS[name] for name in options.rows.split(",")}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended
    if not options.report:
        measure(rows, options)
    print(page(json.loads(options.out.read_text()), rows))


if __name__ == "__main__":
    main()
