"""`http: proxy`: Ray Serve's proxy in front of two ingress replicas, with one engine behind them."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tools.harness.answers import arriving, gather
from tools.harness.cases import chat, text
from tools.harness.servers import Server, engine_pids, listeners, serve_run, wait_until_free

LENGTH = 1500
PATH, BODY = chat(text("Describe."), max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {"encoder": None, "prefill": None, "http": "proxy"}
    with serve_run(tmp_path_factory.mktemp("proxy"), args, {"Ingress": {"num_replicas": 2}}) as server:
        yield server


def test_the_proxy_listens_alone(server: Server) -> None:
    ((name, addresses),) = listeners(server).items()
    assert re.search("ProxyActor", name) and addresses == {"127.0.0.1"}
    routes, health = server.get("/-/routes"), server.get("/-/healthz")
    assert (routes.json(), health.status_code, health.text) == ({"/": "epd"}, 200, "success")


def test_streamed_answers_are_those_that_are_not(server: Server) -> None:
    body = BODY | {"max_tokens": 40}
    whole = server.post(PATH, body).json()["choices"][0]
    with requests.post(server.url + PATH, json=body | {"stream": True}, stream=True, timeout=60) as response:
        streamed = gather(list(arriving(response)))["choices"][0]
    assert streamed["token_ids"] == whole["token_ids"] and len(whole["token_ids"]) == 40


def test_client_that_leaves_frees_the_engine(server: Server) -> None:
    with requests.post(server.url + PATH, json=BODY | {"stream": True}, timeout=60, stream=True) as response:
        next(response.iter_lines())
    assert wait_until_free(server) < 1.5, "as long as it takes to look"


def test_requests_of_an_ingress_that_dies_before_it_answers_are_asked_again(server: Server) -> None:
    server.wait_until(lambda: len(engine_pids(server)["Ingress"]) == 2, "both ingress replicas", 120)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, PATH, BODY) for _ in range(8)]
        server.wait_until(lambda: server.metric("vllm:num_requests_running") == 8, "the engine to have them all", 30)
        dies = engine_pids(server)["Ingress"][0]
        psutil.Process(dies).kill()
        answers = [each.result().json()["choices"][0]["token_ids"] for each in asked]
    assert {len(tokens) for tokens in answers} == {LENGTH} and all(tokens == answers[0] for tokens in answers)
    assert dies not in engine_pids(server)["Ingress"]
