"""One baseline for the whole session; one running application per module, or package, that asks for one. Slow parts are
awaited, never slept for; every application ends with Ctrl-C and must leave nothing behind."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.answers import events, gather, reduce
from tests.integration.cases import CASES, MANY, STREAMED, one_of_many
from tests.integration.servers import REPOSITORY, Server, vllm_server

MEDIA_RULES = {"allowed_local_path": str(REPOSITORY / "examples"), "limits": {"image": 6, "video": 2}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("engine")


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of one engine by case name; ``<name>/stream`` for streams and ``many/<i>`` for one of many."""
    answers: dict[str, Any] = {}
    with vllm_server(tmp_path_factory.mktemp("baseline"), {"media": MEDIA_RULES}) as server:
        for name, (path, body) in CASES.items():
            response = server.post(path, body)
            assert response.status_code == 200, f"{name}: {response.text}"
            answers[name] = reduce(response.json())
        for name in STREAMED:
            answers[f"{name}/stream"] = stream(server, name)
        for index in range(MANY):
            answers[f"many/{index}"] = reduce(server.post(*one_of_many(index)).json())
    return answers


def stream(server: Server, name: str) -> dict[str, Any]:
    path, body = CASES[name]
    response = server.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    return gather(events(response))


def all_at_once(server: Server) -> list[Any]:
    with ThreadPoolExecutor(MANY) as pool:
        responses = list(pool.map(lambda index: server.post(*one_of_many(index)), range(MANY)))
    assert [response.status_code for response in responses] == [200] * MANY
    return [reduce(response.json()) for response in responses]


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "E+P+D": {},
    "E+PD": {"prefill": None, "encode": {"from_media": False}},  # the other way to the encoder
    "P+D": {"encoder": None},
    "PD": {"encoder": None, "prefill": None},
}
