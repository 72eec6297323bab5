"""Faults under steady load. Every request ends within its deadline, with the right answer or an honest error; nothing is
answered wrongly; once the replica is back nothing fails; in the end nothing is held and nothing has grown.

The short form runs with the other tests; `make chaos` (EPD_CHAOS_ROUNDS) repeats it and prints the table.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.conftest import ROUNDS, Row
from tests.chaos.load import DEADLINE_S, KINDS, LOST, Load, asks, failed, leave, wrong
from tests.chaos.usage import grown, usage
from tools.harness.servers import DEPLOYMENTS, Server, engine_pids, serve_run, wait_for_replicas

EC_BYTES = 100_000
"""The pictures of the steady load take nearly all of it (4.7 kB each)."""

FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""oneDNN keeps a kernel for each shape of a batch, up to 1,024: 0.2 MiB with each new picture that prefill has to encode."""

ADVANCED = {
    # Else nobody would ask an encoder or read a file once each prompt was seen: an ingress remembers items, prefill has the
    # prompt's blocks, and its encoder cache holds all pictures of the load (now 14).
    "encode": {"remember_s": 3.0},
    # Less than `ec.max_bytes` may be.
    "ec": {"lease_s": 1.0, "max_age_s": 50.0, "extra_config": {"max_bytes": EC_BYTES}},
}
ARGS = {
    "advanced": ADVANCED,
    "prefill": {"engine_args": {"enable_prefix_caching": False, "max_num_batched_tokens": 128}, "env": FEW_KERNELS},
    "encoder": {"env": FEW_KERNELS},
    "decode": {"env": FEW_KERNELS},
    "media": {"limits": {"image": 4, "video": 0}, "processor_kwargs": {"max_pixels": 100 * 28 * 28}},
}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(baseline: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chaos")
    ec = {"storage_path": str(folder / "ec")}
    with serve_run(folder, ARGS | {"ec": ec}, {name: {"num_replicas": 2} for name in DEPLOYMENTS}) as server:
        yield server


@pytest.fixture(scope="module")
def before(server: Server, baseline: dict[str, Any]) -> dict[psutil.Process, Any]:
    """What each process uses after a hundred requests, before the faults. Of all replicas: the server is ready with one of
    each stage, and the one that lives through all may be the last to start."""
    wait_for_replicas(server, 2)
    with Load(server, asks(baseline, KINDS)[0]) as load:
        server.wait_until(lambda: len(load.outcomes) >= 100, "the first requests", 120)
    assert not failed(load.outcomes) and not wrong(load.outcomes)
    wait_idle(server)
    return usage(server)


@pytest.fixture(scope="module")
def load(server: Server, baseline: dict[str, Any], before: Any) -> Iterator[Load]:
    with Load(server, asks(baseline, KINDS)[0], pause_s=0.7) as load:
        yield load


Fault = Callable[[Server, Load, dict[str, Any]], float]
"""Does the harm, and returns when it set in."""


def replicas(server: Server, deployment: str) -> list[psutil.Process]:
    """Oldest first. Faults stop the oldest and kill the youngest, so that one of each stage lives through all."""
    return sorted(map(psutil.Process, engine_pids(server)[deployment]), key=psutil.Process.create_time)


def kill(deployment: str) -> Fault:
    """In the midst of a burst, so that the replica has work to lose."""

    def fault(server: Server, load: Load, _: Any) -> float:
        with Load(server, load.asks, threads=8, outcomes=load.outcomes):
            enough = len(load.outcomes) + 24
            server.wait_until(lambda: len(load.outcomes) >= enough, "the burst", 60)
            began = time.monotonic()
            os.kill(replicas(server, deployment)[-1].pid, signal.SIGKILL)
            server.wait_until(lambda: len(load.begun_since(began)) >= 24, "requests after the fault", 60)
        return began

    return fault


def stop(deployment: str) -> Fault:
    """Stop a replica with its engine."""

    def fault(server: Server, *_: Any) -> float:
        began = time.monotonic()
        replica = replicas(server, deployment)[0]
        processes = [replica, *replica.children(recursive=True)]
        for process in processes:
            process.suspend()
        time.sleep(20)  # the length of the fault itself
        for process in processes:
            process.resume()
        return began

    return fault


def cache_files(server: Server) -> list[Path]:
    return [path for path in (server.log.parent / "ec").rglob("*.safetensors") if path.is_file()]


def cache_bytes(server: Server) -> int:
    total = 0
    for path in cache_files(server):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def spoil_cache(spoil: Callable[[Path], None]) -> Fault:
    def fault(server: Server, *_: Any) -> float:
        def written() -> float:
            return server.metric("epd:ec_bytes_total", direction="written")

        began, before = time.monotonic(), written()
        for path in cache_files(server):
            with contextlib.suppress(FileNotFoundError):  # evicted since
                spoil(path)
        server.wait_until(lambda: written() > before, "the files to be missed and written anew", 60)
        return began

    return fault


def fill_cache(server: Server, load: Load, baseline: dict[str, Any]) -> float:
    """Ask for more pictures than the folder may hold, again and again. Their answers count like all others."""

    def evicted() -> float:
        return server.metric("epd:ec_items_total", stage="encoder", event="evicted")

    began, before = time.monotonic(), evicted()
    with Load(server, asks(baseline)[1], outcomes=load.outcomes):
        server.wait_until(lambda: evicted() >= before + 60, "evictions", 60)
    server.wait_until(lambda: cache_bytes(server) <= EC_BYTES, "the folder to be within its bounds", 10)
    return began


def leave_for_a_while(server: Server, load: Load, _: Any) -> float:
    began = time.monotonic()
    left = leave(server, 20)
    assert min(left.values()) >= 20, left
    server.wait_until(
        lambda: server.metric("vllm:num_requests_running", stage="decode") <= load.threads,
        "the others to be aborted",
        10,
    )
    return began


FAULTS: dict[str, Fault] = {
    "`kill -9` of an encoder": kill("Encoder"),
    "`kill -9` of a prefill": kill("Prefill"),
    "`kill -9` of a decode": kill("Decode"),
    "`kill -9` of an ingress": kill("Ingress"),
    "an encoder stopped for 20 s": stop("Encoder"),
    "a prefill stopped for 20 s": stop("Prefill"),
    "a decode stopped for 20 s": stop("Decode"),
    "all cache files deleted": spoil_cache(Path.unlink),
    "all cache files truncated": spoil_cache(lambda path: os.truncate(path, path.stat().st_size // 2)),
    "the cache's budget overrun": fill_cache,
    "clients leave, 8 at a time": leave_for_a_while,
}


def wait_idle(server: Server) -> None:
    """Soon: nobody waits for the 30 s after which prefill frees blocks that were not pulled."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    server.wait_until(lambda: all(server.metric(name) == 0 for name in names), "all KV blocks to be free", 15)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(FAULTS) * ROUNDS)
def test_fault(server: Server, load: Load, baseline: dict[str, Any], row: Row, name: str) -> None:
    began = FAULTS[name](server, load, baseline)
    server.wait_until(lambda: len(load.begun_since(began)) >= 20, "requests after the fault", 120)
    wait_for_replicas(server, 2)
    back = time.monotonic()
    server.wait_until(lambda: len(load.begun_since(back)) >= 20, "requests after the recovery", 120)

    during = load.under_way_since(began)
    row(name, during, began, back)
    errors = failed(during)
    assert not wrong(during), wrong(during)[:3]
    assert max(outcome.seconds for outcome in during) < DEADLINE_S
    honest = {503, 504, "error event"}
    if "ingress" in name:
        honest |= {LOST}
        assert not [o for o in errors if o.status == LOST and o.again != 200], "asked again, of the other ingress"
    assert {outcome.status for outcome in errors} <= honest, [o for o in errors if o.status not in honest][:3]
    assert not failed(load.begun_since(back)), failed(load.begun_since(back))[:3]


def test_nothing_is_held_or_grown_in_the_end(server: Server, load: Load, before: dict[psutil.Process, Any]) -> None:
    load.__exit__()
    wait_idle(server)
    server.wait_until(lambda: cache_bytes(server) <= EC_BYTES, "the folder to be within its bounds", 10)
    assert not list((server.log.parent / "ec" / "tmp").glob("*")), "temporary files of dead writers"
    lived = [process for process in before if process.is_running()]
    assert len(lived) >= 2 * len(DEPLOYMENTS) - 1, "one replica of each stage, and its engine"
    server.wait_until(lambda: not grown(before, usage(server)), f"use as before: {grown(before, usage(server))}", 60)
