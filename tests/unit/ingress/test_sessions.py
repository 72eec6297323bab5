"""Which session ``EPDClient.generate`` is told, through vLLM's app."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from vllm.renderers.base import BaseRenderer

from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import current
from tests.fakes import FakePipeline

Post = Callable[..., Any]

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ANTHROPIC, BATCH = "/v1/messages", "/v1/chat/completions/batch"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 4},
    COMPLETION: {"prompt": "Hi", "max_tokens": 4},
    RESPONSE: {"input": "Hi", "max_output_tokens": 4},
    ANTHROPIC: {"messages": MESSAGES, "max_tokens": 4},
    BATCH: {"messages": [MESSAGES, MESSAGES], "max_tokens": 4},
}
CLAUDE = "user_0d3f_account__session_6a7d2c52-5f0e-4c37-a2b4-6d0f0d4c3a11"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The session of each call of ``generate``."""
    sessions: list[Any] = []
    generate = EPDClient.generate

    def observed(self: EPDClient, *args: Any, session_id: Any = None, **options: Any) -> Any:
        sessions.append(session_id)
        return generate(self, *args, session_id=session_id, **options)

    monkeypatch.setattr(EPDClient, "generate", observed)
    return sessions


@pytest.fixture
def post(make_api: Any, told: list[Any]) -> Post:
    """Ask one of the APIs."""
    api = make_api(FakePipeline().stages)

    def ask(route: str, more: dict[str, Any], headers: dict[str, str] | None = None, status: int = 200) -> Any:
        body = json.dumps({"model": "demo"} | BODIES[route] | more)
        answer = api.post(route, content=body, headers={"content-type": "application/json"} | (headers or {}))
        assert answer.status_code == status, answer.text
        return answer

    return ask


@pytest.mark.parametrize("route", [CHAT, COMPLETION, RESPONSE])
@pytest.mark.parametrize("more", [{"priority": 100}, {}], ids=["low", "everybody's"])
def test_priority_is_known_before_the_prompt_is_rendered(
    post: Post, monkeypatch: pytest.MonkeyPatch, route: str, more: dict[str, int]
) -> None:
    known: list[int] = []
    process = BaseRenderer.process_for_engine_async

    async def observed(self: Any, *args: Any, **options: Any) -> Any:
        request = current.get()
        assert request is not None
        known.append(request.priority)
        return await process(self, *args, **options)

    monkeypatch.setattr(BaseRenderer, "process_for_engine_async", observed)
    post(route, more)
    assert known == [more.get("priority", 0)]


WAYS = [
    *((route, "prompt_cache_key") for route in (CHAT, COMPLETION, RESPONSE, BATCH)),
    *((route, "session_id") for route in (CHAT, COMPLETION, RESPONSE, BATCH)),
    (ANTHROPIC, "metadata"),
    *((route, "header") for route in BODIES),
    *((route, "vllm_xargs") for route in (CHAT, COMPLETION, RESPONSE, ANTHROPIC)),
    *((route, "none") for route in BODIES),
]
STREAMED_OR_NOT = [(*way, stream) for way in WAYS for stream in (False, True) if way[0] != BATCH or not stream]


@pytest.mark.parametrize(("route", "way", "stream"), STREAMED_OR_NOT)
def test_each_api_names_a_session(post: Post, told: list[Any], route: str, way: str, stream: bool) -> None:
    more = {
        "metadata": {"metadata": {"user_id": "s"}},
        "vllm_xargs": {"vllm_xargs": {"session_id": "s"}},
        "header": {},
        "none": {},
    }.get(way, {way: "s"})
    post(route, more | ({"stream": True} if stream else {}), {"x-session-id": "s"} if way == "header" else None)
    calls = 2 if route == BATCH else 1
    assert told == [None if way == "none" else "s"] * calls


@pytest.mark.parametrize("route", [CHAT, COMPLETION, RESPONSE])
def test_vllms_own_ways_come_before_openais(post: Post, told: list[Any], route: str) -> None:
    header, xargs, key = {"x-session-id": "header"}, {"vllm_xargs": {"session_id": "xargs"}}, {"prompt_cache_key": "k"}
    post(route, {"session_id": "body"} | xargs | key, header)
    post(route, xargs | key, header)
    post(route, xargs | key)
    post(route, key | {"session_id": ""}, {"x-session-id": ""})
    assert told == ["body", "header", "xargs", "k"]


def test_vllms_own_ways_come_before_anthropics(post: Post, told: list[Any]) -> None:
    header, xargs, user = {"x-session-id": "header"}, {"vllm_xargs": {"session_id": "xargs"}}, {"user_id": CLAUDE}
    post(ANTHROPIC, xargs | {"metadata": user}, header)
    post(ANTHROPIC, xargs | {"metadata": user})
    post(ANTHROPIC, {"metadata": user})
    assert told == ["header", "xargs", CLAUDE]


@pytest.mark.parametrize("value", [None, 7, True, ["s"], {"s": 1}, ""])
def test_what_is_no_text_names_no_session(post: Post, told: list[Any], value: Any) -> None:
    post(CHAT, {"prompt_cache_key": value})
    post(COMPLETION, {"prompt_cache_key": value})
    post(ANTHROPIC, {"metadata": {"user_id": value}})
    assert told == [None] * 3
    assert post(RESPONSE, {"prompt_cache_key": value}, status=200 if value in (None, "") else 400)
    assert set(told) == {None}


@pytest.mark.parametrize("metadata", [None, {}, {"other": "s"}])
def test_metadata_without_a_user_name_no_session(post: Post, told: list[Any], metadata: Any) -> None:
    post(ANTHROPIC, {"metadata": metadata})
    post(CHAT, {"metadata": {"user_id": "of OpenAI's API, where it means nothing"}})
    assert told == [None, None]


def test_name_of_a_session_can_always_be_encoded(post: Post, told: list[Any]) -> None:
    for route, more in ((CHAT, {"prompt_cache_key": "a\ud800é"}), (ANTHROPIC, {"metadata": {"user_id": "a\ud800é"}})):
        post(route, more)
    assert told == ["a?é"] * 2


def test_all_prompts_of_a_request_are_of_its_session(post: Post, told: list[Any]) -> None:
    post(COMPLETION, {"prompt": ["Hi", "Ho"], "n": 2, "prompt_cache_key": "s"})
    assert told == ["s", "s"]


def test_tokens_of_messages_are_counted_without_a_session(make_api: Any) -> None:
    body = {"model": "demo", "messages": MESSAGES, "metadata": {"user_id": "s"}}
    assert make_api({}).post("/v1/messages/count_tokens", json=body).json()["input_tokens"] > 0
