"""How long a start takes, what of it each stage, and whether the first user waits longer than the tenth.

``python -m benchmarks.startup`` starts the demo model as E+P+D a few times, asks it for one answer after the other, and
writes ``benchmarks/results/startup.json``.
"""

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from benchmarks.orchestration import Cell, body
from benchmarks.systems import ours
from tools.harness import record
from tools.harness.servers import Server

RESULT = Path(__file__).parent / "results" / "startup.json"
LINE = re.compile(r"start-up (\w+): ((?:\w+=[\d.]+s ?)+)")
ASKED = 10
CELL = Cell(images=1, tokens=4)


def phases(log: str) -> dict[str, dict[str, float]]:
    """Seconds by stage and phase, as the replicas logged them."""
    return {
        stage: {name: float(seconds) for name, seconds in re.findall(r"(\w+)=([\d.]+)s", told)}
        for stage, told in LINE.findall(log)
    }


def first_token_s(server: Server, number: int) -> float:
    began = time.perf_counter()
    with requests.post(
        server.url + "/v1/chat/completions", json=body(CELL, number), stream=True, timeout=120
    ) as answer:
        answer.raise_for_status()
        next(answer.iter_lines())
        return time.perf_counter() - began


def start(number: int) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="start-") as folder, ours(Path(folder), {}) as server:
        up_s = time.monotonic() - began
        asked = [first_token_s(server, 100 * number + each) for each in range(ASKED)]
        return {"up_s": up_s, "phases": phases(server.log.read_text(errors="replace")), "first_token_s": asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    starts = []
    for number in range(parser.parse_args().starts):
        starts.append(found := start(number))
        record.write({"command": "python -m benchmarks.startup", "starts": starts}, RESULT)
        first, tenth = found["first_token_s"][0], found["first_token_s"][-1]
        print(
            f"up after {found['up_s']:.0f} s; first token of the first {first:.3f} s, of the tenth {tenth:.3f} s",
            flush=True,
        )
        print("  " + "; ".join(f"{stage} {times}" for stage, times in found["phases"].items()), flush=True)
    ratios = [each["first_token_s"][0] / each["first_token_s"][-1] for each in starts]
    print(f"first to tenth: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
