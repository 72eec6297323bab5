"""Measure what the stages need here, fit service times, and hold the simulation against runs that it was not fitted on.

``python -m benchmarks.measure_service`` starts the application as E+P+D with one replica per stage, on a model that is heavy
enough for a core (``benchmarks.questions``), and drives it in runs of one kind of requests each. The stages share the cores
of this machine, so what is fitted is CPU time: of each stage's processes, by least squares over the runs of ``FIT``. The
runs of ``HELD_OUT``, and some as E+PD, are then simulated (same cores, less what other programs took) and compared. Writes
``benchmarks/results/service_times.json``. ``--fit`` does the last two steps again with its runs.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks import cpu
from benchmarks.questions.systems import arguments, one_queue_per_core
from tools.harness import record
from tools.harness.cases import Case, chat, image, text
from tools.harness.servers import Server, serve_run
from tools.sim.fit import BATCH_TOKENS, Group, Run, arrivals, check, fit
from tools.sim.service import Topology

RESULT = Path(__file__).parent / "results" / "service_times.json"
WARM_UP_S = 4.0
STEPS = ("render", "queue", "encode", "prefill", "kv_transfer", "first_token")
PROMPT = "Tell me what there is to be seen, and what the weather will be like. "


@dataclass(frozen=True)
class Config:
    """Requests of one kind, ``at_a_time`` or, as a Poisson process, at ``share`` of the rate of the run so named."""

    name: str
    images: int
    size: int
    """Pixels of a side."""
    tokens: int
    at_a_time: int | None
    poisson: tuple[str, float] | None = None
    sentences: int = 1
    """Of its text, 14 tokens each."""
    topology: Topology = "E+P+D"


LONG = 40
FIT = [
    Config("0 images, 16 tokens, 1 at a time", 0, 0, 16, 1),
    Config("0 images, 16 tokens, 8 at a time", 0, 0, 16, 8),
    Config("0 images, long, 64 tokens, 1 at a time", 0, 0, 64, 1, sentences=LONG),
    Config("0 images, long, 64 tokens, 8 at a time", 0, 0, 64, 8, sentences=LONG),
    Config("1 small image, 16 tokens, 1 at a time", 1, 224, 16, 1),
    Config("1 small image, 16 tokens, 8 at a time", 1, 224, 16, 8),
    Config("1 image, 16 tokens, 1 at a time", 1, 448, 16, 1),
    Config("1 image, 16 tokens, 8 at a time", 1, 448, 16, 8),
    Config("2 images, 4 tokens, 1 at a time", 2, 448, 4, 1),
    Config("2 images, 4 tokens, 4 at a time", 2, 448, 4, 4),
]
HELD_OUT = [
    Config("1 image, 64 tokens, 4 at a time", 1, 448, 64, 4),
    Config("2 images, 32 tokens, 8 at a time", 2, 448, 32, 8),
    Config("4 images, 16 tokens, 4 at a time", 4, 448, 16, 4),
    Config("0 images, long, 32 tokens, 4 at a time", 0, 0, 32, 4, sentences=LONG),
    Config("1 image, 16 tokens, Poisson 0.5", 1, 448, 16, None, ("1 image, 16 tokens, 8 at a time", 0.5)),
    Config("1 image, 16 tokens, Poisson 0.8", 1, 448, 16, None, ("1 image, 16 tokens, 8 at a time", 0.8)),
    Config("2 images, 4 tokens, Poisson 0.7", 2, 448, 4, None, ("2 images, 4 tokens, 4 at a time", 0.7)),
]
HELD_OUT += [
    replace(config, name=f"E+PD: {config.name}", topology="E+PD") for config in (HELD_OUT[0], HELD_OUT[2], HELD_OUT[5])
]


@dataclass
class Client:
    """Streams requests, each of its own content, and notes when each began, had its first token and ended."""

    server: Server
    config: Config
    times: list[tuple[float, float, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each request by the steps of its ``server-timing``."""
    failures: int = 0
    _number: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    async def run(self, seconds: float, rate: float | None) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.server.url, connector=connector) as session:
            end = time.perf_counter() + seconds
            if rate is None:
                await asyncio.gather(
                    *(self._one_after_the_other(session, end) for _ in range(self.config.at_a_time or 1))
                )
                return
            began = end - seconds
            async with asyncio.TaskGroup() as group:
                for moment in arrivals(rate, seconds):
                    await asyncio.sleep(began + moment - time.perf_counter())
                    group.create_task(self._ask(session))

    async def _one_after_the_other(self, session: aiohttp.ClientSession, end: float) -> None:
        while time.perf_counter() < end:
            await self._ask(session)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        path, body = case(self.config, next(self._number))
        began, first = time.perf_counter(), None
        async with session.post(path, json=body) as response:
            async for line in response.content:
                if first is None and line.startswith(b"data: ") and b'"token_ids":[' in line.replace(b" ", b""):
                    first = time.perf_counter()
        if response.status != 200 or first is None:
            self.failures += 1
            return
        self.times.append((began, first, time.perf_counter()))
        told = re.findall(r"([\w.]+);dur=([\d.]+)", response.headers.get("server-timing", ""))
        self.steps.append({name: float(took) / 1000 for name, took in told})


def case(config: Config, number: int) -> Case:
    """Pictures that nobody has sent before: no cache helps."""
    seeds = [zlib.crc32(f"{config.name} {number} {index}".encode()) for index in range(config.images)]
    pictures = [image(seed, (config.size, config.size)) for seed in seeds]
    words = text(f"{seeds or number} {config.name} {PROMPT * config.sentences}")
    return chat(*pictures, words, max_tokens=config.tokens, ignore_eos=True, stream=True)


GROUPS = {Group.INGRESS: "Ingress", Group.ENCODER: "Encoder", Group.PREFILL: "Prefill", Group.DECODE: "Decode"}
BESIDE = {
    Group.ENCODER: Group.ENCODER_REPLICA,
    Group.PREFILL: Group.PREFILL_REPLICA,
    Group.DECODE: Group.DECODE_REPLICA,
}


def processes(server: Server) -> dict[Group, list[psutil.Process]]:
    """By whom they work for: replicas, beside these their engines; the proxy, Ray and this client are around them."""
    found: dict[Group, list[psutil.Process]] = {group: [] for group in Group}
    found[Group.AROUND].append(psutil.Process())
    own: set[int] = set()
    everybody = server.processes()
    for process in everybody:
        title = " ".join(process.cmdline())
        for group, name in GROUPS.items():
            if re.search(rf"ServeReplica:epd:{name}\b", title):
                engine = process.children(recursive=True)
                found[BESIDE.get(group, group)].append(process)
                found[group] += engine
                own |= {process.pid, *(member.pid for member in engine)}
    found[Group.AROUND] += [process for process in everybody if process.pid not in own]
    return found


def cpu_s(groups: dict[Group, list[psutil.Process]]) -> dict[Group, float]:
    spent = dict.fromkeys(Group, 0.0)
    for group, members in groups.items():
        for process in members:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent[group] += times.user + times.system
    return spent


def measure(server: Server, config: Config, seconds: float, rate: float | None) -> Run:
    asyncio.run(Client(server, config).run(WARM_UP_S, rate))
    groups, client = processes(server), Client(server, config, _number=iter(range(10**6, 10**9)))
    before, counted, machine, began = cpu_s(groups), counts(server), cpu.machine_s(), time.perf_counter()
    asyncio.run(client.run(seconds, rate))
    took = time.perf_counter() - began
    spent = {group: after - before[group] for group, after in cpu_s(groups).items()}
    others = max(cpu.machine_s() - machine - sum(spent.values()), 0.0) / took
    more = {name: value - counted[name] for name, value in counts(server).items()}
    ttft = sorted(first - start for start, first, _ in client.times)
    requests = len(client.times)
    return Run(
        name=config.name,
        seconds=took,
        asked_s=seconds,
        at_a_time=config.at_a_time,
        rate=rate,
        requests=requests,
        failures=client.failures,
        images=config.images,
        embeds=round(more["embeds"] / max(requests * config.images, 1)),
        prompt_tokens=round(more["prompt_tokens"] / max(requests, 1)),
        output_tokens=config.tokens,
        encoder_steps=more["encoder_steps"],
        prefill_steps=more["prefill_steps"],
        decode_steps=more["decode_steps"],
        cpu_s=spent,
        other_cores=others,
        load=os.getloadavg()[0],
        per_s=requests / took,
        ttft_p50_s=float(np.median(ttft)),
        ttft_p90_s=float(np.quantile(ttft, 0.9)),
        tpot_p50_s=float(np.median([(end - first) / max(config.tokens - 1, 1) for _, first, end in client.times])),
        topology=config.topology,
        steps_p50_s={name: statistics.median(each.get(name, 0.0) for each in client.steps) for name in STEPS},
    )


def counts(server: Server) -> dict[str, float]:
    steps, prompts = "vllm:iteration_tokens_total_count", "vllm:prompt_tokens_total"
    return {
        "embeds": server.metric(prompts, stage="encoder"),
        "encoder_steps": server.metric(steps, stage="encoder"),
        "prompt_tokens": server.metric(prompts, stage="prefill") or server.metric(prompts, stage="decode"),
        "prefill_steps": server.metric(steps, stage="prefill"),
        "decode_steps": server.metric(steps, stage="decode"),
    }


def measure_all(seconds: float) -> Iterator[Run]:
    """One start for each topology."""
    known: dict[str, Run] = {}
    for topology, configs in itertools.groupby(FIT + HELD_OUT, lambda config: config.topology):
        with tempfile.TemporaryDirectory() as folder, start(Path(folder), topology) as server:
            for config in configs:
                rate = known[config.poisson[0]].per_s * config.poisson[1] if config.poisson else None
                known[config.name] = run = measure(server, config, seconds, rate)
                print(f"{run.name}: {run.per_s:.1f} requests/s, TTFT {run.ttft_p50_s * 1000:.0f} ms", flush=True)
                yield run


def start(folder: Path, topology: Topology) -> AbstractContextManager[Server]:
    names = ["Ingress", "Encoder", "Decode"] + (["Prefill"] if topology == "E+P+D" else [])
    one = {name: {"num_replicas": 1, "autoscaling_config": None} for name in names}
    return serve_run(folder, arguments(BATCH_TOKENS) | ({} if topology == "E+P+D" else {"prefill": None}), one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a run")
    parser.add_argument("--fit", action="store_true", help="fit and compare again, with the runs of the result")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended
    if options.fit:
        document: dict[str, Any] = json.loads(RESULT.read_text())
        runs = [Run.of(run) for run in document["runs"]]
    else:
        seeds = "requests are numbered; the gaps of the Poisson process come from seed 1"
        document = record.about("benchmarks.measure_service", model="benchmarks.questions") | {"seed": seeds}
        runs = []
        with one_queue_per_core():
            for run in measure_all(options.seconds):
                runs.append(run)
                record.write(document | {"runs": [asdict(each) for each in runs]}, RESULT)
    fitted = [run for run in runs if run.name in {config.name for config in FIT}]
    service, idle_cores = fit(fitted, os.cpu_count() or 1)
    checked = [check(run, service, idle_cores, document["machine"]["cpus"]) for run in runs if run not in fitted]
    document |= {
        "idle_cores": idle_cores,
        "service_times": service.model_dump(mode="json"),
        "held_out": [asdict(each) for each in checked],
        "runs": [asdict(run) for run in runs],
    }
    record.write(document, RESULT)
    for each in checked:
        print(f"{each.name}: requests/s {each.per_s_error:+.0%}, TTFT p50 {each.ttft_error:+.0%}")


if __name__ == "__main__":
    main()
