"""Faults under steady load. Every request ends within its deadline, with the right answer or an honest error; nothing is
answered wrongly; once the replica is back nothing fails; in the end nothing is held.

The short form runs with the other tests; `make chaos` (EPD_CHAOS_ROUNDS) repeats it and prints the table.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests.chaos.load import DEADLINE_S, Load, Outcome, answers
from tests.integration.servers import Server, engine_pids, serve_run

ROUNDS = int(os.environ.get("EPD_CHAOS_ROUNDS", "1"))
STAGES = ("Encoder", "Prefill", "Decode", "Ingress")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp("chaos"), {}, {name: {"num_replicas": 2} for name in STAGES}) as server:
        yield server


@pytest.fixture(scope="module")
def load(server: Server) -> Iterator[Load]:
    with Load(server, answers(server)) as load:
        yield load


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = ["", "| fault | requests | failed | wrong | retried | recovered after s |", "|---|---|---|---|---|---|"]
    yield rows
    print("\n".join(rows))


def kill(deployment: str) -> Callable[[Server], None]:
    def fault(server: Server) -> None:
        os.kill(engine_pids(server)[deployment][0], signal.SIGKILL)

    return fault


def stop_for_a_while(deployment: str, seconds: float) -> Callable[[Server], None]:
    def fault(server: Server) -> None:
        replica = psutil.Process(engine_pids(server)[deployment][0])
        replica.suspend()
        time.sleep(seconds)  # the length of the fault itself
        replica.resume()

    return fault


def cache_files(server: Server) -> list[Path]:
    return [path for path in (server.log.parent / "ec").rglob("*.safetensors") if path.is_file()]


def delete_cache(server: Server) -> None:
    for path in cache_files(server):
        path.unlink(missing_ok=True)


def truncate_cache(server: Server) -> None:
    for path in cache_files(server):
        os.truncate(path, path.stat().st_size // 2)


FAULTS: dict[str, Callable[[Server], None]] = {
    "kill -9 an encoder": kill("Encoder"),
    "kill -9 a prefill": kill("Prefill"),
    "kill -9 a decode": kill("Decode"),
    "kill -9 an ingress": kill("Ingress"),
    "stop an encoder for 10 s": stop_for_a_while("Encoder", 10),
    "stop a decode for 10 s": stop_for_a_while("Decode", 10),
    "delete cache files": delete_cache,
    "truncate cache files": truncate_cache,
}


def whole(server: Server) -> bool:
    """All replicas of all stages serve: every engine shows on the metrics page, and there are two ingresses."""
    try:
        page = server.get("/metrics").text
    except requests.RequestException:
        return False
    found = set(re.findall(r'^vllm:num_requests_running\{.*?replica="(\w+)",stage="(\w+)"', page, re.MULTILINE))
    engines = {stage: sum(of == stage for _, of in found) for stage in ("encoder", "prefill", "decode")}
    ingresses = len(engine_pids(server).get("Ingress", []))
    return set(engines.values()) == {2} and ingresses == 2 and server.healthy()


def failed(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.status != 200]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(FAULTS) * ROUNDS)
def test_fault(server: Server, load: Load, table: list[str], name: str) -> None:
    began = time.monotonic()
    FAULTS[name](server)
    server.wait_until(lambda: len(load.begun_since(began)) >= 20, "requests after the fault", 120)
    server.wait_until(lambda: whole(server), "all replicas to be back", 240)
    back = time.monotonic()
    server.wait_until(lambda: len(load.begun_since(back)) >= 20, "requests after the recovery", 120)

    during = load.under_way_since(began)
    errors = failed(during)
    recovered = max((outcome.began + outcome.seconds - began for outcome in errors), default=0.0)
    retried = sum(bool(outcome.rungs) for outcome in during)
    wrong = sum(outcome.wrong for outcome in during)
    table.append(f"| {name} | {len(during)} | {len(errors)} | {wrong} | {retried} | {recovered:.1f} |")
    assert not wrong, [outcome for outcome in during if outcome.wrong][:3]
    assert max(outcome.seconds for outcome in during) < DEADLINE_S
    honest = {503, 504, "error event", "ChunkedEncodingError", "ConnectionError"}
    if "ingress" in name:
        honest |= {500}  # Serve's proxy answers for an ingress replica that died under it
    assert {outcome.status for outcome in errors} <= honest, [o for o in errors if o.status not in honest][:3]
    assert not failed(load.begun_since(back)), failed(load.begun_since(back))[:3]


def test_nothing_is_held_in_the_end(server: Server, load: Load) -> None:
    load.__exit__()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    server.wait_until(lambda: all(server.metric(name) == 0 for name in names), "all KV blocks to be free", 60)
    assert not list((server.log.parent / "ec" / "tmp").glob("*")), "temporary files of dead writers"
