"""Every bad input is refused with the route's own error, streaming or not, and the engines go on as if nothing had been."""

import json
from typing import Any

import pytest

from tests.integration.api.bad_cases import BAD, HARMLESS, STREAMS
from tools.harness.answers import events
from tools.harness.cases import chat, image, text
from tools.harness.servers import REPOSITORY, Server, engine_pids

GOOD = chat(text("Describe."), image(1))
ASKED = [
    pytest.param(name, streaming, id=f"{name}, streaming" if streaming else name)
    for name, bad in BAD.items()
    for streaming in (False, True)
    if not streaming or (bad.path in STREAMS and isinstance(bad.body, dict))
]


def tokens(server: Server) -> list[int]:
    answer = server.post(*GOOD)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


@pytest.fixture(scope="module", autouse=True)
def before(epd: Server) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of a good request and the processes behind it, before any bad input."""
    return tokens(epd), engine_pids(epd)


def error_of(path: str, body: Any) -> dict[str, Any]:
    """The error in a body of the shape that the route's API has."""
    error: dict[str, Any] = body["error"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and set(error) == {"type", "message"}
    else:
        assert {"message", "type", "code"} <= set(error)
    return error


@pytest.mark.parametrize(("name", "streaming"), ASKED)
def test_bad_input_is_refused(epd: Server, name: str, streaming: bool) -> None:
    path, body, mentions, status, headers = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body | {"stream": True} if streaming else body)
    response = epd.session.post(
        epd.url + path, data=content, headers={"content-type": "application/json"} | headers, timeout=20
    )
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = error_of(path, response.json())
    assert error.get("code", status) == status
    assert mentions in error["message"]
    assert str(REPOSITORY) not in error["message"] or str(REPOSITORY) in str(body), "a path of the server's"


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("name", HARMLESS)
def test_odd_input_that_engines_can_take_is_served(epd: Server, name: str, streaming: bool) -> None:
    path, body = HARMLESS[name]
    response = epd.post(path, body | {"stream": streaming}, timeout=20)
    assert response.status_code == 200, response.text
    assert all("error" not in event for event in (events(response) if streaming else [response.json()]))


def test_engines_go_on_after_all_of_it(epd: Server, before: tuple[list[int], dict[str, list[int]]]) -> None:
    assert (tokens(epd), engine_pids(epd)) == before, "other tokens, or a replica was replaced"
    assert epd.healthy()
