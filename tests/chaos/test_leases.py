"""Queues and freezes longer than the lease of KV blocks, with a prefill cache so small that free blocks are soon another's.

One replica of each stage: what fails is not made good by another.
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests

from tests.chaos.conftest import ROUNDS, Row
from tests.chaos.load import Ask, Outcome, ask, failed, of_choices, wrong
from tools.harness.answers import reduce
from tools.harness.cases import Case, completion
from tools.harness.servers import Server, engine_pids, serve_run, vllm_server

LEASE_S = 6
FROZEN_S = 10.0
AT_ONCE = 32
ARGS: dict[str, Any] = {
    "encoder": None,
    "prefill": {"engine_args": {"kv_cache_memory_bytes": 16 << 20}},  # 11 of the prompts
    "advanced": {"kv": {"lease_s": LEASE_S}, "decode": {"max_ongoing_requests": 4}},
}

pytestmark = pytest.mark.engine


def prompt(seed: int) -> Case:
    """One of many that have no block in common."""
    order = random.Random(seed)
    return completion([order.randrange(300, 1000) for _ in range(700)], max_tokens=300, ignore_eos=True)


def queue(server: Server, begun: Callable[[], bool]) -> None:
    """It takes more than a lease: decode has four places."""


def freeze(*deployments: str) -> Callable[[Server, Callable[[], bool]], None]:
    """Stop engines, and not their replicas, once some answers have come and many prompts wait."""

    def fault(server: Server, begun: Callable[[], bool]) -> None:
        server.wait_until(begun, "the first answers", 60)
        replicas = [pid for deployment in deployments for pid in engine_pids(server)[deployment]]
        engines = [child for pid in replicas for child in psutil.Process(pid).children() if "VLLM" in child.name()]
        assert len(engines) == len(deployments)
        for engine in engines:
            engine.suspend()
        time.sleep(FROZEN_S)  # the length of the fault itself
        for engine in engines:
            engine.resume()

    return fault


FAULTS: dict[str, Callable[[Server, Callable[[], bool]], None]] = {
    "a queue for decode longer than the lease": queue,
    "a decode engine frozen for longer than the lease": freeze("Decode"),
    "a prefill engine frozen for longer than the lease": freeze("Prefill"),
    "both frozen for longer than the lease": freeze("Prefill", "Decode"),
}
RUNS = list(enumerate(list(FAULTS) * ROUNDS))


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> list[Ask]:
    """All different: what was asked before is in decode's own cache, and nothing is pulled for it."""
    cases = [prompt(seed) for seed in range(AT_ONCE * len(RUNS))]
    with (
        vllm_server(tmp_path_factory.mktemp("baseline"), {"encoder": None}) as server,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        answers = list(pool.map(lambda case: reduce(server.post(*case, timeout=300).json()), cases))
    return [Ask(case, answer, of_choices(answer["choices"])) for case, answer in zip(cases, answers, strict=True)]


@pytest.fixture(scope="module")
def server(asks: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp("leases"), ARGS) as server:
        yield server


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("run", "name"), RUNS)
def test_no_answer_is_of_blocks_that_were_not_held(
    server: Server, asks: list[Ask], row: Row, run: int, name: str
) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        mine = asks[run * AT_ONCE : (run + 1) * AT_ONCE]
        answers: list[Future[Outcome]] = [
            pool.submit(ask, requests.Session(), server, each, streaming=index % 2 == 0)
            for index, each in enumerate(mine)
        ]
        FAULTS[name](server, lambda: sum(answer.done() for answer in answers) >= 4)
        outcomes = [answer.result() for answer in answers]
    row(name, outcomes, began, time.monotonic())
    assert time.monotonic() - began > LEASE_S, "no queue"
    assert not wrong(outcomes) and not failed(outcomes), (wrong(outcomes) + failed(outcomes))[:3]
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    server.wait_until(lambda: all(server.metric(name) == 0 for name in names), "all KV blocks to be free", 2 * LEASE_S)
