"""The baseline: what one plain vLLM engine answers. One for all tests that start engines."""

import os
from pathlib import Path
from typing import Any

import pytest

from tools.harness.answers import answered, events, gather
from tools.harness.cases import CASES, LIKE, MANY, STREAMED, one_of_many
from tools.harness.servers import REPOSITORY, Server, vllm_server

if not Path("/dev/nvidiactl").exists() and os.environ.get("EPD_FAKED_CARDS") != "1":
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # without a card vLLM's GPU build has no device at all

MEDIA_RULES = {"allowed_local_path": str(REPOSITORY / "examples"), "limits": {"image": 6, "video": 2}}


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of one engine by case name; ``<name>/stream`` for streams and ``many/<i>`` for one of many."""
    answers: dict[str, Any] = {}
    with vllm_server(tmp_path_factory.mktemp("baseline"), {"media": MEDIA_RULES}) as server:
        for name, (path, body) in (CASES | {name: like for name, (_, like) in LIKE.items()}).items():
            answers[name] = answered(server.post(path, body))
        for name in STREAMED:
            answers[f"{name}/stream"] = stream(server, name)
        for index in range(MANY):
            answers[f"many/{index}"] = answered(server.post(*one_of_many(index)))
    return answers


def stream(server: Server, name: str) -> dict[str, Any]:
    path, body = CASES[name]
    response = server.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    return gather(events(response))
