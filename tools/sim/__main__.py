"""Experiments past this machine: 1 to 1,000 replicas per stage, a burst of images, a day, prefixes. See ``README.md``.

``python -m tools.sim`` writes ``tools/sim/results/simulation.json`` and its plots. Service times are those of
``tools/sim/service_times_assumed.json``: assumed, not measured. ``--quick`` is a smaller run of every experiment.
``python -m tools.sim plan traffic.yaml`` says how many replicas per stage an SLO takes.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tools.harness import record
from tools.sim import plan
from tools.sim.experiments import EXPERIMENTS, SLOS, jobs, run_all
from tools.sim.service import load

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def play(options: argparse.Namespace, result: Path) -> None:
    times, began = load(options.times), time.monotonic()
    todo = [job for job in jobs(options.quick, options.full) if options.only in (None, job.experiment)]
    rows = run_all(todo, options.processes or 1, times)
    command = " ".join(["python -m tools.sim", *sys.argv[1:]])
    if options.only:
        last = json.loads(result.read_text())
        rows = [row for row in last["rows"] if row["experiment"] != options.only] + rows
        command = f"{last['command']}; {command}"
    document = {
        "command": command,
        "service_times": times.model_dump(mode="json"),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "load": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("ray", "numpy")} | {"python": platform.python_version()},
        "took_s": round(time.monotonic() - began),
        "slo": {name: asdict(slo) for name, slo in SLOS.items()},
        "rows": rows,
    }
    record.write(document, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter, one seed, at most 10 replicas per stage")
    parser.add_argument(
        "--full", action="store_true", help="autoscaling with up to 1,000 replicas per stage too, three seeds"
    )
    parser.add_argument("--only", choices=EXPERIMENTS, help="run this one again, and keep the last run's others")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--times", type=Path, default=plan.ASSUMED, help="service times (JSON)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--replot", action="store_true", help="draw the plots of the last run again")
    commands = parser.add_subparsers(dest="command")
    planning = commands.add_parser("plan", help="how many replicas per stage for an SLO", description=plan.__doc__)
    planning.add_argument("traffic", type=Path, help="YAML, like tools/sim/traffic.yaml")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.command == "plan":
        try:
            demand = plan.Demand.read(options.traffic)
            print(plan.report(demand, plan.Known.read(demand.service_times)))
        except plan.PlanError as error:
            sys.exit(str(error))
        return
    result = options.out / "simulation.json"
    if not options.replot:
        play(options, result)
    try:
        from tools.sim.plots import draw
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing} (`make simulate` installs it)")
        return
    draw(json.loads(result.read_text()), options.out)


if __name__ == "__main__":
    main()
