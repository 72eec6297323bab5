"""What stages are worth: the questions of ``benchmarks/questions``, asked of running systems on this machine.

``python -m benchmarks.bench`` measures every question, writes ``benchmarks/results/<question>.json`` and, of all that are
there, ``benchmarks/RESULTS.md`` and its plots. ``--quick``, in seven minutes, is a round of what the targets are set
for: it prints them, and writes nothing.
"""

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.questions import batch, fanout, faults, goodput, interference, pictures, service_times, start, turns
from benchmarks.questions.question import Question
from benchmarks.questions.systems import one_queue_per_core
from tools.harness import record

QUESTIONS = tuple(
    each.QUESTION for each in (interference, goodput, pictures, turns, batch, fanout, faults, start, service_times)
)
"""In the order of RESULTS.md."""
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"

Document = dict[str, Any]


def measure(question: Question, document: Document, rounds: range, quick: bool, result: Path | None) -> None:
    """Runs are added to the document, which is written after each: what there is can be kept."""
    for round_ in rounds:
        began = time.monotonic()
        for run in question.measure(round_, quick):
            document["runs"].append(run)
            if result:
                record.write(document, result)
            state = run.get("error", "measured")
            print(f"{question.name}, round {round_ + 1}, {run['system']}: {state}", flush=True)
        print(f"{question.name}, round {round_ + 1}: {time.monotonic() - began:.0f} s", flush=True)


def document_of(result: Path, add: bool) -> tuple[Document, int]:
    """What runs are added to, and the first round: a new document, or the last run's."""
    document: Document = record.about("benchmarks.bench", model="benchmarks/questions/model.py") | {"runs": []}
    if not add or not result.exists():
        return document, 0
    last = json.loads(result.read_text())
    begun = 1 + max((run["round"] for run in last["runs"]), default=-1)
    return last | {"command": f"{last['command']}; {document['command']}"}, begun


def write_report() -> None:
    found = {
        question: json.loads(result.read_text())
        for question in QUESTIONS
        if (result := RESULTS / f"{question.name}.json").exists()
    }
    PAGE.write_text(report.page(found))
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no plots: matplotlib is not installed (pip install -e ".[bench]")')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for question, document in found.items():
        figure = pyplot.figure(figsize=(7.5, 3.2), layout="constrained")
        question.plot(document, figure)
        figure.savefig(RESULTS / f"{question.name}.png", dpi=100)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {question.name: question for question in QUESTIONS if not question.command}
    parser.add_argument("--quick", action="store_true", help="a round of what the targets are set for; writes nothing")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(names), metavar="QUESTION", help=", ".join(names)
    )
    parser.add_argument("--add", action="store_true", help="keep the rounds of the last run")
    parser.add_argument("--report", action="store_true", help="write the report of the last runs again")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended
    measured = {}
    with one_queue_per_core() as fair:
        if not fair:
            print(
                "Linux shares cores among sessions here (sched_autogroup_enabled), which is noise: root can switch it off"
            )
        for question in [] if options.report else [names[name] for name in options.only]:
            result = None if options.quick else RESULTS / f"{question.name}.json"
            document, begun = document_of(RESULTS / f"{question.name}.json", options.add and not options.quick)
            document["one_queue_per_core"] = fair
            measure(question, document, range(begun, begun + options.rounds), options.quick, result)
            measured[question] = document
    if options.quick:
        print(report.table(["", "target", "found", ""], report.target_rows(measured)))
    else:
        write_report()


if __name__ == "__main__":
    main()
