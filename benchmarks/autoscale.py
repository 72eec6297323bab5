"""Load that changes its kind, and what the autoscaling policies make of it: text, images, text, quiet.

``python -m benchmarks.autoscale`` starts the application on the demo model with the policies of ``serve_config.yaml`` and
short delays, drives it, and writes ``benchmarks/results/autoscale.json`` and ``autoscale.png``: load, queue and replicas per
stage over time. The figures are of a tiny model on the machine at hand; what they show is who is scaled, and when.
"""

import argparse
import itertools
import json
import re
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from serve_app.stage import Stage
from tools.harness import record
from tools.harness.cases import Case, chat, image, text
from tools.harness.servers import Server, serve_run

RESULTS = Path(__file__).parent / "results"
SAMPLE_EVERY_S = 1.0
DEADLINE_S = 110.0

WORKERS = 8
IMAGES, IMAGE_SIZE = 3, (504, 504)
TARGET_QUEUE_S = {Stage.ENCODER: 0.1, Stage.PREFILL: 3.0, Stage.DECODE: 3.0}


@dataclass(frozen=True)
class Phase:
    """``kind`` of load for so many seconds; less, if ``until`` holds earlier and then for ``SETTLED_S``."""

    kind: str
    seconds: float
    until: Callable[["Sample"], bool] | None = None


SETTLED_S = 8.0
PHASES = [Phase("quiet", 10), Phase("text", 40), Phase("image", 100), Phase("text", 70), Phase("quiet", 20)]


def deployments(encoders_at_rest: int = 1) -> dict[str, dict[str, Any]]:
    """Ray's options: our policies, up to two replicas of each stage, delays of seconds instead of minutes."""
    delays = {"metrics_interval_s": 1.0, "look_back_period_s": 6.0, "upscale_delay_s": 4.0, "downscale_delay_s": 20.0}

    def scaled(policy: str, stage: Stage, minimum: int = 1) -> dict[str, Any]:
        kwargs = {"target_queue_s": TARGET_QUEUE_S[stage]}
        policies = {"policy": {"policy_function": f"serve_app.scaling.policies:{policy}", "policy_kwargs": kwargs}}
        bounds = {"min_replicas": minimum, "max_replicas": 2, "target_ongoing_requests": 32}
        return {"autoscaling_config": bounds | delays | policies}

    return {
        "Ingress": {"num_replicas": 1},
        "Encoder": scaled("WorkPolicy", Stage.ENCODER, encoders_at_rest),
        "Prefill": scaled("WorkPolicy", Stage.PREFILL),
        "Decode": scaled("DecodePolicy", Stage.DECODE),
    }


def request(kind: str, seed: int) -> Case:
    if kind == "text":
        return chat(text(f"Tell me about the weather on day {seed}."), max_tokens=8)
    pictures = [image(1_000_000 + IMAGES * seed + index, IMAGE_SIZE) for index in range(IMAGES)]
    return chat(text("Compare."), *pictures, max_tokens=4)


@dataclass
class Sample:
    """One look at the application."""

    seconds: float
    phase: str
    completed: int
    """Requests that were answered since the start."""
    failed: int
    replicas: dict[str, int]
    queue_s: dict[str, float]
    """Estimated: outstanding work over the rate of the stage's replicas."""


@dataclass
class Driver:
    """Threads that ask one after the other for what the phase says; every request is one that was not asked before."""

    server: Server
    phase: str = "quiet"
    completed: int = 0
    failures: list[str] = field(default_factory=list)
    _seeds: Iterator[int] = field(default_factory=itertools.count)
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def work(self) -> None:
        session = requests.Session()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or self.phase != "quiet")
                if self._ended:
                    return
                kind, seed = self.phase, next(self._seeds)
            path, body = request(kind, seed)
            try:
                answer = session.post(self.server.url + path, json=body, timeout=DEADLINE_S)
                problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:300]}"
            except requests.RequestException as error:
                problem = repr(error)
            with self._wake:
                self.completed += not problem
                self.failures += [problem] if problem else []

    def enter(self, phase: str) -> None:
        with self._wake:
            self.phase = phase
            self._wake.notify_all()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(WORKERS) as pool:
            workers = [pool.submit(self.work) for _ in range(WORKERS)]
            try:
                yield
            finally:
                with self._wake:
                    self._ended = True
                    self._wake.notify_all()
            for worker in workers:
                worker.result()


def queue_s(replicas: Collection[Mapping[str, float]]) -> float:
    """Seconds that new work would wait for, from the signals of a stage's replicas; 0 while no rate is known."""
    rates = [replica["rate"] for replica in replicas if replica["rate"]]
    if not rates:
        return 0.0
    mean_rate = sum(rates) / len(rates)
    return sum(replica["outstanding"] for replica in replicas) / (mean_rate * len(replicas))


def read(metrics: str) -> dict[str, dict[str, dict[str, float]]]:
    """Signals of replicas (``stages.workload.page``), by stage and replica."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for family in text_string_to_metric_families(metrics):
        if family.name.startswith("epd:work_"):
            for sample in family.samples:
                replica = found[sample.labels["stage"]][sample.labels["replica"]]
                replica[family.name.removeprefix("epd:work_")] = sample.value
    return found


def look(driver: Driver, began: float) -> Sample:
    """Replicas that answer, and what they say of their work."""
    told = read(driver.server.get("/metrics").text)
    signals = {stage: told.get(stage, {}) for stage in Stage}
    queues = {stage.value: queue_s(replicas.values()) for stage, replicas in signals.items()}
    counts = {stage: len(replicas) for stage, replicas in signals.items()}
    return Sample(time.monotonic() - began, driver.phase, driver.completed, len(driver.failures), counts, queues)


def run(server: Server, phases: list[Phase]) -> tuple[list[Sample], list[str]]:
    """Samples over all phases, and what failed."""
    driver, samples, began = Driver(server), [], time.monotonic()
    with driver.running():
        for phase in phases:
            driver.enter(phase.kind)
            end, settled = time.monotonic() + phase.seconds, False
            while (now := time.monotonic()) < end:
                samples.append(look(driver, began))
                if not settled and phase.until is not None and phase.until(samples[-1]):
                    end, settled = min(end, now + SETTLED_S), True
                time.sleep(max(now + SAMPLE_EVERY_S - time.monotonic(), 0.0))
    return samples, driver.failures


def changes(samples: list[Sample], stage: Stage) -> list[tuple[float, int]]:
    """When the replicas of a stage became how many; first what it began with."""
    found: list[tuple[float, int]] = []
    for sample in samples:
        if not found or sample.replicas[stage] != found[-1][1]:
            found.append((round(sample.seconds, 1), sample.replicas[stage]))
    return found


def decisions(server: Server) -> list[tuple[str, int, int]]:
    """What Serve's controller wanted: stage, replicas before and after, also where none came to run in the meantime."""
    found = re.findall(r"scaling Deployment\(name='(\w+)'.* from (\d+) to (\d+) replicas", server.log.read_text())
    return [(name, int(before), int(after)) for name, before, after in found]


def timeline(samples: list[Sample]) -> dict[str, Any]:
    """What the plot shows, a list a line; ``phases``: when each began."""

    def by_stage(figures: Callable[[Sample], dict[str, Any]]) -> dict[str, list[Any]]:
        return {stage: [figures(sample)[stage] for sample in samples] for stage in Stage}

    groups = itertools.groupby(samples, lambda sample: sample.phase)
    return {
        "phases": [(next(group).seconds, phase) for phase, group in groups],
        "seconds": [sample.seconds for sample in samples],
        "completed": [sample.completed for sample in samples],
        "replicas": by_stage(lambda sample: sample.replicas),
        "queue_s": by_stage(lambda sample: sample.queue_s),
    }


def plot(told: dict[str, Any], path: Path) -> None:
    """``told``: a timeline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (load, queue, replicas) = pyplot.subplots(3, sharex=True, figsize=(10, 7), layout="constrained")
    seconds, window = told["seconds"], 5
    moments = list(zip(seconds, told["completed"], strict=True))
    load.plot(
        seconds[window:],
        [
            (more - count) / (end - start)
            for (start, count), (end, more) in zip(moments, moments[window:], strict=False)
        ],
        color="black",
    )
    load.set_ylabel("answers per second")
    for place, stage in enumerate(Stage):
        queue.plot(seconds, told["queue_s"][stage], label=stage)
        beside = (place - 1) * 0.03  # lines that lie on each other would hide each other
        replicas.step(seconds, [count + beside for count in told["replicas"][stage]], where="post", label=stage)
    queue.set_ylabel("queue (s)")
    replicas.set_ylabel("replicas")
    replicas.set_xlabel("seconds")
    replicas.set_yticks(range(max(map(max, told["replicas"].values())) + 1))
    queue.legend(loc="upper right")
    for start, phase in told["phases"]:
        for axis in (load, queue, replicas):
            axis.axvline(start, color="grey", linewidth=0.6, linestyle=":")
        load.text(start, load.get_ylim()[1], phase, verticalalignment="bottom", color="grey", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replot", action="store_true", help="draw the plot of the last run again")
    parser.add_argument("--scale", type=float, default=1.0, help="how much longer the phases are")
    parser.add_argument("--encoders-at-rest", type=int, default=1, help="min_replicas of the encoder; 0: none for text")
    options = parser.parse_args()
    scaled = deployments(options.encoders_at_rest)
    result, picture = RESULTS / "autoscale.json", RESULTS / "autoscale.png"
    if not options.replot:
        phases = [replace(phase, seconds=phase.seconds * options.scale) for phase in PHASES]
        with tempfile.TemporaryDirectory() as folder, serve_run(Path(folder), {}, scaled) as server:
            samples, failures = run(server, phases)
            wanted = decisions(server)
        document = record.about("benchmarks.autoscale") | {
            "workers": WORKERS,
            "images": {"per request": IMAGES, "size": IMAGE_SIZE},
            "deployments": scaled,
            "phases": [(phase.kind, phase.seconds) for phase in phases],
            "failures": failures,
            "decisions": wanted,
            "changes": {stage: changes(samples, stage) for stage in Stage},
            "timeline": timeline(samples),
        }
        record.write(document, result)
    document = json.loads(result.read_text())
    for stage, times in document["changes"].items():
        print(f"{stage:8}", ", ".join(f"{count} from {seconds:g} s" for seconds, count in times))
    print("wanted:", ", ".join(f"{name} {before} → {after}" for name, before, after in document["decisions"]))
    print(f"{document['timeline']['completed'][-1]} answers, {len(document['failures'])} failures")
    plot(document["timeline"], picture)


if __name__ == "__main__":
    main()
