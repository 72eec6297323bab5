"""What is started ends, however it ends; what crashes is replaced."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests
from ray.serve._private.constants import DEFAULT_HEALTH_CHECK_PERIOD_S

from tools.harness.answers import events, gather
from tools.harness.cases import chat, image, text
from tools.harness.servers import (
    Server,
    engine_pids,
    serve_run,
)

ASK = chat(text("Describe."), image(1))
LOST_AFTER = 1500
"""Tokens of three answers before their decode is lost. Its engine counts them: a client may be far behind."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """E+PD with the reference's connector for embeddings."""
    folder = tmp_path_factory.mktemp("lifecycle")
    ec = {"connector": "ECExampleConnector", "storage_path": str(folder / "ec")}
    watched = {"Decode": {"health_check_period_s": 1}}
    with serve_run(folder, {"prefill": None, "ec": ec, "timeouts": {"hang_s": 15}}, watched) as server:
        yield server


def replica_tree(server: Server, deployment: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """The only replica of a deployment and all processes below it."""
    (pid,) = engine_pids(server)[deployment]
    replica = psutil.Process(pid)
    return replica, replica.children(recursive=True)


def engine_core(below: list[psutil.Process]) -> psutil.Process:
    """Of the processes below a replica. The others are multiprocessing's helpers."""
    return max(below, key=lambda process: process.memory_info().rss)


def words(choice: dict[str, Any]) -> list[str]:
    """The tokens of a choice, as its logprobs name them."""
    return [entry["token"] for entry in choice["logprobs"]["content"]]


def recovers(server: Server, deployment: str, old: int) -> bool:
    pids = engine_pids(server).get(deployment, [])
    return old not in pids and len(pids) == 1 and server.healthy() and server.post(*ASK).status_code == 200


@pytest.mark.parametrize("deployment", ["Encoder", "Decode"])
def test_killed_replica_takes_its_engine_along_and_is_replaced(server: Server, deployment: str) -> None:
    before = server.post(*ASK).json()["choices"]
    replica, below = replica_tree(server, deployment)
    assert below, "an engine core"
    os.kill(replica.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive, f"outlived their replica: {alive}"
    server.wait_until(lambda: recovers(server, deployment, replica.pid), "the replica to be replaced", 180)
    assert server.post(*ASK).json()["choices"] == before


@pytest.mark.parametrize("way", ["its replica is killed", "its engine crashes"])
def test_answers_under_way_go_on_where_their_decode_was_lost(server: Server, way: str) -> None:
    """With the tokens, text and logprobs that they would have had, once the only decode replica has been replaced: a stream,
    and answers that are not streamed, one of which looks for a stop string."""
    length = 3000
    path, body = chat(text("Describe."), image(1), max_tokens=length, ignore_eos=True)
    detailed = body | {"logprobs": True, "stop": ["\0"]}
    expected = server.post(path, detailed).json()["choices"][0]
    replica, below = replica_tree(server, "Decode")
    victim = replica if "replica" in way else engine_core(below)

    def generated() -> float:
        return server.metric("vllm:generation_tokens_total", stage="decode")

    def streamed() -> dict[str, Any]:
        with requests.post(server.url + path, json=body | {"stream": True}, stream=True, timeout=240) as response:
            return gather(events(response))["choices"][0]

    began = generated()
    with ThreadPoolExecutor(3) as pool:
        streaming = pool.submit(streamed)
        wholes = [pool.submit(requests.post, server.url + path, json=each, timeout=240) for each in (body, detailed)]
        server.wait_until(lambda: generated() - began >= LOST_AFTER, "tokens of the three", every_s=0.01)
        assert server.metric("vllm:num_requests_running", stage="decode") == 3
        victim.kill()
        victim.wait()
    stream = streaming.result()
    whole, whole_detailed = (each.result().json()["choices"][0] for each in wholes)
    made = generated()
    assert (stream["token_ids"], stream["text"]) == (expected["token_ids"], expected["message"]["content"])
    for each in (whole, whole_detailed):
        assert (each["token_ids"], each["message"]) == (expected["token_ids"], expected["message"])
    assert words(whole_detailed) == words(expected)
    assert stream["finish_reason"] == whole["finish_reason"] == whole_detailed["finish_reason"] == "length"
    assert all("decode-again" in each.result().headers["x-epd-rungs"] for each in wholes)
    assert made < 3 * length - LOST_AFTER / 2, "of the new replica: the rest of all answers"
    server.wait_until(lambda: recovers(server, "Decode", replica.pid), "the replica to be replaced", 180)


def test_crashed_engine_makes_its_replica_unhealthy_and_serve_replaces_it(server: Server) -> None:
    replica, below = replica_tree(server, "Decode")
    core = engine_core(below)
    core.kill()
    server.wait_until(lambda: not server.healthy(), "the health to show it", 60)
    states = server.get("/health").json()
    assert states["encoder"] == "healthy" and states["decode"] != "healthy"
    assert server.post(*ASK).status_code == 200, "it waits for the one that comes"
    server.wait_until(lambda: recovers(server, "Decode", replica.pid), "the replica to be replaced", 180)
    assert not [process for process in below if process.is_running()]


def test_replica_whose_engine_crashed_is_gone_with_the_next_health_check(server: Server) -> None:
    """Serve would let it live for three: 20 to 30 s."""
    replica, below = replica_tree(server, "Encoder")
    engine_core(below).kill()
    replica.wait(DEFAULT_HEALTH_CHECK_PERIOD_S * 1.1 + 5)
    assert server.post(*ASK).status_code == 200, "prefill encodes meanwhile"
    server.wait_until(lambda: recovers(server, "Encoder", replica.pid), "the replica to be replaced", 180)


def test_engine_that_hangs_is_killed_with_its_replica_and_replaced(server: Server) -> None:
    replica, below = replica_tree(server, "Decode")
    core = engine_core(below)
    core.suspend()
    assert server.post(*ASK).status_code == 200, "it waits for the one that comes"
    server.wait_until(lambda: recovers(server, "Decode", replica.pid), "the replica to be replaced", 180)
    assert not [process for process in below if process.is_running()]
