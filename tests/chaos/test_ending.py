"""`make serve` from its start beside Ray's note of a cluster that is gone, over a replica that cannot start again, to its
end by SIGTERM, as docker, systemd and kubelet send it. One server, in this order."""

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import requests

from serve_app.config import EPDConfig
from serve_app.launch.connectors import free_ports
from serve_app.launch.engine_args import DEMO_DEFAULTS, model_path
from tests.chaos.conftest import Row
from tests.chaos.load import Ask, Outcome
from tools.harness.answers import arriving, gather
from tools.harness.cases import chat, text
from tools.harness.servers import Server, engine_pids, serve_run, shared_memory

pytestmark = pytest.mark.engine

LONG = chat(text("Describe."), max_tokens=1500, ignore_eos=True)
TRACES = ("SIGTERM received", "SIGABRT", "Fatal Python error", "Traceback")


@pytest.fixture(scope="module")
def gone() -> Iterator[tuple[Path, int]]:
    """Ray's temporary folder with its note of a cluster, and the port on which that no longer listens."""
    folder = Path(tempfile.mkdtemp(prefix="epd-"))  # a short path: sockets allow 107 bytes
    (port,) = free_ports(1)
    (folder / "ray").mkdir()
    (folder / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}")
    yield folder, port
    shutil.rmtree(folder)


def streamed(server: Server, begun: Event) -> dict[str, Any]:
    path, body = LONG
    heard = []
    with server.session.post(server.url + path, json=body | {"stream": True}, stream=True, timeout=120) as response:
        for event in arriving(response):
            heard.append(event)
            begun.set()
    answer: dict[str, Any] = gather(heard)["choices"][0]
    return {key: answer[key] for key in ("token_ids", "text", "finish_reason")}


def whole(server: Server) -> dict[str, Any]:
    (choice,) = server.post(*LONG).json()["choices"]
    return {
        "token_ids": choice["token_ids"],
        "text": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
    }


def takes_requests(server: Server) -> bool:
    try:
        return requests.post(server.url + LONG[0], json=LONG[1] | {"max_tokens": 1}, timeout=30).status_code != 503
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test's own."""
    return Path(
        shutil.copytree(model_path(EPDConfig(model="demo-random")), tmp_path_factory.mktemp("ending") / "model")
    )


@pytest.fixture(scope="module")
def server(model: Path, gone: tuple[Path, int]) -> Iterator[Server]:
    """One engine, twice."""
    args = {"encoder": None, "prefill": None, "model": str(model), "engine_args": DEMO_DEFAULTS}
    decode = {"Decode": {"num_replicas": 2, "health_check_period_s": 1}}
    with serve_run(model.parent, args, decode, env={"RAY_ADDRESS": "", "RAY_TMPDIR": str(gone[0])}) as server:
        yield server


def test_note_of_a_gone_cluster_is_passed_by(server: Server, gone: tuple[Path, int]) -> None:
    why = rf"no Ray cluster answers at \S+:{gone[1]}\. A new one is started here"
    assert re.search(why, server.log.read_text(errors="replace"))


def engines(server: Server) -> set[str]:
    """Replicas whose engines answer."""
    page = server.get("/metrics").text
    return set(re.findall(r'^vllm:num_requests_running\{.*?replica="(\w+)"', page, re.MULTILINE))


def test_replica_that_cannot_start_beside_one_that_runs_is_tried_again(server: Server, model: Path) -> None:
    away = model.with_name("away")
    server.wait_until(lambda: len(engines(server)) == 2, "both engines", 60)
    model.rename(away)
    before = engines(server)
    psutil.Process(engine_pids(server)["Decode"][0]).kill()
    why = f"decode cannot start: `model: {model}` is neither a folder with a model"
    server.wait_until(lambda: f"CannotStart: {why}" in server.log.read_text(errors="replace"), why, 60)
    assert server.post(*chat(text("Hello"))).status_code == 200
    away.rename(model)
    server.wait_until(lambda: len(engines(server) - before) == 1, "the replica to be replaced", 60)
    assert len(engines(server) & before) == 1
    assert server.post(*chat(text("Hello"))).status_code == 200


def test_sigterm_lets_requests_end(server: Server, row: Row) -> None:
    expected = whole(server)
    assert len(expected["token_ids"]) == 1500
    shared = shared_memory(server.mark)
    began, begun = time.monotonic(), [Event(), Event()]
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(streamed, server, event) for event in begun]
        assert all(event.wait(60) for event in begun)
        unary = pool.submit(whole, server)
        server.wait_until(lambda: under_way(server) == 3, "three requests", 10)
        told = len(server.log.read_text(errors="replace"))
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: not takes_requests(server), "no new requests to be taken", 10)
        assert not any(stream.done() for stream in streams), "too short to show anything"
        answers = [stream.result() for stream in (*streams, unary)]
    took = time.monotonic() - began
    cut = ["" if answer == expected else f"{answer} instead of {expected}" for answer in answers]
    outcomes = [Outcome(began, took, 200, "", each, Ask(LONG, expected), None) for each in cut]
    row("SIGTERM, after a start beside the note of a gone cluster", outcomes, began, time.monotonic())
    assert not any(cut), cut
    assert server.process.wait(60) == 0
    end = server.log.read_text(errors="replace")[told:]
    assert not [line for line in end.splitlines() if any(trace in line for trace in TRACES)]
    assert not shared & set(os.listdir("/dev/shm"))


def under_way(server: Server) -> int:
    (ingress,) = [stage for stage in server.get("/status").json() if stage["stage"] == "ingress"]
    return int(ingress["loads"][0]["calls"])
