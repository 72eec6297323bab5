"""The demo model sees: through the served system, streamed, it is right as often as by itself, and says the same."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve_app.demo import ensure_demo_model
from serve_app.demo.examples import Kind
from serve_app.demo.measure import Plain, Question, held_out
from tests.integration.answers import events, gather
from tests.integration.cases import CHAT, text
from tests.integration.media import data_url, png
from tests.integration.servers import Server, serve_run

ASKED: dict[Kind, tuple[int, float]] = {"one": (100, 0.98), "two": (60, 0.95), "count": (50, 0.9)}
"""Questions of each kind, and the share that has to be right; CARD.md has the shares of many more."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp("sees"), {"model": "demo"}) as server:
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
