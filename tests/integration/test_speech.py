"""Speech that is written down through the stages, as one engine writes it, with a tiny Qwen3-ASR."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tools.harness.media import wav
from tools.harness.models import ensure_speech_model, serving
from tools.harness.servers import Server, serve_run, vllm_server

LONG_S = 70.0
"""Longer than a clip of the model (30 s): vLLM cuts it, and each piece is an item of a request of its own."""
MAX_S, MAX_BYTES = 100.0, 4 << 20
CASES: dict[str, dict[str, Any]] = {
    "json": {},
    "text": {"response_format": "text"},
    "a language": {"language": "en"},
    "a prompt": {"prompt": "Names: Ada."},
    "some tokens": {"max_completion_tokens": 5},
    "a seed": {"temperature": 0.8, "seed": 3},
}


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return serving(ensure_speech_model(tmp_path_factory.mktemp("models")))


def write_down(server: Server, route: str, sound: bytes, **fields: Any) -> requests.Response:
    """``route``: transcriptions or translations."""
    data = {"model": "demo", "temperature": 0.0, "max_completion_tokens": 24} | fields
    return requests.post(f"{server.url}/v1/audio/{route}", files={"file": ("sound.wav", sound)}, data=data, timeout=120)


def told(response: requests.Response) -> Any:
    """What does not differ from request to request."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("application/json"):
        return response.text
    return {key: value for key, value in response.json().items() if key not in ("id", "created")}


def streamed(response: requests.Response) -> str:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert response.status_code == 200 and lines[-1] == "[DONE]", response.text
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def all_of(server: Server) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for route in ("transcriptions", "translations"):
        for name, fields in CASES.items():
            answers[f"{route}, {name}"] = told(write_down(server, route, wav(1, seconds=2), **fields))
        answers[f"{route}, streamed"] = streamed(write_down(server, route, wav(2, seconds=3), stream="true"))
    answers["long"] = told(write_down(server, "transcriptions", wav(3, seconds=LONG_S)))
    return answers


@pytest.fixture(scope="module")
def expected(args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with vllm_server(tmp_path_factory.mktemp("one"), args) as server:
        return all_of(server)


@pytest.fixture(scope="module")
def server(args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"advanced": {"media": {"max_seconds": MAX_S, "max_bytes": MAX_BYTES}}}
    with serve_run(tmp_path_factory.mktemp("speech"), args | limits) as server:
        yield server


def test_speech_is_written_down_as_one_engine_does_and_encoders_hear_it(
    server: Server, expected: dict[str, Any]
) -> None:
    assert len({str(answer) for answer in expected.values()}) > len(expected) / 2, "answers depend on what is asked"
    assert all_of(server) == expected
    assert server.metric("vllm:prompt_tokens_total", stage="encoder") > 0


def test_what_is_no_sound_or_too_large_is_refused(server: Server) -> None:
    refused = write_down(server, "transcriptions", b"no sound")
    assert refused.status_code == 400 and refused.json()["error"]["message"]
    playlist = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/sound.ts\n"
    refused = write_down(server, "transcriptions", playlist)
    assert refused.status_code == 400 and "playlist" in refused.json()["error"]["message"]
    refused = write_down(server, "translations", wav(1, seconds=MAX_S + 1))
    assert refused.status_code == 400 and "duration" in refused.text
    refused = write_down(server, "transcriptions", bytes(MAX_BYTES + 1))
    assert refused.status_code == 400 and "size" in refused.text
    refused = write_down(server, "transcriptions", wav(1), response_format="verbose_json")
    assert refused.status_code == 400, "this model tells no times"
