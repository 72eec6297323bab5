"""Serve's proxy ends a request without a word when the ingress replica died that worked on it."""

import asyncio
import json

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.hooks.proxy import AskAgain

BODY: list[Message] = [
    {"type": "http.request", "body": b"one ", "more_body": True},
    {"type": "http.request", "body": b"two", "more_body": False},
]
LEFT: Message = {"type": "http.disconnect"}
OK: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Proxy:
    """Serve's proxy: reads the body, then its first ``deaths`` calls end before anything is sent."""

    def __init__(self, deaths: int, reads: int = 2, sends_first: bool = False) -> None:
        self.bodies: list[bytes] = []
        self._deaths, self._reads, self._sends_first = deaths, reads, sends_first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages = [await receive() for _ in range(self._reads)]
        self.bodies.append(b"".join(message.get("body", b"") for message in messages))
        dies = len(self.bodies) <= self._deaths
        if self._sends_first or not dies:
            await send(OK)
        if not dies:
            await send({"type": "http.response.body", "body": b"answer"})


def ask(app: ASGIApp, *messages: Message) -> list[Message]:
    waiting, sent = list(messages), []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(AskAgain(app)({"type": "http", "headers": []}, receive, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("reads", [1, 2], ids=["in the body", "after the body"])
def test_request_is_asked_again_with_its_whole_body(reads: int) -> None:
    proxy = Proxy(deaths=1, reads=reads)
    assert [m.get("status", m.get("body")) for m in ask(proxy, *BODY)] == [200, b"answer"]
    assert proxy.bodies == [b"one two"[: 4 if reads == 1 else 7]] * 2


def test_request_that_kills_replicas_does_not_get_them_all() -> None:
    proxy = Proxy(deaths=9)
    start, body = ask(proxy, *BODY)
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert "ingress" in json.loads(body["body"])["error"]["message"]
    assert len(proxy.bodies) == 2


def test_answer_that_has_begun_is_not_begun_again() -> None:
    proxy = Proxy(deaths=9, sends_first=True)
    assert ask(proxy, *BODY) == [OK]
    assert len(proxy.bodies) == 1


def test_client_that_left_is_not_served_again() -> None:
    proxy = Proxy(deaths=9, reads=3)
    assert ask(proxy, *BODY, LEFT) == []
    assert len(proxy.bodies) == 1
