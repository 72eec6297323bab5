"""CPU time of a server's processes, by what they are, and of the whole machine."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tools.harness.servers import marked_processes

ENGINES = "engines"
KINDS = {
    ENGINES: r"VLLM::|multiprocessing\.spawn",
    "HTTP proxy": r"ProxyActor|benchmarks\.baselines\.proxy",
    "API servers": r"vllm\.entrypoints\.openai",
}
"""By title. An engine may have none: setproctitle gives up in a process whose first environment variable has been changed.
Its command line then says that it was spawned, as nothing else of a server is."""
REPLICA = re.compile(r"ServeReplica:\w+:(\w+)")
OTHERS = "others"
"""With Ray: its own processes."""


@dataclass(frozen=True)
class Spent:
    kind: str
    seconds: float


def kind_of(title: str) -> str:
    """What a process is, by its title; a replica without its engine, which is a process of its own."""
    if replica := REPLICA.search(title):
        return f"{replica[1]} replica"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, title)), OTHERS)


def look(mark: str) -> dict[int, Spent]:
    """What each process of a server has spent so far."""
    found = {}
    for process in marked_processes(mark):
        with suppress(psutil.Error):
            times, title = process.cpu_times(), " ".join(process.cmdline()) or process.name()
            found[process.pid] = Spent(kind_of(title), times.user + times.system)
    return found


def between(before: dict[int, Spent], after: dict[int, Spent]) -> dict[str, float]:
    """Seconds by kind. Of a process that ended in between nothing is known: it counts for nothing."""
    seconds: dict[str, float] = {}
    for pid, spent in after.items():
        earlier = before[pid].seconds if pid in before else 0.0
        seconds[spent.kind] = seconds.get(spent.kind, 0.0) + spent.seconds - earlier
    return seconds


def count(found: Iterable[Spent], kind: str) -> int:
    return sum(spent.kind == kind for spent in found)


def machine_s() -> float:
    """CPU time of all programs of this machine."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
