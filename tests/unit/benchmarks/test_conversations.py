"""benchmarks.conversations: what is asked, what the users saw, and what that says of the targets."""

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from benchmarks import cpu
from benchmarks.conversations import clients
from benchmarks.conversations.clients import Asked, Done, Look, Run, engines, outcome, slowest, work
from benchmarks.conversations.figures import PREFIX, TWO_CHOICES, cached_share, most_work
from benchmarks.conversations.loads import (
    ANSWER_TOKENS,
    CONVERSATIONS,
    HOT,
    KEPT,
    NO_REUSE,
    SLIDING,
    Load,
    Message,
    session,
    turns,
)
from benchmarks.conversations.page import TARGETS, page

# ---- what is asked


def pictures(messages: list[Message]) -> list[str]:
    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def asked(load: Load, seed: int = 1, user: int = 0, number: int = 1) -> list[list[Message]]:
    return [turn.messages for turn in session(load, seed, user, number)]


def test_a_turn_continues_the_one_before() -> None:
    talk = asked(CONVERSATIONS)
    assert [len(messages) for messages in talk] == list(range(2, 2 * CONVERSATIONS.turns + 1, 2))
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(talk))
    assert {len(pictures(messages)) for messages in talk} == {KEPT}


def test_a_window_keeps_the_last_pictures() -> None:
    talk = [pictures(messages) for messages in asked(SLIDING)]
    assert [len(seen) for seen in talk] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert talk[5][:-1] == talk[4][1:]


def test_all_of_a_session_follows_from_its_seed() -> None:
    talk = list(session(CONVERSATIONS, 1, 2, 3))
    assert talk == list(session(CONVERSATIONS, 1, 2, 3))
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not set(pictures(talk[0].messages)) & set(pictures(asked(CONVERSATIONS, *other)[0]))


def test_prompts_share_their_system_prompt_or_nothing() -> None:
    def begins(load: Load) -> list[str]:
        return [asked(load, user=user, number=number)[0][0]["content"] for user in (0, 1) for number in (1, 2)]

    assert len(set(begins(HOT))) == 1
    assert len({system[:8] for system in begins(NO_REUSE)}) == 4


def test_first_sessions_are_cut_and_no_others() -> None:
    assert [turns(CONVERSATIONS, user, 0) for user in range(9)] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert {turns(CONVERSATIONS, user, 1) for user in range(9)} == {8}


def test_users_think_as_long_as_the_load_says() -> None:
    load = replace(CONVERSATIONS, pictures="")
    times = [turn.think_s for number in range(1, 100) for turn in session(load, 1, 0, number)]
    assert sum(times) / len(times) == pytest.approx(load.think_s, rel=0.1)
    assert {turn.think_s for turn in session(HOT, 1, 0, 1)} == {0.0}


# ---- what the users saw


def saw(
    began: float, ttft_s: float, cached: int, turn: int = 0, counts: bool = True, tokens: int = ANSWER_TOKENS
) -> Asked:
    return Asked(f"{began:g}", turn, counts, began, ttft_s, ttft_s + 0.1, prompt=1000, cached=cached, tokens=tokens)


def look(time: float, cpu_s: float, work: dict[str, float]) -> Look:
    done = {("prefill", replica): Done(tokens, tokens / 100) for replica, tokens in work.items()}
    return Look(time, {1: cpu.Spent(cpu.ENGINES, cpu_s)}, 2 * cpu_s, 0.1 * cpu_s, done)


def test_what_does_not_count_is_load_only() -> None:
    seen = [
        saw(0.0, 9.0, 0, counts=False),
        saw(10.0, 0.4, 0),
        saw(11.0, 0.1, 950, turn=1),
        saw(12.0, 0.2, 500, turn=1),
        saw(13.0, 5.0, 0, counts=False),
        saw(14.0, 0.2, 0, tokens=3),
    ]
    found = outcome(seen, look(9.5, 1.0, {"a": 100.0}), look(19.5, 6.0, {"a": 400.0, "b": 100.0}))
    assert (found["requests"], found["failed"], found["requests_meanwhile"]) == (3, 1, 4)
    assert (found["prompt_tokens"], found["cached_tokens"], found["ttft_p50_ms"]) == (3000, 1450, 200.0)
    assert (found["hits"], found["ttft_hit_ms"], found["misses"], found["ttft_miss_ms"]) == (1, 100.0, 1, 400.0)
    assert [turn["cached"] for turn in found["by_turn"]] == [0, 725]
    assert found["work"] == {"a": 300.0, "b": 100.0}
    assert found["engines"] == [["prefill", 300.0, 3.0], ["prefill", 100.0, 1.0]]
    assert (found["ttft_first_p99_ms"], found["ttft_later_p50_ms"], found["prompt_tokens_meanwhile"]) == (
        400.0,
        100.0,
        4000,
    )
    assert (found["requests_per_s"], found["cpu_s"], found["other_cores"]) == (0.4, {cpu.ENGINES: 5.0}, 0.45)


def test_work_is_what_prefill_computed() -> None:
    name = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",replica="%s",source="%s",stage="%s"} %s\n'
    samples = [("p1", "local_compute", "prefill", 5.0), ("p1", "local_cache_hit", "prefill", 7.0)]
    samples += [("p2", "local_compute", "prefill", 6.0), ("d", "local_compute", "decode", 8.0)]
    page = "".join(name % sample for sample in samples)
    page += 'vllm:request_success_total{engine="0",finished_reason="stop",replica="d",stage="decode"} 2.0\n'
    page += 'vllm:request_success_total{engine="0",finished_reason="length",replica="d",stage="decode"} 1.0\n'
    found = engines(page)
    assert work(found) == {"p1": 5.0, "p2": 6.0}
    assert found["decode", "d"] == Done(computed=8.0, requests=3.0)


def test_an_engine_without_a_stage_has_that_of_its_page() -> None:
    page = 'vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 5.0\n'
    assert engines(page, "prefill") == {("prefill", ""): Done(5.0)}


def test_the_slowest_are_told_with_their_log_lines() -> None:
    seen = [saw(1.0, 0.5, 0), saw(2.0, 0.9, 0), saw(3.0, 0.7, 0), saw(4.0, 0.6, 0), saw(5.0, 9.0, 0, counts=False)]
    found = slowest(seen, "INFO -- request=2 status=200 prefill=5.0ms\nINFO -- request=1 status=200\n")
    assert [(each["ttft_ms"], each["log"]) for each in found] == [
        (600.0, ""),
        (700.0, ""),
        (900.0, "status=200 prefill=5.0ms"),
    ]


async def served(load: Load, status: int = 200) -> tuple[list[Asked], list[bytes], Look, Look]:
    """What the users of a load saw, and what a server got of them that computes nothing and gives a status."""
    bodies = []

    async def chat(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.read())
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": ANSWER_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 64},
        }
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "a"}}]}, {"choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return web.Response(text=text, status=status)

    async def metrics(request: web.Request) -> web.StreamResponse:
        return web.Response(text="")

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/metrics", metrics)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    run = Run(load, 1, url, "nobody's mark", {"": f"{url}/metrics"})
    before, after, _ = await run.go()
    await runner.cleanup()
    return run.asked, bodies, before, after


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SETTLE_S", 0.0)


LOAD = Load("some", users=3, sessions=2, turns=2, think_s=0.01, system=4, question=(2, 3))


def test_users_go_on_until_all_sessions_that_count_are_over(no_wait: None) -> None:
    seen, bodies, before, after = asyncio.run(served(LOAD))
    counted = [each for each in seen if each.counts]
    assert len(counted) == LOAD.requests and all(each.whole for each in counted)
    assert {(each.prompt, each.cached) for each in counted} == {(100, 64)}
    assert len(set(bodies)) == len(bodies) >= LOAD.requests
    assert outcome(seen, before, after)["failed"] == 0


def test_what_a_server_refuses_has_failed(no_wait: None) -> None:
    seen, _, before, after = asyncio.run(served(LOAD, status=503))
    found = outcome(seen, before, after)
    assert (found["failed"], found["requests"], found["ttft_p50_ms"]) == (LOAD.requests, 0, 0.0)


# ---- what that says


def run(arm: str, load: str = "conversations", round_: int = 0, **changes: Any) -> dict[str, Any]:
    plain = dict.fromkeys(
        (
            *("took_s", "requests_per_s", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "client_cpu_s", "other_cores"),
            *("speed_ms", "requests", "requests_meanwhile", "prompt_tokens", "cached_tokens"),
        ),
        1.0,
    )
    where = {"arm": arm, "caches": "small caches", "load": load, "round": round_, "failed": 0}
    return where | {"cpu_s": {"engines": 1.0}, "work": {"a": 1.0, "b": 1.0}} | plain | changes


def lines(*some: dict[str, Any]) -> dict[str, list[str]]:
    found = [target.line({"runs": list(some)}) for target in TARGETS]
    return {line[0]: line[2:] for line in found if line}


def test_the_busiest_prefill_is_told_by_the_mean_of_all() -> None:
    assert most_work(run(PREFIX, work={"a": 300.0, "b": 100.0, "c": 0.0, "d": 0.0})) == 3.0
    assert cached_share(run(PREFIX, prompt_tokens=200, cached_tokens=150)) == 0.75


def test_ratios_are_of_one_round() -> None:
    found = lines(
        run(TWO_CHOICES, ttft_p50_ms=400.0, cached_tokens=10.0),
        run(PREFIX, ttft_p50_ms=200.0, cached_tokens=30.0, work={"a": 16.0, "b": 4.0}),
        run(TWO_CHOICES, round_=1, ttft_p50_ms=100.0, cached_tokens=20.0),
        run(PREFIX, round_=1, ttft_p50_ms=60.0, cached_tokens=50.0, work={"a": 10.0, "b": 10.0}),
        run(PREFIX, round_=2, ttft_p50_ms=1.0, work={"a": 10.0, "b": 10.0}),
    )
    assert found == {
        "conversations: cached tokens against two choices": ["2.75 (2.50 – 3.00)", "met"],
        "conversations: TTFT p50 by speed against two choices": ["0.55 (0.50 – 0.60)", "met"],
        "conversations: most work of a prefill by the mean": ["1.00 (1.00 – 1.60)", "met"],
    }


def test_a_page_shows_both_arms_and_what_did_not_run() -> None:
    made = {"runs": [run(TWO_CHOICES), run(PREFIX, failed=2)]}
    made["runs"].append({"arm": PREFIX, "caches": "small caches", "round": 1, "error": "AssertionError: no"})
    told = page(made)
    assert "| conversations, small caches | two choices |" in told and "| conversations, small caches | ratio |" in told
    assert "- prefix, small caches, round 2: AssertionError: no" in told
