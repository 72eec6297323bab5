"""A batch of pictures to describe, answered beside people who ask about pictures. How much longer do they wait?"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.questions import clients
from benchmarks.questions.model import SIDE
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, runs_of, spread
from benchmarks.questions.systems import E_PD, arguments, stages
from benchmarks.report import Spread, text
from benchmarks.streams import WORDS, share

PRIORITY, ARRIVAL = "by priority", "in order of arrival"
POLICIES = {PRIORITY: "priority", ARRIVAL: "fcfs"}
SECONDS, RATE = 100.0, 0.6
PICTURES, TOKENS = 4, 32
BATCH_PICTURES, BATCH_TOKENS, AT_A_TIME = 1, 64, 8
BATCH = 1500
"""Requests of the batch, more than can be answered meanwhile."""
STEP_TOKENS = 256
"""A picture in each of the encoder's steps: what has begun is not stopped."""
MAKER = "benchmarks.questions.batch:asks"
BESIDE = "beside the batch"


def content(said: random.Random, pictures: int, words: int) -> list[dict[str, Any]]:
    question = {"type": "text", "text": " ".join([str(said.random()), *said.choices(WORDS, k=words)])}
    return [*(clients.picture(said.getrandbits(40), SIDE) for _ in range(pictures)), question]


def asks(seed: int, seconds: float = SECONDS, salt: int = 0) -> list[clients.Ask]:
    """People's requests, as a Poisson process. Another ``salt`` has them come at the same times with other pictures."""
    times, said, at, found = random.Random(seed), random.Random(f"{seed} {salt}"), 0.0, []
    while at < seconds:
        found.append(clients.Ask(at, "people", clients.chat(content(said, PICTURES, 40), TOKENS)))
        at += times.expovariate(RATE)
    return found


@contextmanager
def batch(url: str, folder: Path, seed: int) -> Iterator[Path]:
    """``python -m serve_app batch`` at work: the file of its answers."""
    said = random.Random(f"batch {seed}")
    requests, answers = folder / "requests.jsonl", folder / "answers.jsonl"
    with requests.open("w") as lines:
        for index in range(BATCH):
            body = json.loads(clients.chat(content(said, BATCH_PICTURES, 20), BATCH_TOKENS))
            for key in ("stream", "stream_options"):
                del body[key]
            line = {"custom_id": str(index), "method": "POST", "url": clients.PATH, "body": body}
            lines.write(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "serve_app", "batch", str(requests), str(answers), "--url", url]
    with (folder / "batch.log").open("w") as log:
        process = subprocess.Popen([*command, "--at-a-time", str(AT_A_TIME)], stdout=log, stderr=log)
        try:
            yield answers
            if process.poll() is not None:
                raise RuntimeError(f"the batch ended too soon: {(folder / 'batch.log').read_text()[-500:]}")
        finally:
            os.kill(process.pid, signal.SIGTERM)
            process.wait()


def statuses(answers: Path) -> list[int]:
    return [json.loads(line)["response"]["status_code"] for line in answers.read_text().splitlines()]


def visit(name: str, round_: int) -> Run:
    found: Run = {"system": name, "round": round_}
    args = arguments(STEP_TOKENS, scheduling_policy=POLICIES[name])
    try:
        with tempfile.TemporaryDirectory(prefix="batch-") as place, stages(folder := Path(place), args, E_PD) as server:

            def drive(**load: Any) -> list[Run]:
                (run,) = clients.drive(server.url, server.mark, MAKER, [load], folder / "clients.log")
                return list(run["requests"])

            drive(seed=10_000 + round_, seconds=8.0)
            alone = drive(seed=round_)
            with batch(server.url, folder, round_) as answers:
                drive(seed=20_000 + round_, seconds=8.0)  # until the batch is under way
                before = len(statuses(answers))
                beside = drive(seed=round_, salt=1)
                meanwhile = statuses(answers)[before:]
        of = {"alone": alone, BESIDE: beside}
        return found | {
            "ttft_s": {kind: sorted(one["ttft"] for one in each if "failed" not in one) for kind, each in of.items()},
            "failed": sum("failed" in one for each in of.values() for one in each),
            "batch_per_s": len(meanwhile) / max(one["at"] + one["took"] for one in beside),
            "batch_failed": sum(status != 200 for status in meanwhile),
        }
    except Exception as error:  # one system's failure is a result, not the end of the others'
        return found | failure(error)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    """Nothing where it is to be quick."""
    for name in order(list(POLICIES), round_) if not quick else []:
        yield visit(name, round_)


# ---- the answer


def ttft_s(kind: str, percent: float) -> Callable[[Run], float]:
    return lambda run: share(run["ttft_s"][kind], percent)


def longer(document: Document, name: str, percent: float) -> Spread | None:
    """TTFT beside the batch to that without, at a quantile."""
    return spread(document, name, lambda run: ttft_s(BESIDE, percent)(run) / ttft_s("alone", percent)(run))


def answer(document: Document) -> str:
    def seconds(name: str, kind: str) -> str:
        at = (text(spread(document, name, ttft_s(kind, percent)), 2) for percent in (50, 99))
        return " and ".join(at)

    def times(name: str) -> str:
        return f"{text(longer(document, name, 99), 2)} × at p99"

    runs = [run for name in POLICIES for run in runs_of(document, name)]
    failed = sum(run["failed"] + run["batch_failed"] for run in runs)
    per_s = text(spread(document, PRIORITY, lambda run: float(run["batch_per_s"])), 1)
    return (
        "Where engines take requests by priority, people's first tokens come after "
        f"{seconds(PRIORITY, 'alone')} s, p50 and p99, and beside the batch after {seconds(PRIORITY, BESIDE)} s: "
        f"{times(PRIORITY)}. In order of arrival it is {seconds(ARRIVAL, BESIDE)} s: {times(ARRIVAL)}. What has begun is "
        "not stopped, a picture at the encoder and a step of the engine, so steps must be short against what people wait "
        f"for anyway; the batch has what people leave, {per_s} requests/s here. {failed} requests failed."
    )


def plot(document: Document, figure: Any) -> None:
    axis = figure.subplots()
    for index, name in enumerate(POLICIES):
        for kind, style in (("alone", "--"), (BESIDE, "-")):
            times = sorted(time for run in runs_of(document, name) for time in run["ttft_s"][kind])
            if times:
                shares = [(place + 1) / len(times) for place in range(len(times))]
                axis.plot(times, shares, style, color=f"C{index}", label=f"{name}, {kind}")
    axis.set(xlabel="TTFT of people's requests, s", ylabel="share of requests")
    axis.legend(fontsize=8)


QUESTION = Question(
    name="batch",
    title="Does a batch make people wait?",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target("TTFT p99 beside a batch, to that without", 1.2, False, lambda document: longer(document, PRIORITY, 99)),
    ),
    setting=(
        f"E+PD; people's requests of {PICTURES} new pictures of {SIDE}×{SIDE}, 40 words and {TOKENS} tokens, {RATE:g} per "
        f"second as a Poisson process of {SECONDS:g} s, alone and beside `python -m serve_app batch` with {AT_A_TIME} "
        f"requests of a picture and {BATCH_TOKENS} tokens at a time; steps of {STEP_TOKENS} tokens at most."
    ),
)
