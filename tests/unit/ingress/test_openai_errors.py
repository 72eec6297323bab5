"""What clients get when something fails, from vLLM's whole app in front of fake stages."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import PrefillReply, StageRequest
from serve_app.stage import Stage
from tests.fakes import A, FakePipeline, Step

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 8},
}
ROUTES = list(BODIES)
MakeAPI = Callable[..., TestClient]


def error_of(path: str, body: Any) -> dict[str, Any]:
    """The error in a body of the shape that the route's API has."""
    error: dict[str, Any] = body["error"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 10_000, b"3"], ids=["cut", "no UTF-8", "deep", "no object"])
def test_body_that_cannot_be_read_is_answered_in_the_routes_own_shape(
    make_api: MakeAPI, path: str, content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    answer = make_api({}).post(path, content=content, headers=headers)
    assert answer.status_code == 400
    assert error_of(path, answer.json())["message"]


@pytest.mark.parametrize("value", [0, "regex", [{"regex": "a"}]])
def test_field_that_vllm_looks_into_before_it_checks_its_type_is_the_clients_mistake(
    make_api: MakeAPI, value: Any
) -> None:
    answer = make_api({}).post("/v1/chat/completions", json={"messages": MESSAGES, "structured_outputs": value})
    assert answer.status_code == 400
    assert "wrong type" in error_of("", answer.json())["message"]


def test_mistake_of_ours_stays_a_500(make_api: MakeAPI) -> None:
    async def prefill(request: StageRequest) -> PrefillReply:
        raise AttributeError("ours")

    answer = make_api(FakePipeline(prefill=prefill).stages).post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 500


@pytest.mark.parametrize("path", ROUTES)
def test_refusals_of_the_middleware_have_the_routes_own_shape(make_api: MakeAPI, path: str) -> None:
    api = make_api({}, media={"max_body_bytes": 1024})
    late = api.post(path, json=BODIES[path], headers={"x-request-timeout-s": "soon"})
    large = api.post(path, json=BODIES[path] | {"user": "x" * 2048})
    unannounced = api.post(path, content=iter([b"x" * 600] * 2), headers={"content-type": "application/json"})
    assert [answer.status_code for answer in (late, large, unannounced)] == [400, 413, 413]
    assert "x-request-timeout-s" in error_of(path, late.json())["message"]
    for answer in (large, unannounced):
        assert "larger than the 1024 bytes" in error_of(path, answer.json())["message"]


def test_unknown_routes_and_methods_have_openais_error(make_api: MakeAPI) -> None:
    api = make_api({})
    for answer, status in ((api.get("/v1/nothing"), 404), (api.put("/v1/completions"), 405)):
        assert answer.status_code == status
        assert error_of("", answer.json())["code"] == status


@pytest.mark.parametrize("path", ROUTES)
def test_stream_that_fails_before_its_first_token_has_the_failures_status(make_api: MakeAPI, path: str) -> None:
    gone = StageUnavailable(Stage.DECODE, "is gone")
    api = make_api(FakePipeline(fails={"decode": [gone] * 9}).stages)
    answer = api.post(path, json=BODIES[path] | {"stream": True})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert error_of(path, answer.json())["message"] == "The decode stage is gone"


@pytest.mark.parametrize("path", ROUTES)
def test_stream_that_fails_midway_ends_with_an_error_event(make_api: MakeAPI, path: str) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A)
        raise StageUnavailable(Stage.DECODE, "is gone")

    answer = make_api(FakePipeline(steps=steps).stages).post(path, json=BODIES[path] | {"stream": True})
    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"]
    assert not events[0].get("error")
    if path != "/v1/messages":  # vLLM's converter to Anthropic's events has another text
        assert events[-1]["error"]["message"] == "The decode stage is gone"
    assert events[-1]["error"]


def test_stream_whose_events_cannot_be_written_is_a_400(make_api: MakeAPI) -> None:
    """vLLM's ``/v1/responses`` repeats the request in its first event."""
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "\ud800"}}}
    content = json.dumps(BODIES["/v1/responses"] | {"stream": True, "text": text})
    answer = make_api({}).post("/v1/responses", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "surrogates" in error_of("/v1/responses", answer.json())["message"]


def test_transfer_parameters_are_refused_in_streams_of_every_api(make_api: MakeAPI) -> None:
    """vLLM's ``/v1/responses`` raises out of a stream that it has started."""
    pipeline = FakePipeline()
    api = make_api(pipeline.stages)
    for path in ROUTES:
        for options in ({"kv_transfer_params": {"x": 1}}, {"vllm_xargs": {"ec_transfer_params": "x"}}):
            answer = api.post(path, json=BODIES[path] | {"stream": True} | options)
            if path == "/v1/messages" and "vllm_xargs" in options:
                continue
            assert answer.status_code == 400, (path, answer.text)
            assert "cannot be set by a client" in error_of(path, answer.json())["message"]
    assert "prefill" not in pipeline.log
