"""Load that changes its kind, and what the autoscaling policies make of it: text, images, text, quiet.

``python -m benchmarks.autoscale`` starts the application on the demo model with the policies of ``serve_config.yaml`` and
short delays, drives it, and writes ``benchmarks/results/autoscale.json`` and ``autoscale.png``: load, queue and replicas per
stage over time. The figures are of a tiny model on the machine at hand; what they show is who is scaled, and when.

``--heavy`` has the model of ``benchmarks.questions`` instead, whose work takes a core a while, and writes
``autoscale_heavy.json``. ``--compare`` has the simulation play that run (``tools.sim.scaling``).
"""

import argparse
import itertools
import json
import logging
import re
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import requests
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.questions.model import PICTURE_TOKENS
from benchmarks.questions.systems import arguments
from serve_app.stage import Stage
from tools.harness import record
from tools.harness.cases import Case, chat, image, text
from tools.harness.servers import Server, serve_run

RESULTS = Path(__file__).parent / "results"
SERVICE_TIMES = RESULTS / "service_times.json"
SAMPLE_EVERY_S = 1.0
DEADLINE_S = 110.0

BATCH_TOKENS = 2048
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


ANSWER_TOKENS = {"text": 8, "image": 4}


def request(kind: str, seed: int) -> Case:
    if kind == "text":
        return chat(text(f"Tell me about the weather on day {seed}."), max_tokens=ANSWER_TOKENS[kind])
    pictures = [image(1_000_000 + IMAGES * seed + index, IMAGE_SIZE) for index in range(IMAGES)]
    return chat(text("Compare."), *pictures, max_tokens=ANSWER_TOKENS[kind])


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


@dataclass(frozen=True)
class Answer:
    kind: str
    at_s: float
    """When it was asked for, since the driver was made."""
    ttft_s: float


@dataclass(frozen=True)
class Start:
    """A replica that answers for the first time, and the CPU time that it has taken so far with its engine."""

    stage: str
    at_s: float
    cpu_s: float


@dataclass
class Driver:
    """Threads that ask one after the other for what the phase says; every request is one that was not asked before."""

    server: Server
    phase: str = "quiet"
    completed: int = 0
    failures: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
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
            began, first = time.monotonic(), None
            try:
                with session.post(
                    self.server.url + path, json=body | {"stream": True}, timeout=DEADLINE_S, stream=True
                ) as answer:
                    problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:300]}"
                    for line in answer.iter_lines():
                        if first is None and line:
                            first = time.monotonic()
                        problem = problem or (line.decode() if line.startswith(b"event: error") else "")
            except requests.RequestException as error:
                problem = repr(error)
            with self._wake:
                if first is not None and not problem:
                    self.answers.append(Answer(kind, began - self.began, first - began))
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
    driver = Driver(server)
    return drive(driver, phases), driver.failures


def drive(driver: Driver, phases: list[Phase]) -> list[Sample]:
    samples: list[Sample] = []
    with driver.running():
        for phase in phases:
            driver.enter(phase.kind)
            end, settled = time.monotonic() + phase.seconds, False
            while (now := time.monotonic()) < end:
                samples.append(look(driver, driver.began))
                driver.starts += started(driver.server, samples)
                if not settled and phase.until is not None and phase.until(samples[-1]):
                    end, settled = min(end, now + SETTLED_S), True
                time.sleep(max(now + SAMPLE_EVERY_S - time.monotonic(), 0.0))
    return samples


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


def started(server: Server, samples: list[Sample]) -> list[Start]:
    """Replicas that the last sample has and the one before it has not."""
    if len(samples) < 2:
        return []
    before, now = samples[-2:]
    more = [stage for stage in Stage if now.replicas[stage] > before.replicas[stage]]
    return [Start(stage, now.seconds, newest_cpu_s(server, stage)) for stage in more]


def newest_cpu_s(server: Server, stage: Stage) -> float:
    title = re.compile(rf"ServeReplica:epd:{stage.capitalize()}\b")
    replicas = [process for process in server.processes() if title.search(" ".join(process.cmdline()))]
    newest = max(replicas, key=lambda process: process.create_time())
    times = [process.cpu_times() for process in (newest, *newest.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def decided_at(server: Server, began: float) -> list[float]:
    """Seconds from ``began`` (as ``time.time()``) to each of the decisions."""
    told = re.findall(r"(\d+-\d+-\d+ [\d:]+),(\d+).*scaling Deployment\(name=", server.log.read_text())
    moments = [datetime.fromisoformat(moment).timestamp() + int(millis) / 1000 for moment, millis in told]
    return [round(moment - began, 1) for moment in moments]


def by_phase(samples: list[Sample], answers: list[Answer]) -> list[dict[str, Any]]:
    """What requests saw that were asked for in a phase. It begins a little before its first sample."""
    starts = [(next(group).seconds, kind) for kind, group in itertools.groupby(samples, lambda sample: sample.phase)]
    ends = [start for start, _ in starts[1:]] + [samples[-1].seconds]
    found = []
    for (start, kind), end in zip(starts, ends, strict=True):
        own = [each for each in answers if each.kind == kind and start - 2 * SAMPLE_EVERY_S <= each.at_s < end]
        if ttft := [each.ttft_s for each in own]:
            p50, p90 = (float(np.quantile(ttft, share)) for share in (0.5, 0.9))
            seen = {"kind": kind, "from_s": start, "to_s": end, "requests": len(ttft)}
            found.append(seen | {"ttft_p50_s": p50, "ttft_p90_s": p90})
    return found


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


def measured(scaled: dict[str, dict[str, Any]], phases: list[Phase], heavy: bool) -> dict[str, Any]:
    args = arguments(BATCH_TOKENS) if heavy else {}
    with tempfile.TemporaryDirectory() as folder, serve_run(Path(folder), args, scaled) as server:
        prompts = {kind: server.post(*request(kind, -1)).json()["usage"]["prompt_tokens"] for kind in ANSWER_TOKENS}
        driver, wall = Driver(server), time.time()
        samples = drive(driver, phases)
        wanted, wanted_at = decisions(server), decided_at(server, wall)
    model = "benchmarks.questions" if heavy else "demo-random"
    return record.about("benchmarks.autoscale", model=model) | {
        "workers": WORKERS,
        "images": {"per request": IMAGES, "size": IMAGE_SIZE, "tokens": PICTURE_TOKENS},
        "prompt_tokens": prompts,
        "output_tokens": ANSWER_TOKENS,
        "deployments": scaled,
        "phases": [(phase.kind, phase.seconds) for phase in phases],
        "failures": driver.failures,
        "decisions": wanted,
        "decided_at_s": wanted_at,
        "starts": [asdict(start) for start in driver.starts],
        "changes": {stage: changes(samples, stage) for stage in Stage},
        "seen": by_phase(samples, driver.answers),
        "timeline": timeline(samples),
    }


def compare(path: Path) -> None:
    """Adds to a measured run what the simulation makes of it, and prints both."""
    from tools.sim import scaling
    from tools.sim.fit import Fitted

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    document = json.loads(path.read_text())
    fitted = Fitted.read(SERVICE_TIMES)
    cores = scaling.cores_left(document, fitted.times, fitted.cores)
    played = scaling.simulated(document, fitted.times, cores)
    record.write(document | {"simulated": {"cores": cores} | asdict(played)}, path)
    print(f"{cores:.2f} cores")
    for name, seen in (("measured", scaling.measured(document)), ("simulated", played)):
        print(name, "wanted:", ", ".join(f"{stage} {count} at {at:.0f} s" for stage, at, count in seen.decided))
        for stage, times in seen.changes.items():
            print(f"  {stage:8}", ", ".join(f"{count} from {at:.0f} s" for at, count in times))
        for each in seen.phases:
            print(
                f"  {each.kind:8} {each.from_s:.0f} to {each.to_s:.0f} s: {each.requests} requests, "
                f"TTFT p50 {each.ttft_p50_s:.2f} s, p90 {each.ttft_p90_s:.2f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replot", action="store_true", help="draw the plot of the last run again")
    parser.add_argument("--scale", type=float, default=1.0, help="how much longer the phases are")
    parser.add_argument("--encoders-at-rest", type=int, default=1, help="min_replicas of the encoder; 0: none for text")
    parser.add_argument("--heavy", action="store_true", help="the model of benchmarks.questions")
    parser.add_argument("--compare", action="store_true", help="have the simulation play the last run with --heavy")
    options = parser.parse_args()
    if options.compare:
        compare(RESULTS / "autoscale_heavy.json")
        return
    name = "autoscale_heavy" if options.heavy else "autoscale"
    result, picture = RESULTS / f"{name}.json", RESULTS / f"{name}.png"
    if not options.replot:
        phases = [replace(phase, seconds=phase.seconds * options.scale) for phase in PHASES]
        record.write(measured(deployments(options.encoders_at_rest), phases, options.heavy), result)
    document = json.loads(result.read_text())
    for stage, times in document["changes"].items():
        print(f"{stage:8}", ", ".join(f"{count} from {seconds:g} s" for seconds, count in times))
    print("wanted:", ", ".join(f"{name} {before} → {after}" for name, before, after in document["decisions"]))
    print(f"{document['timeline']['completed'][-1]} answers, {len(document['failures'])} failures")
    plot(document["timeline"], picture)


if __name__ == "__main__":
    main()
