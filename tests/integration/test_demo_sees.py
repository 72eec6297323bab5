"""The demo model sees: through the served system, streamed, it is right as often as by itself, and says the same.

Its application stands below a route prefix, asks for a key, and has two names: what clients meet there is tested here too.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import requests

from serve_app.demo import ensure_demo_model
from tools.demo.examples import Kind
from tools.demo.measure import Plain, Question, held_out
from tools.harness.answers import events, gather
from tools.harness.cases import CHAT, text
from tools.harness.media import data_url, png
from tools.harness.servers import API, Server, serve_run

KEY = "the-key-of-this-test"
ASKED: dict[Kind, tuple[int, float]] = {"one": (100, 0.98), "two": (60, 0.95), "count": (50, 0.9)}
"""Questions of each kind, and the share that has to be right; CARD.md has the shares of many more."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {"model": "demo", "served_model_name": ["demo", "second"], "api": API | {"api_key": KEY}}
    with serve_run(tmp_path_factory.mktemp("sees"), args, application={"route_prefix": "/epd"}) as server:
        server.session.headers["x-api-key"] = KEY
        yield server


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain(ensure_demo_model())


def drawn(picture: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url("image/png", png(picture))}}


def streamed(server: Server, question: Question) -> str:
    pictures, asked, _ = question
    content = [*map(drawn, pictures), text(asked)]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
    response = server.post(CHAT, body | {"stream": True})
    assert response.status_code == 200, response.text
    (choice,) = gather(events(response))["choices"].values()
    assert choice["finish_reason"] == "stop"
    return str(choice["text"])


@pytest.mark.parametrize("kind", ASKED)
def test_served_answers_are_right_and_those_of_plain_transformers(server: Server, plain: Plain, kind: Kind) -> None:
    count, share = ASKED[kind]
    questions = held_out(kind, count)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: streamed(server, question), questions))
    assert answers == plain.answers(questions)
    right = sum(answer == expected for answer, (_, _, expected) in zip(answers, questions, strict=True))
    assert right >= share * count, f"{right} of {count}"
    assert server.metric("epd:ec_items_total", stage="prefill", event="loaded") >= count
    assert server.metric("epd:ec_items_total", stage="prefill", event="encoded") == 0


# ---- below the prefix


def test_start_and_command_line_know_the_prefix_and_the_key(server: Server, tmp_path: Path) -> None:
    server.wait_until(lambda: "EPD is ready" in server.log.read_text(), "the words when it is ready", 10)
    assert f"{server.url}/v1   (model: demo;" in server.log.read_text()

    def run(*command: str) -> str:
        environment = dict(os.environ) | {"OPENAI_API_KEY": KEY}
        done = subprocess.run(
            [sys.executable, "-m", "serve_app", *command], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("ask", "What is this?", "--url", server.url, "--max-tokens", "4").strip()
    assert all(stage in run("status", "--url", server.url) for stage in ("ingress", "encoder", "prefill", "decode"))
    assert server.url in run("ready", str(server.log.with_name("serve_config.yaml")))


def test_page_docs_and_metrics_are_below_the_prefix(server: Server) -> None:
    for path in ("", "/"):
        page = server.get(path)
        assert (page.status_code, page.url) == (200, f"{server.url}/") and "page.js" in page.text
    for path in ("/page.js", "/health", "/status", "/metrics", "/docs", "/openapi.json"):
        assert requests.get(server.url + path, timeout=30).status_code == 200, path
    assert "/epd/openapi.json" in server.get("/docs").text


def test_clients_use_every_name_below_the_prefix(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    claude = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "second"]
    question: list[Any] = [{"role": "user", "content": "Hi"}]
    for name in ("demo", "second"):
        options: dict[str, Any] = {"model": name, "messages": question, "max_tokens": 4}
        said = client.chat.completions.create(temperature=0, **options).choices[0].message.content
        answer = claude.messages.create(extra_body={"temperature": 0}, **options)
        assert answer.content[0].text == said != ""


def test_without_the_key_nothing_is_served_below_the_prefix(server: Server) -> None:
    for path in (CHAT, "/v1/messages", "/v1/models"):
        assert requests.post(server.url + path, json={}, timeout=30).status_code == 401
        assert requests.get(server.url + path, headers={"x-api-key": "another"}, timeout=30).status_code == 401


def test_errors_below_the_prefix_have_the_shape_of_their_api(server: Server) -> None:
    body = {"model": "demo", "messages": 3, "max_tokens": 4}
    assert server.post("/v1/messages", body).json()["type"] == "error"
    assert server.post(CHAT, body).json()["error"]["code"] == 400
    claude = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    with pytest.raises(anthropic.NotFoundError, match="no-such-model"):
        claude.messages.create(model="no-such-model", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
