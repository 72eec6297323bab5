"""A load generator as a process of its own: the module reads its job from stdin and writes what it found to a file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(module: str, job: dict[str, Any], log: Path, limit_s: float, env: dict[str, str]) -> list[dict[str, Any]]:
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
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found
