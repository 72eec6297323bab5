"""One system: started, asked for its answers, put under load, looked at, ended. What fails is a result like any other."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.gpu import probe
from benchmarks.gpu.answers import ask_all
from benchmarks.gpu.budget import Budget, limit
from benchmarks.gpu.card import Card, programs, used_mib
from benchmarks.startup import phases
from benchmarks.systems import System
from tools.harness.servers import Server

Found = dict[str, Any]
TELLING = re.compile(r"error|critical|exception|out of memory|^EPD ", re.IGNORECASE)
NOISE = re.compile(r"ProxyActor|more than 30s to initialize|slow __init__")
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def excerpt(log: str, telling: int = 60, last: int = 60) -> list[str]:
    """Of the log of a system that failed: the last lines that tell of errors, and the last of all. One file is then all that
    has to be passed on."""
    lines = [line for line in COLOUR.sub("", log).splitlines() if not NOISE.search(line)]
    before, end = lines[:-last], lines[-last:]
    return [line for line in before if TELLING.search(line)][-telling:] + end


@dataclass
class Visit:
    """``card``: None without one, where nothing tells memory. ``tokenizer``: the model's folder."""

    name: str
    card: Card | None
    tokenizer: str
    rounds: int
    say: Callable[[str], None]
    found: Found = field(init=False)

    def __post_init__(self) -> None:
        self.found = {"system": self.name, "rounds": []}

    def run(self, system: System, budget: Budget, to_come: int) -> Found:
        found = self.found
        with (
            tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder,
            self._failing(found, folder),
        ):
            found["card_before_mib"] = used_mib(self.card) if self.card else None
            until = time.monotonic() + budget.fair(to_come)
            began = time.monotonic()
            with ExitStack() as stack:
                with limit(budget.most(to_come)):
                    self.say(f"{self.name}: starts")
                    server = stack.enter_context(system(Path(folder)))
                    found["start_s"] = time.monotonic() - began
                    self._measure(server, found, Path(folder), until)
                found["measured"] = True
                self.say(f"{self.name}: ends")
        return found

    @contextmanager
    def _failing(self, found: Found, folder: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # one system's failure is a result, not the end of the others'
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if found.get("measured"):  # what it leaves behind changes no figure
                found["ending"] = what
                return
            found["error"] = what
            logs = [path for name in ("serve.log", "vllm.log") if (path := Path(folder, name)).exists()]
            found["log"] = [line for log in logs for line in excerpt(log.read_text(errors="replace"))]
            self.say(f"{self.name}: {found['error']}")

    def _measure(self, server: Server, found: Found, folder: Path, until: float) -> None:
        self.say(f"{self.name}: ready after {found['start_s']:.0f} s; asks the same of all")
        found["phases"] = phases(server.log.read_text(errors="replace"))
        found["answers"] = {name: asdict(answer) for name, answer in ask_all(server).items()}
        self._look(server, found)
        took = 0.0
        for round_ in range(self.rounds):
            if round_ and time.monotonic() + took > until:
                self.say(f"{self.name}: no time for more than {round_} of {self.rounds} rounds")
                break
            began = time.monotonic()
            found["rounds"].append(self._load(server, round_, folder / "load.log"))
            took = time.monotonic() - began
            self._look(server, found)  # the memory that an engine has taken it keeps

    def _load(self, server: Server, round_: int, log: Path) -> list[dict[str, Any]]:
        seeds = load.seeds_of(round_)
        warm_up = load.QUICK if not round_ else []
        runs = load.drive(
            server.url, server.mark, self.tokenizer, [(cell, next(seeds)) for cell in warm_up + load.QUICK], log
        )
        runs = runs[len(warm_up) :]
        rates = ", ".join(f"{run.get('request_throughput', 0.0):.1f}" for run in runs)
        self.say(f"{self.name}: round {round_ + 1}, requests/s {rates}; {sum(run['failed'] for run in runs)} failed")
        return runs

    def _look(self, server: Server, found: Found) -> None:
        page = server.get("/metrics").text
        found["kv"] = probe.kv_moved(page)
        found["embeddings"] = probe.embeddings_moved(page)
        found["transports"] = probe.transports(server.log.read_text(errors="replace"))
        if self.card is not None:
            found["shares"] = probe.shares(server)
            found["memory_mib"] = probe.memory(server, programs(self.card))
            found["card_mib"] = used_mib(self.card)
