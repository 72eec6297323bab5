"""One start of E+P+D by what `make serve` runs, with an empty page cache or a full one, by phase; then a second replica of
two stages. ``benchmarks.questions.start`` asks for it.
"""

import ctypes
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from benchmarks.orchestration import Cell, body
from benchmarks.systems import ours
from tools.harness.servers import REPOSITORY, Server, marked_environment

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LINE = re.compile(r"start-up (\w+): ((?:\w+=[\d.]+s ?)+)")
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
MARKS = {
    "ray": "Started a local Ray instance",
    "config": "Imported and built app",
    "engines": "start-up (?:encoder|prefill|decode):",
    "ingress": "start-up ingress:",
}
"""Words of the log that end a phase; of several lines with them the last."""

ASKED = 10
CELL = Cell(images=1, tokens=4)


def phases(log: str) -> dict[str, dict[str, float]]:
    """Seconds by stage and phase, as the replicas logged them."""
    return {
        stage: {name: float(seconds) for name, seconds in re.findall(r"(\w+)=([\d.]+)s", told)}
        for stage, told in LINE.findall(log)
    }


def until(log: str, began: float) -> dict[str, float]:
    """Seconds from ``began`` to the end of each phase of a start, by the stamps of its log."""
    found: dict[str, float] = {}
    for line in log.splitlines():
        if (stamp := STAMP.search(line)) is not None:
            for phase, words in MARKS.items():
                if re.search(words, line):
                    found[phase] = datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S,%f").timestamp() - began
    return {phase: found[phase] for phase in MARKS if phase in found}


def empty_page_cache() -> float:
    """Have the kernel forget the files of this Python. Returns the part of PyTorch's largest library that it still has: what
    a running process has mapped stays."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:  # not root
        for path in Path(sys.prefix).rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(
        max(Path(sys.prefix).glob("lib/python*/site-packages/torch/lib/*.so"), key=lambda p: p.stat().st_size)
    )


def cached(path: Path) -> float:
    """The part of a file that the page cache has."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        held = ctypes.c_ubyte.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(held))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), pages)
        del held
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(page & 1 for page in pages) / len(pages)


def first_token_s(server: Server, number: int) -> float:
    began = time.perf_counter()
    with requests.post(
        server.url + "/v1/chat/completions", json=body(CELL, number), stream=True, timeout=120
    ) as answer:
        answer.raise_for_status()
        next(answer.iter_lines())
        return time.perf_counter() - began


def second_replica_s(server: Server, config: Path, stage: str) -> float:
    """Seconds from `serve deploy` with two replicas of a stage until both answer."""
    serve = yaml.safe_load(config.read_text())
    (options,) = (each for each in serve["applications"][0]["deployments"] if each["name"] == stage.capitalize())
    options["num_replicas"] = 2
    config.write_text(yaml.safe_dump(serve))
    dashboard = re.findall(r"dashboard at \S*?(http://[\d.]+:\d+)", server.log.read_text(errors="replace"))[-1]
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(config)]

    def answers() -> bool:
        (told,) = (each for each in server.get("/status").json() if each["stage"] == stage)
        return told["replicas"].get("RUNNING") == 2 and len(told["loads"]) == 2

    began = time.monotonic()
    env = marked_environment(server.mark) | {"RAY_AUTH_MODE": "token"}  # `make serve` has made one
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    server.wait_until(answers, f"a second replica of {stage}", 120)
    return time.monotonic() - began


def start(number: int, cache: str) -> dict[str, Any]:
    left = empty_page_cache() if cache == "cold" else None
    cpu, read = psutil.cpu_times(), psutil.disk_io_counters()
    began, stamp = time.monotonic(), time.time()
    with tempfile.TemporaryDirectory(prefix="start-") as folder, ours(Path(folder), {}) as server:
        up_s = time.monotonic() - began
        cpu_s = sum(after - before for after, before in zip(psutil.cpu_times()[:3], cpu[:3], strict=True))
        read_mb = (psutil.disk_io_counters().read_bytes - read.read_bytes) / 1e6
        asked = [first_token_s(server, 100 * number + each) for each in range(ASKED)]
        log = server.log.read_text(errors="replace")
        config = Path(folder) / "serve_config.yaml"
        second = {stage: second_replica_s(server, config, stage) for stage in ("encoder", "decode")}
    return {
        "cache": cache,
        "cached": left,
        "up_s": up_s,
        "until_s": until(log, stamp),
        "phases": phases(log),
        "cpu_s": cpu_s,
        "read_mb": read_mb,
        "first_token_s": asked,
        "second_replica_s": second,
    }
