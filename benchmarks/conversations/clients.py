"""Users as a process of its own: each asks, reads the answer, thinks, and asks on, until all sessions that count are over.

``drive`` runs this module for some loads, which tells of each what the users saw, and what the server's engines and
processes did between the first request that counts and the last answer that does.
"""

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import cpu
from benchmarks.conversations.loads import ANSWER_TOKENS, Load, Turn, session
from benchmarks.job import answer
from benchmarks.job import run as run_job
from benchmarks.streams import share, speeds, wait_for_quiet
from serve_app.stage import Stage

RUN_LIMIT_S = 600.0
SETTLE_S = 1.0
"""An engine's counters are on the metrics page a moment after the answer."""
SAMPLE = re.compile(r"^vllm:(prompt_tokens_by_source|request_success)_total\{(.*)\} (\S+)", re.MULTILINE)
LABEL = re.compile(r'(\w+)="(.*?)"')
LINE = re.compile(r"request=(\S+) (.+)")
SLOWEST = 3
LIKE_ALL, LIKE_NONE = 0.9, 0.1
"""The share of a prompt in the cache from which a request is a hit, and up to which it is a miss."""


@dataclass
class Asked:
    """A request as its user saw it."""

    id: str
    turn: int
    counts: bool
    began: float
    ttft_s: float = 0.0
    took_s: float = 0.0
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    wanted: int = ANSWER_TOKENS

    @property
    def whole(self) -> bool:
        return self.tokens == self.wanted

    @property
    def cached_share(self) -> float:
        return self.cached / self.prompt if self.prompt else 0.0


def body(load: Load, turn: Turn) -> bytes:
    return json.dumps(
        {
            "model": "demo",
            "messages": turn.messages,
            "max_tokens": load.answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def ask(client: aiohttp.ClientSession, url: str, data: bytes, asked: Asked) -> None:
    """What becomes of a request that fails is that it has no tokens."""
    headers = {"content-type": "application/json", "x-request-id": asked.id}
    try:
        async with client.post(f"{url}/v1/chat/completions", data=data, headers=headers) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                asked.ttft_s = asked.ttft_s or time.monotonic() - asked.began
                if b'"usage"' in line and (usage := json.loads(line[6:]).get("usage")):
                    asked.prompt, asked.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    asked.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (aiohttp.ClientError, TimeoutError) as error:
        print(f"failed: {type(error).__name__}: {error}")
    asked.took_s = time.monotonic() - asked.began


class Sessions:
    """The sessions of one user. Those that count are made before the load begins: pictures take time."""

    def __init__(self, load: Load, seed: int, user: int) -> None:
        self._load, self._seed, self._user = load, seed, user
        self._made = [list(self._session(number)) for number in range(load.warm_up + load.sessions + 1)]

    def _session(self, number: int) -> Iterator[tuple[float, bytes]]:
        return ((turn.think_s, body(self._load, turn)) for turn in session(self._load, self._seed, self._user, number))

    def __getitem__(self, number: int) -> list[tuple[float, bytes]]:
        return self._made[number] if number < len(self._made) else list(self._session(number))


Engine = tuple[str, str]
"""Its stage and replica; empty where there are none."""


@dataclass
class Done:
    """What an engine has done: prompt tokens that it computed, which were in no cache, and requests that it answered."""

    computed: float = 0.0
    requests: float = 0.0


@dataclass(frozen=True)
class Look:
    """A server at one time."""

    time: float
    spent: dict[int, cpu.Spent]
    machine_s: float
    own_s: float
    engines: dict[Engine, Done]


async def look(client: aiohttp.ClientSession, pages: dict[str, str], mark: str) -> Look:
    """``pages``: addresses of metrics by the stage whose engines they are of, where the samples do not say it."""
    now, machine, own = time.monotonic(), cpu.machine_s(), time.process_time()
    spent = await asyncio.to_thread(cpu.look, mark)
    found: dict[Engine, Done] = {}
    for stage, address in pages.items():
        async with client.get(address) as response:
            found |= engines(await response.text(), stage)
    return Look(now, spent, machine, own, found)


def engines(page: str, stage: str = "") -> dict[Engine, Done]:
    """By engine, from a page of metrics."""
    found: dict[Engine, Done] = {}
    for name, labels, value in SAMPLE.findall(page):
        told = dict(LABEL.findall(labels))
        of = found.setdefault((told.get("stage", stage), told.get("replica", "")), Done())
        if name == "request_success":
            of.requests += float(value)
        elif told["source"] == "local_compute":
            of.computed += float(value)
    return found


def between(before: dict[Engine, Done], after: dict[Engine, Done]) -> dict[Engine, Done]:
    def less(engine: Engine, until: Done) -> Done:
        since = before.get(engine, Done())
        return Done(until.computed - since.computed, until.requests - since.requests)

    return {engine: less(engine, until) for engine, until in after.items()}


def work(found: dict[Engine, Done]) -> dict[str, float]:
    """Prompt tokens computed by each prefill replica."""
    return {replica: each.computed for (stage, replica), each in found.items() if stage == Stage.PREFILL}


class Run:
    """One load on one server."""

    def __init__(self, load: Load, seed: int, url: str, mark: str, pages: dict[str, str]) -> None:
        self._load, self._seed, self._url, self._mark, self._pages = load, seed, url, mark, pages
        self._users = [Sessions(load, seed, user) for user in range(load.users)]
        self._left = load.users
        """Users with sessions that count before them."""
        self._begun: asyncio.Task[Look] | None = None
        self._done = asyncio.Event()
        self.asked: list[Asked] = []

    async def _user(self, client: aiohttp.ClientSession, user: int) -> None:
        await asyncio.sleep(random.Random(f"{self._seed} {user}").random() * self._load.think_s)
        first, after = self._load.warm_up, self._load.warm_up + self._load.sessions
        number = 0
        while True:  # who is done talks on, so that the load stays the same for the others
            counts = first <= number < after
            if counts and self._begun is None:
                self._begun = asyncio.create_task(look(client, self._pages, self._mark))
            for turn, (think_s, data) in enumerate(self._users[user][number]):
                await asyncio.sleep(think_s)
                name = re.sub(r"\W+", "-", f"{self._load.name} {self._seed} {user} {number} {turn}")
                self.asked.append(asked := Asked(name, turn, counts, time.monotonic(), wanted=self._load.answer))
                await ask(client, self._url, data, asked)
            number += 1
            self._left -= number == after
            if not self._left:
                self._done.set()

    async def go(self) -> tuple[Look, Look, list[float]]:
        """The server when the first session that counts began, and after the last; the machine's speed meanwhile."""
        found: list[float] = []
        limit = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as client:
            measuring = asyncio.create_task(speeds(found))
            users = [asyncio.create_task(self._user(client, user)) for user in range(self._load.users)]
            done = asyncio.create_task(self._done.wait())
            over, _ = await asyncio.wait((done, *users), timeout=RUN_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            ended = time.monotonic()
            for task in over:
                task.result()  # a user's raises
            if not self._begun or not over:
                raise TimeoutError(f"{self._load.name}: not over after {RUN_LIMIT_S:g} s")
            before = await self._begun
            await asyncio.sleep(SETTLE_S)
            after = await look(client, self._pages, self._mark)
            for task in (measuring, *users):  # type: asyncio.Task[Any]
                task.cancel()
            await asyncio.gather(measuring, *users, return_exceptions=True)
            return before, Look(ended, after.spent, after.machine_s, after.own_s, after.engines), found


def outcome(asked: list[Asked], before: Look, after: Look) -> dict[str, Any]:
    """What is kept of a run. Rates and work are of all requests meanwhile, all else of those that count."""
    took = after.time - before.time
    counted = [each for each in asked if each.counts]
    whole = [each for each in counted if each.whole]
    meanwhile = [each for each in asked if each.whole and before.time <= each.began + each.took_s <= after.time]
    seconds = cpu.between(before.spent, after.spent)
    own, machine = after.own_s - before.own_s, after.machine_s - before.machine_s
    by_turn = [[each for each in whole if each.turn == turn] for turn in range(1 + max(each.turn for each in counted))]
    parts = {"first": [each for each in whole if not each.turn], "later": [each for each in whole if each.turn]}
    hits = [each.ttft_s for each in whole if each.cached_share >= LIKE_ALL]
    misses = [each.ttft_s for each in whole if each.cached_share <= LIKE_NONE]
    worked = between(before.engines, after.engines)
    return {
        "took_s": took,
        "failed": len(counted) - len(whole),
        "requests": len(whole),
        "requests_meanwhile": len(meanwhile),
        "requests_per_s": len(meanwhile) / took,
        "prompt_tokens_meanwhile": sum(each.prompt for each in meanwhile),
        "prompt_tokens": sum(each.prompt for each in whole),
        "cached_tokens": sum(each.cached for each in whole),
        **{f"ttft_p{percent}_ms": ttft_ms(whole, percent) for percent in (50, 90, 99)},
        **{f"ttft_{part}_p{at}_ms": ttft_ms(some, at) for part, some in parts.items() for at in (50, 99)},
        "hits": len(hits),
        "ttft_hit_ms": share(hits, 50) * 1000,
        "misses": len(misses),
        "ttft_miss_ms": share(misses, 50) * 1000,
        "by_turn": [
            {
                "prompt": statistics.fmean(each.prompt for each in some),
                "cached": statistics.fmean(each.cached for each in some),
                "ttft_p50_ms": ttft_ms(some, 50),
            }
            for some in by_turn
            if some
        ],
        "work": work(worked),
        "engines": [[stage, done.computed, done.requests] for (stage, _), done in worked.items()],
        "cpu_s": seconds,
        "client_cpu_s": own,
        "other_cores": max(machine - own - sum(seconds.values()), 0.0) / took,
    }


def slowest(asked: list[Asked], log: str) -> list[dict[str, Any]]:
    """Of the requests that count those with the latest first tokens, and what the server's log says of them."""
    last = sorted((each for each in asked if each.counts), key=lambda each: each.ttft_s)[-SLOWEST:]
    told = {found[1]: found[2] for found in LINE.finditer(log)}
    return [{"ttft_ms": each.ttft_s * 1000, "turn": each.turn, "log": told.get(each.id, "")} for each in last]


def ttft_ms(some: list[Asked], percent: int) -> float:
    return share([each.ttft_s for each in some], percent) * 1000


def drive(
    url: str,
    mark: str,
    loads: list[Load],
    seed: int,
    log: Path,
    patience_s: float = 0.0,
    pages: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The loads one after another. ``patience_s``: how long each waits for other programs to be done; ``pages``: metrics of
    the engines (see ``look``), those of ``url`` where none are named."""
    job = {"url": url, "mark": mark, "loads": [asdict(load) for load in loads], "seed": seed, "patience_s": patience_s}
    job["pages"] = pages or {"": f"{url}/metrics"}
    limit_s = 120 + (RUN_LIMIT_S + patience_s + 10) * len(loads)
    return run_job("benchmarks.conversations.clients", job, log, limit_s, {"PYTHONUNBUFFERED": "1"})


def run(load: Load, seed: int, url: str, mark: str, pages: dict[str, str]) -> dict[str, Any]:
    import uvloop

    one = Run(load, seed, url, mark, pages)
    before, after, found = uvloop.run(one.go())
    log = Path(mark).read_text(errors="replace")  # a server's mark is the path of its log
    last = {"slowest": slowest(one.asked, log), "speed_ms": statistics.median(found)}
    return {"load": load.name, **outcome(one.asked, before, after), **last}


def answer_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for load in (Load(**each | {"question": tuple(each["question"])}) for each in job["loads"]):
        wait_for_quiet(job["mark"], job["patience_s"])
        found.append(run(load, job["seed"], job["url"], job["mark"], job["pages"]))
    return found


if __name__ == "__main__":
    answer(answer_job)
