"""Load whose own cost is small beside what it measures: streams read from raw sockets, by a process of its own.

``drive`` runs this module, which puts waves of requests to a server and tells of each: rates and times as the clients see
them, the CPU seconds of the server's processes from the first request to the last answer, and, besides, those of this
process. On a machine of two cores it competes with the server for them.
"""

import asyncio
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import cpu
from benchmarks.job import answer
from benchmarks.job import run as run_job

IMAGE = 224, 224
TEXT_WORDS = 64
WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "house",
    "tree",
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "is",
    "are",
    "not",
    "in",
]
RUN_LIMIT_S = 180.0
SPEED_EVERY_S = 0.25
QUIET_CORES = 0.2
PACE_MS = 1.7
"""Of ``piece``, on the quiet machine that the targets were set for. Neighbours of a virtual machine take a third of its
pace, for seconds or for hours, and no program shows it."""


@dataclass(frozen=True)
class Wave:
    """``streams`` requests under way at a time, each stream with so many answers of so many tokens, one after another."""

    streams: int
    tokens: int
    answers: int = 1
    images: int = 0

    @property
    def requests(self) -> int:
        return self.streams * self.answers

    @property
    def name(self) -> str:
        images = f"{self.images} image{'s' * (self.images > 1)}, " * bool(self.images)
        return f"{images}{self.streams} × {self.tokens}"


def body(wave: Wave, number: int) -> bytes:
    """A request that no other number has: neither its pictures nor its text are in a cache."""
    from tools.harness.media import image_url

    said = random.Random(number)
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": image_url(number * 8 + index, IMAGE)}}
        for index in range(wave.images)
    ]
    content.append({"type": "text", "text": " ".join(said.choices(WORDS, k=TEXT_WORDS))})
    return json.dumps(
        {
            "model": "demo",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": wave.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def request(host: str, data: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(data)}\r\n\r\n".encode() + data


EVENT, DONE, END = b"data: {", b"data: [DONE]", b"\r\n0\r\n\r\n"
WITHOUT_TEXT = 2
"""Events of a streamed chat: the role at its begin, the usage at its end."""


@dataclass
class Answer:
    """One answer as its bytes come, HTTP's chunks and all: counted, not parsed."""

    began: float
    status: int = 0
    events: int = 0
    first: float = 0.0
    """When the first event came, and the last."""
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Seconds between events that did not come together."""
    _tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Whether the answer has ended."""
        if not self.status:
            self.status = int(data.split(b" ", 2)[1])
        new = (self._tail[1 - len(EVENT) :] + data).count(EVENT)
        if new:
            if self.events:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.events += new
            self.last = now
        self._tail = (self._tail + data)[-2048:]
        return self.status != 200 or self._tail.endswith(END)

    @property
    def tokens(self) -> int:
        """By the usage at its end; 0 where it broke off."""
        text = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", self._tail)  # another proxy's chunks may part a word
        told = re.findall(rb'"completion_tokens":\s*(\d+)', text)
        return int(told[-1]) if told and DONE in text else 0


class Client(asyncio.Protocol):
    """A connection that asks the next request when an answer has ended, for as long as there are any."""

    def __init__(self, waiting: Iterator[bytes], answers: list[Answer], ended: asyncio.Future[bool]) -> None:
        self._waiting, self._answers, self._ended = waiting, answers, ended
        self._answer: Answer | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        data = next(self._waiting, None)
        if data is None:
            self._answer = None
            self._transport.close()
        else:
            self._answer = Answer(time.monotonic())
            self._answers.append(self._answer)
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        assert self._answer
        if self._answer.take(data, time.monotonic()):
            if self._answer.status == 200:
                self._ask()
            else:  # what follows of it need not be read
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Whether there is more to ask, on another connection."""
        if not self._ended.done():
            self._ended.set_result(self._answer is not None)


async def stream(url: str, waiting: Iterator[bytes], answers: list[Answer]) -> None:
    """One stream of a wave."""
    where, more = urlsplit(url), True
    assert where.hostname and where.port
    while more:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        await loop.create_connection(partial(Client, waiting, answers, ended), where.hostname, where.port)
        more = await ended


def piece() -> float:
    """CPU ms of a fixed piece of Python. Figures of CPU time compare at like values."""
    began, total, kept = time.thread_time(), 0, {}
    for number in range(22_000):
        total += number * number % 7
        kept[number & 255] = total
    return (time.thread_time() - began) * 1000


async def speeds(found: list[float]) -> None:
    while True:
        found.append(piece())
        await asyncio.sleep(SPEED_EVERY_S)


def share(values: Sequence[float], percent: int) -> float:
    """A percentile; 0 of no values."""
    ordered = sorted(values)
    return ordered[min(math.ceil(len(ordered) * percent / 100), len(ordered)) - 1] if ordered else 0.0


def outcome(wave: Wave, answers: list[Answer], took: float) -> dict[str, Any]:
    """What the clients saw. An answer without all its tokens failed, and counts for nothing else."""
    whole = [answer for answer in answers if answer.tokens == wave.tokens]
    tokens = sum(answer.tokens for answer in whole)
    ttft = [answer.first - answer.began for answer in whole]
    tpot = [(answer.last - answer.first) / (wave.tokens - 1) for answer in whole if wave.tokens > 1]
    gaps = [gap for answer in whole for gap in answer.gaps]
    return {
        "took_s": took,
        "failed": wave.requests - len(whole),
        "requests_per_s": len(whole) / took,
        "tokens_per_s": tokens / took,
        "ttft_p50_ms": share(ttft, 50) * 1000,
        "ttft_p99_ms": share(ttft, 99) * 1000,
        "tpot_p50_ms": share(tpot, 50) * 1000,
        "tpot_p99_ms": share(tpot, 99) * 1000,
        "gap_p99_ms": share(gaps, 99) * 1000,
        "chunks_per_token": sum(answer.events - WITHOUT_TEXT for answer in whole) / tokens if tokens else 0.0,
    }


async def put(url: str, requests: list[bytes], streams: int) -> tuple[list[Answer], float, list[float]]:
    """All requests; their answers, the seconds that took, and the machine's speed meanwhile."""
    waiting, answers, found = iter(requests), [], []  # type: ignore[var-annotated]
    measuring = asyncio.create_task(speeds(found))
    began = time.monotonic()
    try:
        async with asyncio.timeout(RUN_LIMIT_S), asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream(url, waiting, answers))
    except* (TimeoutError, OSError) as errors:
        print(f"given up: {errors.exceptions}")
    finally:
        measuring.cancel()
    return answers, time.monotonic() - began, found


def busy(mark: str) -> float:
    """Cores that programs other than the server use, over a second."""
    before, machine, own = cpu.look(mark), cpu.machine_s(), time.process_time()
    time.sleep(1.0)
    others = cpu.machine_s() - machine - (time.process_time() - own)
    return others - sum(cpu.between(before, cpu.look(mark)).values())


def wait_for_quiet(mark: str, patience_s: float) -> None:
    """Until no other program has much to do, or for so long."""
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends and busy(mark) > QUIET_CORES:
        pass


def run(wave: Wave, first: int, url: str, mark: str) -> dict[str, Any]:
    import uvloop

    requests = [request(urlsplit(url).netloc, body(wave, first + number)) for number in range(wave.requests)]
    before, machine, own = cpu.look(mark), cpu.machine_s(), time.process_time()
    answers, took, found = uvloop.run(put(url, requests, wave.streams))
    machine, own = cpu.machine_s() - machine, time.process_time() - own
    seconds = cpu.between(before, cpu.look(mark))
    return {
        "wave": asdict(wave),
        **outcome(wave, answers, took),
        "cpu_s": seconds,
        "client_cpu_s": own,
        "other_cores": max(machine - own - sum(seconds.values()), 0.0) / took,
        "speed_ms": statistics.median(found),
    }


def drive(
    url: str, mark: str, waves: list[Wave], first: int, log: Path, patience_s: float = 0.0
) -> list[dict[str, Any]]:
    """The waves one after another; requests are numbered on from ``first``, so that none comes twice. ``patience_s``: how
    long each waits for other programs to be done."""
    named = [asdict(wave) for wave in waves]
    job = {"url": url, "mark": mark, "waves": named, "first": first, "patience_s": patience_s}
    limit_s = 120 + (RUN_LIMIT_S + patience_s + 10) * len(waves)
    return run_job("benchmarks.streams", job, log, limit_s, {"PYTHONUNBUFFERED": "1"})


def work(job: dict[str, Any]) -> list[dict[str, Any]]:
    first, results = job["first"], []
    for wave in (Wave(**each) for each in job["waves"]):
        wait_for_quiet(job["mark"], job["patience_s"])
        results.append(run(wave, first, job["url"], job["mark"]))
        first += wave.requests
    return results


if __name__ == "__main__":
    answer(work)
