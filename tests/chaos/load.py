"""Steady mixed load, what became of each request, and clients that leave."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from tools.harness.answers import differences, events, gather, reduce
from tools.harness.cases import CASES, MANY, STREAMED, Case, chat, image, one_of_many, text
from tools.harness.servers import Server

DEADLINE_S = 60.0
LOST = "connection lost"
"""Status of a request whose ingress went with it: reset or broken off. Nobody asks again but the client."""
BACKOFF_S = 0.5
"""As OpenAI's clients wait before they ask again: a process that is killed may take connections up to its last moment."""
PLAIN = ["text", "text of many blocks"] * 5 + ["1 image", "2 images", "an image between texts"]
OTHERS_LOGPROBS = "logprobs of named tokens"
"""In the step of such a request vLLM's sampler (0.32.0) leaves out the logprobs of all others in its batch."""
KINDS = [name for name in CASES if "video" not in name and "tokenize" not in name and name != OTHERS_LOGPROBS]
"""Texts and pictures, every sampling parameter, tools, beams, the other APIs: all that the chaos tests' server takes."""


@dataclass(frozen=True)
class Ask:
    case: Case
    answer: dict[str, Any]
    """The baseline's, reduced."""
    stream: list[dict[str, Any]] | None = None
    """What a stream tells of each choice; None: it is not asked for as a stream."""


def asks(baseline: dict[str, Any], kinds: Sequence[str] = PLAIN) -> tuple[list[Ask], list[Ask]]:
    """What a steady load asks, of these kinds and of many pictures, and as many requests with pictures of their own."""

    def whole(case: Case, answer: Any) -> Ask:
        return Ask(case, answer, of_choices(answer["choices"]))

    def kind(name: str) -> Ask:
        if name in PLAIN:
            return whole(CASES[name], baseline[name])
        stream = of_choices(baseline[f"{name}/stream"]["choices"]) if name in STREAMED else None
        return Ask(CASES[name], baseline[name], stream)

    many = [whole(one_of_many(index), baseline[f"many/{index}"]) for index in range(MANY)]
    return [kind(name) for name in kinds] + many[::2], many[1::2]


@dataclass
class Outcome:
    began: float
    seconds: float
    status: int | str
    rungs: str
    wrong: str
    """Status 200 with another answer than the baseline's, or a stream that ended without a reason or an error event."""
    asked: Ask
    choices: list[dict[str, Any]] | None
    """What a whole answer told, where its API has choices."""
    again: int | str | None = None
    """Status of the request when its client asked again after its connection was lost."""


def failed(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.status != 200]


def wrong(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.wrong]


@dataclass
class Load:
    """Threads that ask one request after the other, half of them streaming, until they are stopped."""

    server: Server
    asks: list[Ask]
    pause_s: float = 0.0
    """Between the beginnings of two requests of a thread, at least."""
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
        assert not any(worker.is_alive() for worker in self._workers), "a request without an end"

    def under_way_since(self, moment: float) -> list[Outcome]:
        """Requests that ended after ``moment``, those included that had begun before."""
        return [outcome for outcome in self.outcomes if outcome.began + outcome.seconds >= moment]

    def begun_since(self, moment: float) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.began >= moment]

    def _work(self, seed: int) -> None:
        order, session = random.Random(seed), requests.Session()
        while not self._stop.is_set():
            asked, streaming = order.choice(self.asks), order.random() < 0.5
            outcome = ask(session, self.server, asked, streaming)
            if outcome.status == LOST:
                time.sleep(BACKOFF_S)
                outcome.again = ask(session, self.server, asked, streaming).status
            self.outcomes.append(outcome)
            self._stop.wait(self.pause_s - outcome.seconds)


def ask(session: requests.Session, server: Server, ask: Ask, streaming: bool) -> Outcome:
    path, body = ask.case
    streaming = streaming and ask.stream is not None
    began = time.monotonic()
    status: int | str
    rungs = wrong = ""
    choices = None
    try:
        response = session.post(
            server.url + path,
            json=body | {"stream": streaming},
            headers={"x-request-timeout-s": str(DEADLINE_S - 10)},
            timeout=DEADLINE_S,
        )
        status, rungs = response.status_code, response.headers.get("x-epd-rungs", "")
        if status == 200:
            told = events(response) if streaming else []
            if any("error" in event for event in told):
                status = "error event"
            elif streaming:
                choices = of_choices(gather(told)["choices"])
                wrong = "; ".join(differences(choices, ask.stream))
            else:
                answer = reduce(response.json())
                choices = of_choices(answer["choices"]) if "choices" in answer else None
                wrong = "; ".join(differences(answer, ask.answer))
    except requests.exceptions.ConnectTimeout:
        status = "ConnectTimeout"
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        status = LOST
    except requests.RequestException as error:
        status = type(error).__name__
    return Outcome(began, time.monotonic() - began, status, rungs, wrong, ask, choices)


def of_choices(choices: Any) -> list[dict[str, Any]]:
    """What streams and whole answers tell alike of each choice."""
    each = [choices[index] for index in sorted(choices)] if isinstance(choices, dict) else choices
    return [{"token_ids": choice["token_ids"], "finish_reason": choice["finish_reason"]} for choice in each]


# ---- clients that leave


def leave_in_the_stream(server: Server, order: random.Random) -> bool:
    """Whether there was a stream to leave."""
    path, body = chat(text("Describe."), image(order.randrange(8)), max_tokens=2000, ignore_eos=True, stream=True)
    with requests.post(server.url + path, json=body, stream=True, timeout=DEADLINE_S) as response:
        chunks = response.iter_content(64)
        for _ in range(order.randrange(1, 5)):
            next(chunks)
        return response.status_code == 200


def leave_before_the_first_token(server: Server, order: random.Random) -> bool:
    """Whether the client left in time."""
    path, body = chat(text("Describe."), image(order.randrange(1000), (280, 280)), image(order.randrange(1000)))
    try:
        requests.post(server.url + path, json=body, timeout=(DEADLINE_S, order.uniform(0.01, 0.3)))
        return False
    except requests.ReadTimeout:
        return True


def leave(server: Server, each: int, threads: int = 8) -> dict[str, int]:
    """Clients that leave one after the other, many at a time, until so many have left in each way; how many left in it."""
    ways: list[Callable[[Server, random.Random], bool]] = [leave_in_the_stream, leave_before_the_first_token]
    left: Counter[str] = Counter()
    end = time.monotonic() + DEADLINE_S

    def work(seed: int) -> None:
        order, way = random.Random(seed), ways[seed % 2]
        while any(left[way.__name__] < each for way in ways) and time.monotonic() < end:
            if way(server, order):
                left[way.__name__] += 1

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {way.__name__: left[way.__name__] for way in ways}
