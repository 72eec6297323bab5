"""Load on a running server by vLLM's own generator (``vllm bench serve``: chat streamed, dataset random-mm).

``drive`` runs this module as a process of its own, which makes one run per cell. What vLLM's generator reports is kept;
added are the CPU seconds that the server's processes spend from the first request of a run to its last answer, and how many
answers did not have all their tokens.
"""

import asyncio
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import cpu
from benchmarks.job import answer
from benchmarks.job import run as run_job

IMAGE_SIZE = 224
TEXT_TOKENS = 64
RUN_LIMIT_S = 240.0
"""A run that takes longer is given up, and all its requests count as failed."""

KEPT = (
    "duration",
    "completed",
    "request_throughput",
    "total_input_tokens",
    "p50_ttft_ms",
    "p90_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "mean_tpot_ms",
)


@dataclass(frozen=True)
class Cell:
    """Requests of one kind: ``at_a_time``, or a Poisson process of ``rate`` per second."""

    images: int
    tokens: int
    at_a_time: int | None = None
    rate: float | None = None

    @property
    def load(self) -> str:
        return f"{self.at_a_time} at a time" if self.rate is None else f"{self.rate:g}/s"

    @property
    def kind(self) -> str:
        return f"{self.images or 'no'} image{'s' * (self.images != 1)}, {self.tokens} tokens"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.load}"

    @property
    def requests(self) -> int:
        return 128 if self.rate is None else 32


TARGET = Cell(images=2, tokens=16, at_a_time=8)
TEXT = Cell(images=0, tokens=16, at_a_time=8)
QUICK = [TARGET, TEXT]


def seeds_of(round_: int) -> Iterator[int]:
    """The same for all systems of a round."""
    return iter(range(1000 * round_ + 1, 1000 * (round_ + 1)))


def loads(cells: list[Cell]) -> dict[str, Any]:
    """What a report says of its requests."""
    return {
        "workload": {"image_size": IMAGE_SIZE, "text_tokens": TEXT_TOKENS, "cells": len(cells)},
        "seeds": "1000 × round + number of the run, the same for every system",
    }


def arguments(cell: Cell, url: str, tokenizer: str, seed: int) -> list[str]:
    """Options of ``vllm bench serve``, which by itself sends ``ignore_eos`` with this dataset."""
    options = {
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--base-url": url,
        "--model": "demo",
        "--tokenizer": tokenizer,
        "--dataset-name": "random-mm",
        "--random-input-len": TEXT_TOKENS,
        "--random-output-len": cell.tokens,
        "--random-mm-base-items-per-request": cell.images,
        "--random-mm-bucket-config": f"{{({IMAGE_SIZE}, {IMAGE_SIZE}, 1): 1.0}}",
        "--num-prompts": cell.requests,
        "--seed": seed,
        "--temperature": 0,
        "--metric-percentiles": "50,90,99",
        "--ready-check-timeout-sec": 0,
    }
    options |= {"--max-concurrency": cell.at_a_time} if cell.rate is None else {"--request-rate": cell.rate}
    return [str(word) for option in options.items() for word in option] + ["--disable-tqdm"]


def outcome(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run; of each answer a checksum of 16 bits, in the order of the requests.

    A stream that broke off after its first token counts as failed, which vLLM's generator does not do.
    """
    short = sum(length != cell.tokens for length in result["output_lens"])
    errors = sorted({error[-300:] for error in result["errors"] if error})
    answers = " ".join(f"{zlib.crc32(answer.encode()) & 0xFFFF:04x}" for answer in result["generated_texts"])
    return {key: result[key] for key in KEPT} | {"failed": short, "errors": errors[:3], "answers": answers}


def drive(url: str, mark: str, tokenizer: str, cells: list[tuple[Cell, int]], log: Path) -> list[dict[str, Any]]:
    """A run for each cell with its seed, in order."""
    job = {"url": url, "mark": mark, "tokenizer": tokenizer, "cells": [(asdict(cell), seed) for cell, seed in cells]}
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return run_job("benchmarks.load", job, log, 120 + RUN_LIMIT_S * len(cells), env)


def run(cell: Cell, seed: int, job: dict[str, Any]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    generate = serve.benchmark
    found: dict[str, Any] = {}

    async def measured(**options: Any) -> Any:
        """vLLM's run without what comes before and after it, such as making the pictures."""
        before, machine, began, own = cpu.look(job["mark"]), cpu.machine_s(), time.monotonic(), time.process_time()
        result = await asyncio.wait_for(generate(**options), RUN_LIMIT_S)
        machine, took, own = cpu.machine_s() - machine, time.monotonic() - began, time.process_time() - own
        seconds = cpu.between(before, cpu.look(job["mark"]))
        others = max(machine - own - sum(seconds.values()), 0.0) / took
        found.update(outcome(cell, result) | {"cpu_s": seconds, "other_cores": others})
        return result

    serve.benchmark = measured
    try:
        serve.main(parser.parse_args(arguments(cell, job["url"], job["tokenizer"], seed)))
    except TimeoutError:
        found = {"completed": 0, "failed": cell.requests, "errors": [f"not done after {RUN_LIMIT_S:g} s"]}
    finally:
        serve.benchmark = generate
    return {"cell": asdict(cell), "seed": seed, "requests": cell.requests} | found


def work(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [run(Cell(**cell), seed, job) for cell, seed in job["cells"]]


if __name__ == "__main__":
    answer(work)
