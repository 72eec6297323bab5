"""What is started ends, however it ends; what crashes is replaced."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from ray.serve._private.constants import DEFAULT_HEALTH_CHECK_PERIOD_S

from serve_app.launch.connectors import free_ports
from tools.harness.answers import arriving, gather
from tools.harness.cases import chat, image, text
from tools.harness.servers import (
    REPOSITORY,
    Server,
    engine_pids,
    kill_all,
    marked_environment,
    marked_processes,
    serve_deploy,
    serve_run,
    wait_gone,
)

BIN = Path(sys.executable).parent
ASK = chat(text("Describe."), image(1))
LOST_AFTER = 600
"""Tokens of a stream before its decode is lost."""


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
    heard: list[dict[str, Any]] = []
    lost_after = 0
    with (
        ThreadPoolExecutor(2) as pool,
        server.session.post(server.url + path, json=body | {"stream": True}, stream=True, timeout=240) as response,
    ):
        unstreamed = [
            pool.submit(requests.post, server.url + path, json=each, timeout=240) for each in (body, detailed)
        ]
        for event in arriving(response):
            heard.append(event)
            if not lost_after and (tokens := len(gather(heard)["choices"][0]["token_ids"])) >= LOST_AFTER:
                lost_after = tokens
                assert not any(each.done() for each in unstreamed)
                victim.kill()
                victim.wait()
    stream = gather(heard)["choices"][0]
    whole, whole_detailed = (each.result().json()["choices"][0] for each in unstreamed)
    made = server.metric("vllm:generation_tokens_total", stage="decode")
    assert lost_after < length * 2 / 3
    assert (stream["token_ids"], stream["text"]) == (expected["token_ids"], expected["message"]["content"])
    for each in (whole, whole_detailed):
        assert (each["token_ids"], each["message"]) == (expected["token_ids"], expected["message"])
    assert words(whole_detailed) == words(expected)
    assert stream["finish_reason"] == whole["finish_reason"] == whole_detailed["finish_reason"] == "length"
    assert all("decode-again" in each.result().headers["x-epd-rungs"] for each in unstreamed)
    assert made < (length - lost_after) + 2 * length * 0.9, "of the new replica: the rest of all answers"
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


# ---- a cluster that is there already


class Cluster:
    """A Ray cluster by `ray start`, with GPUs that are declared only: resources, no devices."""

    def __init__(self, folder: Path) -> None:
        self.mark = str(folder)
        self.http_port, gcs, dashboard = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = marked_environment(self.mark) | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
        self.environment["RAY_AUTH_MODE"] = "disabled"  # else it depends on whether this user has a token
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=8", "--num-gpus=4"]
        self.run(BIN / "ray", "start", *head)

    def run(self, *command: Any) -> str:
        result = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def deploy(self, folder: Path, args: dict[str, Any]) -> Server:
        return serve_deploy(folder, self.dashboard, self.environment, self.http_port, args)

    def resources(self) -> dict[str, float]:
        """Claimed resources by name."""
        code = (
            "import json, ray; ray.init(logging_level='ERROR'); a = ray.available_resources();"
            "print('##' + json.dumps({k: v - a.get(k, 0) for k, v in ray.cluster_resources().items()}))"
        )
        claimed: dict[str, float] = json.loads(self.run(sys.executable, "-c", code).rpartition("##")[2])
        return claimed

    def names(self) -> list[str]:
        """Of the processes of this cluster."""
        return [(" ".join(process.cmdline()) or process.name()).strip()[:80] for process in marked_processes(self.mark)]

    def engines(self) -> list[str]:
        """Names of the engine processes of this cluster; now and then one keeps that of the program it is spawned as."""
        return [name for name in self.names() if name.startswith("VLLM") or "multiprocessing.spawn" in name]

    def status(self) -> str:
        """Of applications, deployments and replicas."""
        return self.run(BIN / "serve", "status", "-a", self.dashboard)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    try:
        yield Cluster(folder)
    finally:
        kill_all(str(folder))


def test_deploy_claims_what_it_uses_and_shutdown_and_ray_stop_leave_nothing(tmp_path: Path) -> None:
    args = {
        "accelerator": "cpu",
        "encoder": {"gpus_per_replica": 0.25, "cpus_per_replica": 0.5},
        "prefill": None,
        "decode": {"gpus_per_replica": 2, "cpus_per_replica": 2},
        "ingress_cpus": 1,
        "ec": {"storage_path": str(tmp_path / "ec")},
    }
    with cluster(tmp_path) as ray:
        server = ray.deploy(tmp_path, args)
        answer = server.post(*ASK)
        assert answer.status_code == 200 and "x-epd-rungs" not in answer.headers, f"{answer.headers} {ray.status()}"
        claimed = ray.resources()
        assert claimed["GPU"] == pytest.approx(2.25)
        assert claimed["CPU"] == pytest.approx(3.5, abs=0.1)
        assert len(ray.engines()) == 2, f"{ray.names()} {ray.status()}"

        ray.run(BIN / "serve", "shutdown", "-y", "-a", ray.dashboard)
        server.wait_until(lambda: not ray.engines(), "all engines to end after `serve shutdown`", 60)

        server = ray.deploy(tmp_path, single(args))
        assert server.post(*ASK).status_code == 200
        assert len(ray.engines()) == 1
        ray.run(BIN / "ray", "stop")
        assert wait_gone(ray.mark) == []


def single(args: dict[str, Any]) -> dict[str, Any]:
    """The same as one engine."""
    return {key: value for key, value in args.items() if key != "ec"} | {"encoder": None}
