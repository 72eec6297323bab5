"""Clients as a process of its own: requests at their times, or a number of them at a time, each answer taken token by token.

``drive`` runs this module with the name of a function that makes the requests of a run, so that pictures are made and kept
there. Told of each request are times as the client saw them; of all tokens of a kind of request, the times between them.
"""

import asyncio
import importlib
import json
import os
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import cpu
from benchmarks.job import answer
from benchmarks.job import run as run_job
from benchmarks.streams import share, speeds

PATH = "/v1/chat/completions"
LIMIT_S = 120.0
"""A request that takes longer has failed."""
TOKENS = re.compile(rb'"token_ids":\[([\d,]+)\]')
TOLD = "x-epd", "server-timing"
"""Headers of ours that are kept."""
USAGE = re.compile(rb'"completion_tokens":(\d+)')
AHEAD_OF_OTHERS = -10
"""Nice value, where it is allowed: what a client sees must not depend on when it gets a core."""


@dataclass(frozen=True)
class Ask:
    """A request, ``at`` so many seconds after the run's begin."""

    at: float
    kind: str
    body: bytes


@dataclass
class Seen:
    """What became of it. Seconds; ``gaps`` has one for each token after the first, 0 for those that came together."""

    kind: str
    at: float
    status: int = 0
    ttft: float = 0.0
    took: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str = ""
    text: int = 0
    """A checksum of the tokens: all systems decode greedily."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error


def picture(seed: int, side: int) -> dict[str, Any]:
    """A part of a message: a square picture that no other seed gives."""
    from tools.harness.media import image_url

    return {"type": "image_url", "image_url": {"url": image_url(seed, (side, side))}}


def chat(content: list[dict[str, Any]], tokens: int, **more: Any) -> bytes:
    """A streamed chat of exactly so many tokens."""
    return json.dumps(
        {
            "model": "demo",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        | more
    ).encode()


async def ask(session: aiohttp.ClientSession, url: str, each: Ask, began: float) -> Seen:
    seen, wanted, last = Seen(each.kind, time.monotonic() - began), 0, 0.0
    sent = time.monotonic()
    try:
        async with session.post(url + PATH, data=each.body, headers={"content-type": "application/json"}) as response:
            seen.status = response.status
            headers = {name.lower(): value for name, value in response.headers.items()}
            seen.headers = {name: value for name, value in headers.items() if name.startswith(TOLD)}
            tail = b""
            async for data in response.content.iter_any():
                now = time.monotonic()
                *events, tail = (tail + data).split(b"\n\n")
                for event in events:
                    if found := TOKENS.search(event.replace(b" ", b"")):
                        count = found[1].count(b",") + 1
                        seen.text = zlib.crc32(b"," + found[1], seen.text)  # however tokens come together
                        seen.gaps += [now - last] * bool(seen.tokens) + [0.0] * (count - 1)
                        seen.ttft = seen.ttft or now - sent
                        seen.tokens += count
                        last = now
                    if b'"usage"' in event and (told := USAGE.search(event.replace(b" ", b""))):
                        wanted = int(told[1])
                    if b'"error"' in event:
                        seen.error = event.decode(errors="replace")[-300:]
            if seen.status != 200:
                seen.error = seen.error or tail.decode(errors="replace")[-300:]
            elif not wanted or wanted != seen.tokens:
                seen.error = seen.error or f"broke off: {seen.tokens} tokens of {wanted}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        seen.error = f"{type(error).__name__}: {error}"[-300:]
    seen.took = time.monotonic() - sent
    return seen


async def play(url: str, asks: Sequence[Ask], at_a_time: int | None, limit_s: float) -> tuple[list[Seen], list[float]]:
    """Every request at its time; or in order, ``at_a_time`` under way. What became of them, and the machine's speed."""
    found: list[float] = []
    measuring = asyncio.create_task(speeds(found))
    timeout = aiohttp.ClientTimeout(total=limit_s)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began, waiting, seen = time.monotonic(), iter(asks), []  # type: ignore[var-annotated]

        async def one(each: Ask) -> None:
            await asyncio.sleep(max(began + each.at - time.monotonic(), 0))
            seen.append(await ask(session, url, each, began))

        async def several() -> None:
            for each in waiting:
                seen.append(await ask(session, url, each, began))

        jobs = [one(each) for each in asks] if at_a_time is None else [several() for _ in range(at_a_time)]
        await asyncio.gather(*jobs)
    measuring.cancel()
    return seen, found


def quantiles(gaps: Sequence[float]) -> dict[str, float]:
    """Of times between tokens, in ms."""
    ordered = sorted(gaps)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
    found = {name: 1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)] for name, part in at.items()}
    return found | {"worst": 1000 * ordered[-1], "mean": 1000 * statistics.fmean(ordered), "count": len(ordered)}


def kept(seen: Seen, timing: bool = False) -> dict[str, Any]:
    """Of a request, what a result holds; ``timing``: with the times of its steps, where the server tells them."""
    gaps = seen.gaps or [0.0]
    row: dict[str, Any] = {
        "kind": seen.kind,
        "at": round(seen.at, 3),
        "ttft": round(seen.ttft, 4),
        "took": round(seen.took, 3),
        "tpot": round(statistics.fmean(gaps), 5),
        "p95": round(share(gaps, 95), 4),
        "worst": round(max(gaps), 4),
        "tokens": seen.tokens,
        "text": f"{seen.text:08x}",
    }
    row |= {"timing": seen.headers.get("server-timing", "")} if timing else {}
    return row | ({} if seen.ok else {"failed": f"{seen.status} {seen.error}"})


def run(load: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    import uvloop

    module, _, name = job["maker"].partition(":")
    maker: Callable[..., Iterable[Ask]] = getattr(importlib.import_module(module), name)
    options = dict(load)
    at_a_time, limit_s = options.pop("at_a_time", None), options.pop("limit_s", LIMIT_S)
    timing = options.pop("timing", False)
    asks = list(maker(**options))
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, AHEAD_OF_OTHERS)
    before, machine, began = cpu.look(job["mark"]), cpu.machine_s(), time.monotonic()
    own = time.process_time()
    seen, speed = uvloop.run(play(job["url"], asks, at_a_time, limit_s))
    took, own, machine = time.monotonic() - began, time.process_time() - own, cpu.machine_s() - machine
    spent = cpu.between(before, cpu.look(job["mark"]))
    kinds = {each.kind: [gap for one in seen if one.kind == each.kind and one.ok for gap in one.gaps] for each in seen}
    return {
        "load": load,
        "took_s": took,
        "requests": [kept(each, timing) for each in sorted(seen, key=lambda each: each.at)],
        "gaps_ms": {kind: quantiles(gaps) for kind, gaps in kinds.items() if gaps},
        "cpu_s": spent,
        "client_cpu_s": own,
        "other_cores": max(machine - own - sum(spent.values()), 0.0) / took,
        "speed_ms": statistics.median(speed),
    }


def drive(url: str, mark: str, maker: str, loads: list[Any], log: Path, limit_s: float = 600.0) -> list[dict[str, Any]]:
    """A run for each load (a dataclass or a mapping: the arguments of ``maker``, a function by ``module:name``; besides
    ``at_a_time``, ``limit_s`` and ``timing``), one after another."""
    plain = [load if isinstance(load, dict) else asdict(load) for load in loads]
    job = {"url": url, "mark": mark, "maker": maker, "loads": plain}
    return run_job("benchmarks.questions.clients", job, log, limit_s * len(loads), {"PYTHONUNBUFFERED": "1"})


def work(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [run(load, job) for load in job["loads"]]


if __name__ == "__main__":
    answer(work)
