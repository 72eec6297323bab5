"""Steady mixed load, and what became of each request."""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.integration.cases import Case, chat, image, text
from tests.integration.servers import Server

DEADLINE_S = 60.0


def kinds() -> list[Case]:
    """Text, one image, two images; some pictures come again and again, as in real traffic."""
    return [
        chat(text("Tell me about the weather."), max_tokens=12),
        chat(text("Describe."), image(1), max_tokens=12),
        chat(text("Compare."), image(2), image(3), max_tokens=12),
        chat(image(4), text("What is it?"), image(1), max_tokens=12),
    ]


@dataclass
class Outcome:
    kind: int
    began: float
    seconds: float
    status: int | str
    rungs: str
    wrong: bool
    """Status 200 with other tokens than before the faults, or a stream that ended without a reason or an error event."""


@dataclass
class Load:
    """Threads that ask one after the other, half of them streaming, until they are stopped."""

    server: Server
    expected: list[list[int]]
    threads: int = 4
    outcomes: list[Outcome] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _workers: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._workers = [threading.Thread(target=self._work, args=(seed,)) for seed in range(self.threads)]
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(DEADLINE_S + 10)

    def under_way_since(self, moment: float) -> list[Outcome]:
        """Requests that ended after ``moment``, those included that had begun before."""
        return [outcome for outcome in self.outcomes if outcome.began + outcome.seconds >= moment]

    def begun_since(self, moment: float) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.began >= moment]

    def _work(self, seed: int) -> None:
        order, session = random.Random(seed), requests.Session()
        while not self._stop.is_set():
            kind = order.randrange(len(self.expected))
            self.outcomes.append(self._ask(session, kind, streaming=order.random() < 0.5))

    def _ask(self, session: requests.Session, kind: int, streaming: bool) -> Outcome:
        path, body = kinds()[kind]
        began = time.monotonic()
        status: int | str
        rungs, wrong = "", False
        try:
            response = session.post(
                self.server.url + path,
                json=body | {"stream": streaming},
                headers={"x-request-timeout-s": str(DEADLINE_S - 10)},
                timeout=DEADLINE_S,
            )
            status, rungs = response.status_code, response.headers.get("x-epd-rungs", "")
            if status == 200:
                tokens, ended = read(response.text, streaming)
                if tokens is None:
                    status = "error event"
                else:
                    wrong = not ended or tokens != self.expected[kind]
        except requests.RequestException as error:
            status = type(error).__name__
        return Outcome(kind, began, time.monotonic() - began, status, rungs, wrong)


def read(body: str, streaming: bool) -> tuple[list[int] | None, bool]:
    """Token ids of an answer and whether it ended with a reason; no tokens where a stream told of an error."""
    if not streaming:
        choice = json.loads(body)["choices"][0]
        return choice["token_ids"], choice["finish_reason"] is not None
    tokens: list[int] = []
    ended = False
    for line in body.splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return None, True
        for choice in event["choices"]:
            tokens += choice.get("token_ids") or []
            ended = ended or choice.get("finish_reason") is not None
    return tokens, ended


def answers(server: Server) -> list[list[int]]:
    """The right tokens of each kind, from a server on which nothing has failed yet."""
    return [server.post(*case).json()["choices"][0]["token_ids"] for case in kinds()]
