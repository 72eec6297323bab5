"""A load generator as a process of its own: ``run`` starts its module, which answers with what it found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Found = list[dict[str, Any]]


def run(module: str, job: dict[str, Any], log: Path, limit_s: float, env: dict[str, str]) -> Found:
    """What it found, for each thing that it was to do. Raises ``RuntimeError`` with the end of its log, which is kept."""
    result = log.with_suffix(".json")
    with log.open("ab") as out:
        process = subprocess.run(
            [sys.executable, "-m", module, str(result)],
            input=json.dumps(job).encode(),
            stdout=out,
            stderr=out,
            cwd=Path(__file__).parents[1],
            env=dict(os.environ) | env,
            timeout=limit_s,
        )
    if process.returncode:
        raise RuntimeError(f"the load generator failed\n{log.read_text(errors='replace')[-2000:]}")
    found: Found = json.loads(result.read_text())
    return found


def answer(work: Callable[[dict[str, Any]], Found]) -> None:
    """In the process: the job comes by stdin, what ``work`` finds goes to the file that is named."""
    Path(sys.argv[1]).write_text(json.dumps(work(json.load(sys.stdin))))
