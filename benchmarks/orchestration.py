"""What the orchestration costs by itself: the real deployments with an engine that does nothing (``null_engine.py``).

``python -m benchmarks.orchestration`` prints, and writes to ``benchmarks/results/orchestration.json``: requests/s and CPU-ms
per request by kind of process, streamed and not, by number of images and of tokens, 8 requests at a time; and what a hop
costs, from topologies with and without it.
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import cpu, load, null_engine
from benchmarks.systems import ours
from tools.harness import record
from tools.harness.media import image_url
from tools.harness.servers import Server

RESULT = Path(__file__).parent / "results" / "orchestration.json"
AT_A_TIME = load.TARGET.at_a_time or 1
TOKEN_S = 0.01
"""Time per output token."""
IMAGE = (load.IMAGE_SIZE, load.IMAGE_SIZE)
TEXT = " ".join(["word"] * load.TEXT_TOKENS)
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "E+P+D": {},
    "E+PD": {"prefill": None},
    "P+D": {"encoder": None},
    "one engine": {"encoder": None, "prefill": None},
}


@dataclass(frozen=True)
class Cell(load.Cell):
    at_a_time: int | None = AT_A_TIME
    stream: bool = True

    @property
    def name(self) -> str:
        return self.kind + ", streamed" * self.stream


HOPS = [Cell(images, 16) for images in (0, 1, 2)]
CELLS = [
    Cell(images, tokens, stream=stream) for images in (0, 1, 2, 4) for tokens in (16, 64) for stream in (True, False)
]


def body(cell: Cell, number: int) -> dict[str, Any]:
    """A request with pictures that no other has."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": image_url(number * 8 + index, IMAGE)}}
        for index in range(cell.images)
    ]
    content.append({"type": "text", "text": TEXT})
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": cell.tokens,
        "ignore_eos": True,
        "stream": cell.stream,
    }


async def put(server: Server, bodies: list[dict[str, Any]]) -> int:
    """All requests, ``AT_A_TIME`` of them under way; the number that failed."""
    waiting = iter([json.dumps(each).encode() for each in bodies])
    failed = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal failed
        for data in waiting:
            headers = {"content-type": "application/json"}
            async with session.post(server.url + "/v1/chat/completions", data=data, headers=headers) as response:
                answer = await response.read()
                failed += response.status != 200 or b'"length"' not in answer

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(work(session) for _ in range(AT_A_TIME)))
    return failed


def measure(server: Server, cell: Cell, count: int, first: int) -> dict[str, Any]:
    bodies = [body(cell, first + number) for number in range(count)]
    before, began = cpu.look(server.mark), time.monotonic()
    failed = asyncio.run(put(server, bodies))
    took = time.monotonic() - began
    spent = cpu.between(before, cpu.look(server.mark))
    return asdict(cell) | {
        "requests": count,
        "failed": failed,
        "requests_per_s": count / took,
        "cpu_ms": {kind: seconds * 1000 / count for kind, seconds in spent.items()},
    }


def visit(topology: str, cells: list[Cell], count: int) -> list[dict[str, Any]]:
    args = TOPOLOGIES[topology] | {"null_step_s": TOKEN_S}
    with tempfile.TemporaryDirectory(prefix="null-") as folder, ours(Path(folder), args, null_engine.APP) as server:
        for cell in HOPS:
            measure(server, cell, 2 * AT_A_TIME, 0)  # to warm up
        runs = []
        for number, cell in enumerate(cells):
            runs.append(found := measure(server, cell, count, 1000 * (number + 1)) | {"topology": topology})
            print(line(cell, found), flush=True)
    return runs


def line(cell: Cell, found: dict[str, Any]) -> str:
    spent = found["cpu_ms"]
    front = spent.get("HTTP proxy", 0) + spent.get("Ingress replica", 0)
    by_kind = ", ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(spent.items(), key=lambda pair: -pair[1]))
    return (
        f"| {found['topology']} | {cell.name} | {found['requests_per_s']:.1f} | {front:.1f} | {sum(spent.values()):.1f} "
        f"| {by_kind} | {found['failed']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128, help="per run")
    parser.add_argument("--quick", action="store_true", help="only the runs that the targets are set for")
    options = parser.parse_args()
    print("| topology | load | requests/s | HTTP proxy and ingress, CPU-ms | all | by kind | failed |")
    print("|---|---|---|---|---|---|---|")
    runs = visit("E+P+D", HOPS if options.quick else CELLS, options.requests)
    if not options.quick:
        for topology in list(TOPOLOGIES)[1:]:
            runs += visit(topology, HOPS, options.requests)
    command = "python -m benchmarks.orchestration" + " --quick" * options.quick
    record.write({"command": command, "runs": runs}, RESULT)


if __name__ == "__main__":
    main()
