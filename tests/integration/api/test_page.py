"""The page in a real Chromium, in front of real engines."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tools.harness.browser import answered, chromium, draw, page_at
from tools.harness.servers import Server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def replicas(server: Server) -> set[str]:
    return {load["replica"] for stage in server.get("/status").json() for load in stage["loads"]}


@pytest.mark.parametrize(("width", "scheme"), [(1180, "light"), (380, "dark")])
def test_page_draws_asks_and_shows_the_answer_of_the_api_with_its_steps(
    epd: Server, browser: Any, width: int, scheme: Any
) -> None:
    with page_at(browser, epd.url + "/", width=width, color_scheme=scheme) as page:
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.post_data) if request.method == "POST" else None)
        draw(page, ("red", "circle", "top left"), ("blue", "square", "bottom right" if width > 500 else "middle"))
        page.click("#add")
        draw(page, ("green", "triangle" if width > 500 else "star", "middle"))
        page.fill("#question", "Which picture has the red circle?")
        page.fill("#max-tokens", "24")
        page.click("#send")
        shown = answered(page)
        assert page.text_content("#problem") == ""
        steps = page.locator("#steps tr").evaluate_all(
            "rows => rows.map(row => [row.children[0].textContent, row.children[3].textContent])"
        )
        cached = page.text_content("#cached")
        stages = page.locator("#stages b").all_text_contents()
        page.wait_for_selector(".replicas .worked")
    (body,) = map(json.loads, sent)
    assert len(body["messages"][0]["content"]) == 3
    answer = epd.post("/v1/chat/completions", body | {"stream": False}).json()
    assert shown == answer["choices"][0]["message"]["content"] != ""
    assert [name for name, _ in steps] == [
        "Render",
        "Queue",
        "Encode item 1",
        "Encode item 2",
        "EC transfer",
        "Prefill",
        "KV transfer",
        "Decode: first token",
        "Decode: the rest",
    ]
    assert {replica for _, replica in steps if replica} <= replicas(epd)
    assert all(replica for _, replica in steps[2:])
    assert re.fullmatch(rf"\d+ of {answer['usage']['prompt_tokens']} prompt tokens were in a cache\.", cached)
    assert stages == ["ingress", "encoder", "prefill", "decode"]


def test_page_shows_a_refusal_as_the_servers_sentence(epd: Server, browser: Any) -> None:
    with page_at(browser, epd.url + "/", refused=True) as page:
        page.fill("#max-tokens", "99999")
        page.click("#send")
        page.wait_for_selector("#problem:not(:empty)")
        assert page.text_content("#problem").startswith("The server answers 400: ")
        assert "99999" in page.text_content("#problem")
