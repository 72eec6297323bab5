"""Requests of the questions, what a client makes of an answer's bytes, and what goodput is."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from benchmarks.questions import clients, goodput, interference
from benchmarks.questions.clients import Ask, Seen
from benchmarks.questions.goodput import SLOS, Load
from benchmarks.questions.systems import E_PD, TWO


def chunk(tokens: list[int], **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": "a"}, "token_ids": tokens}
    return f"data: {json.dumps({'choices': [choice]} | more)}\n\n".encode()


def usage(tokens: int) -> bytes:
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n".encode()


Respond = Callable[[web.StreamResponse], Awaitable[None]]


def answered(respond: Respond, status: int = 200) -> Seen:
    """What the client says of a server's answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        await respond(response)
        return response

    async def go() -> Seen:
        app = web.Application()
        app.router.add_post(clients.PATH, handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            (seen,), _ = await clients.play(f"http://127.0.0.1:{port}", [Ask(0.0, "text", b"{}")], None, 10.0)
            return seen
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def test_each_token_after_the_first_has_a_gap_also_where_several_come_together() -> None:
    async def respond(response: web.StreamResponse) -> None:
        data = chunk([1]) + chunk([2, 3]) + chunk([4]) + usage(4)
        await response.write(data[:40])
        await response.write(data[40:] + b"data: [DONE]\n\n")

    seen = answered(respond)
    assert seen.ok and seen.tokens == 4 and len(seen.gaps) == 3 and seen.gaps[1] == 0.0
    assert 0 < seen.ttft <= seen.took


def test_an_answer_is_the_same_however_its_tokens_come_together() -> None:
    def text(*chunks: list[int]) -> int:
        async def respond(response: web.StreamResponse) -> None:
            await response.write(b"".join(map(chunk, chunks)) + usage(3))

        return answered(respond).text

    assert text([1], [2], [3]) == text([1], [2, 3]) == text([1, 2, 3])
    assert text([1], [2], [3]) != text([1], [23], [3])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (chunk([1]) + chunk([2]), 200),  # no usage: it broke off
        (chunk([1]) + usage(2), 200),
        (chunk([1]) + b'data: {"error": {"message": "lost"}}\n\n' + usage(1), 200),
        (b'{"error": "busy"}', 503),
    ],
)
def test_an_answer_without_all_its_tokens_has_failed(data: bytes, status: int) -> None:
    async def respond(response: web.StreamResponse) -> None:
        await response.write(data)

    seen = answered(respond, status)
    assert not seen.ok and "failed" in clients.kept(seen)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    (seen,), _ = asyncio.run(clients.play("http://127.0.0.1:9", [Ask(0.0, "text", b"{}")], 1, 5.0))
    assert seen.status == 0 and not seen.ok


def test_the_percentiles_are_of_all_tokens() -> None:
    found = clients.quantiles([0.001] * 998 + [0.5, 1.0])
    assert (found["p50"], found["p99"], found["p999"], found["worst"]) == (1.0, 1.0, 1000.0, 1000.0)


def test_the_texts_of_a_run_come_all_the_time_and_the_rest_beside_them() -> None:
    asks = interference.asks(1)
    kinds = [each.kind for each in asks]
    assert kinds.count("long prompt") == 1 and kinds.count("video") == 2 and kinds.count("pictures") > 30
    texts = [each for each in asks if each.kind == "text"]
    assert len({each.body for each in asks}) == len(asks)
    assert max(later.at - earlier.at for earlier, later in pairwise(texts)) < 6


def test_both_systems_get_the_same_requests_and_other_rates_others() -> None:
    first, again = (list(goodput.asks(2, 1.0, 3, 10.0)) for _ in range(2))
    assert first == again and {each.body for each in first}.isdisjoint(
        each.body for each in goodput.asks(2, 1.5, 3, 10.0)
    )


def rows(good: int, of: int, images: int) -> list[list[float]]:
    slow = goodput.ttft_limit_s(images) + 0.1
    return [[0.1, 0.01, 0.05]] * good + [[slow, 0.01, 0.05]] * (of - good)


def run(system: str, rate: float, good: int, of: int = 100, images: int = 4) -> dict[str, Any]:
    load = Load(images, rate, 1, 25.0).__dict__
    return {"system": system, "round": 0, "load": load, "requests": rows(good, of, images)}


def test_a_request_is_within_the_slo_by_its_first_token_and_its_pauses() -> None:
    slo = SLOS[0]
    assert slo.met(4, {"ttft": 2.5, "tpot": 0.01, "worst": 0.1})
    assert not slo.met(4, {"ttft": 2.51, "tpot": 0.01, "worst": 0.1})
    assert not slo.met(4, {"ttft": 2.5, "tpot": 0.01, "worst": 0.101})
    assert not slo.met(4, {"ttft": 0.0, "tpot": 0.0, "worst": 0.0}), "it failed"


def test_goodput_lies_between_the_last_rate_that_is_enough_and_the_next() -> None:
    found = {"runs": [run(E_PD, 1.0, 100), run(E_PD, 2.0, 80), run(E_PD, 3.0, 100)]}
    assert goodput.goodput(found, E_PD, 4, SLOS[0], 0) == pytest.approx(1.5), "a higher rate that is good again is luck"
    assert goodput.goodput({"runs": [run(E_PD, 1.0, 89)]}, E_PD, 4, SLOS[0], 0) is None
    assert goodput.goodput({"runs": [run(E_PD, 1.0, 90)]}, E_PD, 4, SLOS[0], 0) == 1.0


def test_the_gain_is_that_of_stages_over_two_engines() -> None:
    found = {"runs": [run(E_PD, 1.0, 100), run(E_PD, 2.0, 80), run(TWO, 0.5, 95), run(TWO, 1.0, 85)]}
    gained = goodput.gain(found, 4, SLOS[0])
    assert gained is not None and gained.median == pytest.approx(1.5 / 0.75)
    assert goodput.gain({"runs": found["runs"][:2]}, 4, SLOS[0]) is None


def test_two_engines_that_are_too_slow_at_the_lowest_rate_count_as_if_they_were_not() -> None:
    found = {"runs": [run(E_PD, 1.0, 100), run(E_PD, 2.0, 95), run(TWO, 1.0, 60)]}
    gained = goodput.gain(found, 4, SLOS[0])
    assert gained is not None and gained.median == 2.0
    assert goodput.told(found, 4, SLOS[0]) == "< 1 / ≥ 2.0 = **> 2.0 ×**"
