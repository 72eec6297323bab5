"""HTTP at the ingress replicas: who listens and where, how many there are, and what becomes of requests whose replica or
client goes. One engine behind them."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests

from tools.harness.answers import arriving, gather
from tools.harness.cases import chat, text
from tools.harness.servers import Server, engine_pids, listeners, serve_run, wait_until_free

LENGTH = 1500
PATH, BODY = chat(text("Describe."), max_tokens=LENGTH, ignore_eos=True, stream=True)

SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 4,
    "upscale_delay_s": 1,
    "downscale_delay_s": 1,
    "metrics_interval_s": 1,
    "look_back_period_s": 2,
    "policy": {"policy_function": "serve_app.autoscaling:IngressPolicy"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {"Ingress": {"autoscaling_config": SCALING}}
    with serve_run(tmp_path_factory.mktemp("ingress"), {"encoder": None, "prefill": None}, options) as server:
        yield server


def ingresses(server: Server) -> int:
    return len(engine_pids(server).get("Ingress", []))


class Streams:
    """Threads that ask for one stream after the other, each on a connection of its own."""

    def __init__(self, server: Server, threads: int) -> None:
        self.lengths: list[int | str] = []
        self._server = server
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        while not self._ended.is_set():
            try:
                with requests.post(self._server.url + PATH, json=BODY, stream=True, timeout=120) as response:
                    told = gather(list(arriving(response)))
                self.lengths.append(len(told["choices"][0]["token_ids"]))
            except requests.RequestException as error:
                self.lengths.append(repr(error))

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def test_ingress_listens_on_its_host_alone_and_serve_starts_no_proxy(server: Server) -> None:
    ((name, addresses),) = listeners(server).items()
    assert re.search("ServeReplica:epd:Ingress", name) and addresses == {"127.0.0.1"}
    assert not [p for p in server.processes() if "ProxyActor" in " ".join(p.cmdline())]
    routes, health = server.get("/-/routes"), server.get("/-/healthz")
    assert (routes.json(), health.status_code, health.text) == ({"/": "epd"}, 200, "success")


def test_request_id_comes_back_once(server: Server) -> None:
    answer = server.post(*chat(text("Hello")), headers={"x-request-id": "mine"})
    assert answer.raw.headers.getlist("x-request-id") == ["mine"]


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_engine_at_once(server: Server, stream: bool) -> None:
    body = BODY | {"stream": stream, "max_tokens": 3000}
    if stream:
        with requests.post(server.url + PATH, json=body, timeout=60, stream=True) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(requests.ReadTimeout):
            requests.post(server.url + PATH, json=body, timeout=0.5)
    assert wait_until_free(server) < 1.5, "as long as it takes to look"


def test_ingress_grows_by_its_own_requests_and_a_replica_that_goes_ends_its_streams(server: Server) -> None:
    with Streams(server, 10) as many:
        server.wait_until(lambda: ingresses(server) == 2, "a second ingress", 90)
        server.wait_until(lambda: len(listeners(server)) == 1, "one kind of listener", 5)
    with Streams(server, 2) as few:
        server.wait_until(lambda: ingresses(server) == 1, "the second ingress to go", 120)
    assert set(many.lengths + few.lengths) == {LENGTH}
    assert psutil.pid_exists(server.process.pid) and server.healthy()


def test_replica_that_dies_takes_its_own_requests_along_and_the_port_is_served_again(server: Server) -> None:
    (pid,) = engine_pids(server)["Ingress"]
    psutil.Process(pid).kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/-/healthz", timeout=5)
    server.wait_until(server.healthy, "another ingress to listen", 120)
    assert server.post(*chat(text("Hello"))).status_code == 200
