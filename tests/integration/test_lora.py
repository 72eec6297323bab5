"""LoRA adapters on the stages: the tokens of one engine, whoever asks for which adapter, and after failures."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tools.harness.adapters import RANK, write_adapter
from tools.harness.answers import answered, differences, reduce
from tools.harness.cases import Case, chat, image, text
from tools.harness.servers import API, Server, cpu_config, engine_pids, engine_server, serve_run

ENGINE = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": RANK}
AT_START, LATER = "first", "second"
NAMES = (None, AT_START, LATER)
"""What a request names: the model itself, or one of its adapters."""
RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
TOPOLOGIES: dict[str, dict[str, Any]] = {"E+P+D": {}, "E+PD": {"prefill": None}, "P+D": {"encoder": None}}


def cases(name: str | None) -> list[Case]:
    model = {} if name is None else {"model": name}
    asked = [[text("Describe.")], [text("What is it?"), image(1)], [image(2), image(3), text("Compare.")]]
    return [chat(*content, max_tokens=24, ignore_eos=True, **model) for content in asked]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed) for seed, name in enumerate((AT_START, LATER))}


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, list[Any]]:
    """One engine's answers by adapter."""
    config = cpu_config({"engine_args": ENGINE, "encoder": None, "prefill": None})
    modules = [f"{name}={path}" for name, path in adapters.items()]
    with engine_server(tmp_path_factory.mktemp("one"), config, {"lora_modules": modules}) as server:
        answers = {name: [answered(server.post(*case)) for case in cases(name)] for name in NAMES}
    assert answers[None] != answers[AT_START] != answers[LATER], "the adapters change answers"
    return answers


@pytest.fixture(scope="module", params=TOPOLOGIES)
def server(
    request: pytest.FixtureRequest, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    at_start = [{"name": AT_START, "path": str(adapters[AT_START])}]
    args = TOPOLOGIES[request.param] | {"engine_args": ENGINE, "api": API | {"lora_modules": at_start}}
    two = {"Ingress": {"num_replicas": 2}}
    with serve_run(tmp_path_factory.mktemp("lora"), args, two, RUNTIME) as server:
        server.wait_until(lambda: running(server, "ingress") == 2, "two ingress replicas")
        yield server


def running(server: Server, stage: str) -> int:
    (told,) = (each for each in server.get("/status").json() if each["stage"] == stage)
    return int(told["replicas"].get("RUNNING", 0))


def load(server: Server, name: str, path: Path) -> requests.Response:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def listed(server: Server) -> set[str]:
    return {model["id"] for model in server.get("/v1/models").json()["data"]}


def ask(server: Server, case: Case) -> Any:
    """On a connection of its own: each may reach another ingress replica."""
    path, body = case
    response = requests.post(server.url + path, json=body, timeout=120)
    return reduce(response.json()) if response.status_code == 200 else response.status_code


def answers_as_expected(server: Server, expected: dict[str | None, list[Any]], *names: str | None) -> None:
    """All at once, so that engines have the model and its adapters in one batch."""
    asked = [(name, index, case) for name in names for index, case in enumerate(cases(name))] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        told = list(pool.map(lambda each: ask(server, each[2]), asked))
    for (name, index, _), answer in zip(asked, told, strict=True):
        assert differences(answer, expected[name][index]) == [], f"{name}, case {index}"


def test_adapters_answer_as_one_engine_beside_each_other_and_the_model(
    server: Server, adapters: dict[str, Path], expected: dict[str | None, list[Any]]
) -> None:
    answers_as_expected(server, expected, None, AT_START)
    assert ask(server, cases(LATER)[0]) == 404

    assert load(server, LATER, adapters[LATER]).status_code == 200
    for _ in range(8):
        assert listed(server) >= {AT_START, LATER}, "at each ingress replica"
    answers_as_expected(server, expected, *NAMES)

    assert server.post("/v1/unload_lora_adapter", {"lora_name": LATER}).status_code == 200
    for _ in range(8):
        assert ask(server, cases(LATER)[0]) == 404, "at each ingress replica"
    answers_as_expected(server, expected, None, AT_START)


def test_adapter_that_cannot_be_loaded_is_refused_and_nobody_has_it(
    server: Server, adapters: dict[str, Path], expected: dict[str | None, list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        refused = load(server, "broken", path)
        assert refused.status_code >= 400 and "broken" in refused.json()["error"]["message"]
    assert "broken" not in listed(server)
    assert ask(server, chat(text("x"), model="broken")) == 404
    answers_as_expected(server, expected, AT_START)


def test_adapters_outlive_the_engines(server: Server, expected: dict[str | None, list[Any]]) -> None:
    """The replica that comes has never heard of it."""
    (replica,) = (psutil.Process(pid) for pid in engine_pids(server)["Decode"])
    for core in replica.children(recursive=True):
        core.kill()
    answers_as_expected(server, expected, None, AT_START)
    assert replica.pid not in engine_pids(server)["Decode"]
