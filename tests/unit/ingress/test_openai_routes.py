"""Routes that speak for all replicas of all stages."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve_app.config import EPDConfig
from serve_app.handoff.errors import BadRequest, StageUnavailable
from serve_app.ingress.door import Door
from serve_app.ingress.peers import Peers
from serve_app.ingress.routes import NOT_HERE, add_routes
from serve_app.ingress.server import make_app, server_args
from serve_app.stage import Stage
from tests.fakes import FakePipeline, FakeStage, fake_status


class Ingress:
    """Stages whose replicas answer every broadcast with ``replies``, and what is asked of them."""

    def __init__(self, **replies: list[Any] | Exception) -> None:
        self.stages = {Stage(name): FakeStage(Stage(name), **self._methods(each)) for name, each in replies.items()}
        self.states = dict.fromkeys(replies, "healthy")
        app = FastAPI()
        add_routes(app, self.stages, fake_status(self.stages, self.states))
        self.http = TestClient(app, raise_server_exceptions=False)

    def _methods(self, replies: list[Any] | Exception) -> dict[str, Any]:
        async def answer(*args: Any) -> list[Any]:
            if isinstance(replies, Exception):
                raise replies
            return replies

        return dict.fromkeys(("metrics", "start_profile", "stop_profile"), answer)


def test_health_is_200_only_when_every_stage_can_serve() -> None:
    ingress = Ingress(prefill=[], decode=[])
    answer = ingress.http.get("/health")
    assert (answer.status_code, answer.json()) == (
        200,
        {"ingress": "healthy", "prefill": "healthy", "decode": "healthy"},
    )
    ingress.states["decode"] = "no replica (UPDATING)"
    answer = ingress.http.get("/health")
    assert (answer.status_code, answer.json()["decode"]) == (503, "no replica (UPDATING)")


def page(stage: str, replica: str, value: int) -> tuple[str, str, str]:
    return stage, replica, f"# TYPE vllm:running gauge\nvllm:running {value}\n"


def test_metrics_are_of_all_replicas_that_answer() -> None:
    ingress = Ingress(
        encoder=StageUnavailable(Stage.ENCODER, "is gone"),
        prefill=[page("prefill", "p1", 1), StageUnavailable(Stage.PREFILL, "is gone")],
        decode=[page("decode", "d1", 2), page("decode", "d2", 3)],
    )
    answer = ingress.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert [line for line in answer.text.splitlines() if not line.startswith("#")] == [
        'vllm:running{replica="p1",stage="prefill"} 1.0',
        'vllm:running{replica="d1",stage="decode"} 2.0',
        'vllm:running{replica="d2",stage="decode"} 3.0',
    ]


@pytest.mark.parametrize("route", ["/start_profile", "/stop_profile"])
def test_profile_is_of_every_replica_of_every_stage(route: str) -> None:
    ingress = Ingress(prefill=["p1"], decode=["d1", "d2"])
    answer = ingress.http.post(route)
    assert (answer.status_code, answer.json()) == (200, {"prefill": ["p1"], "decode": ["d1", "d2"]})
    assert [method for stage in ingress.stages.values() for method, _ in stage.calls] == [route[1:]] * 2


def test_profile_passes_on_what_vllm_takes() -> None:
    ingress = Ingress(decode=["d1"])
    overrides = {"profile_prefix": "x", "max_iterations": 3, "delay_iterations": None, "other": 1}
    assert ingress.http.post("/start_profile", json=overrides).status_code == 200
    assert ingress.stages[Stage.DECODE].calls == [("start_profile", ({"profile_prefix": "x", "max_iterations": 3},))]


def test_profile_says_once_what_hindered_replicas() -> None:
    hindered = BadRequest("No profiler is configured")
    ingress = Ingress(prefill=["p1"], decode=[hindered, hindered])
    answer = ingress.http.post("/start_profile")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "No profiler is configured"


@pytest.mark.parametrize("content", ["[]", "3", '"x"'])
def test_profile_takes_only_a_json_object(content: str) -> None:
    ingress = Ingress(decode=["d1"])
    assert ingress.http.post("/start_profile", content=content).status_code == 400
    assert ingress.stages[Stage.DECODE].calls == []


def test_profile_answers_400_to_a_broken_body() -> None:
    assert Ingress(decode=["d1"]).http.post("/start_profile", content="{").status_code == 400


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", NOT_HERE)
def test_routes_that_reach_past_the_stages_are_refused_with_the_reason(path: str, method: str) -> None:
    answer = Ingress().http.request(method, path)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert path in message and NOT_HERE[path] in message


@pytest.mark.parametrize(
    ("environment", "api", "accepted"),
    [
        ("from-a-secret", {}, {"from-a-secret"}),
        (None, {"api_key": "configured"}, {"configured"}),
        ("from-a-secret", {"api_key": "configured"}, {"configured"}),
        (None, {}, {"from-a-secret", "configured", "another", ""}),
    ],
)
def test_key_comes_from_the_config_or_from_the_environment(
    make_parts: Any,
    demo_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
    environment: str | None,
    api: dict[str, Any],
    accepted: set[str],
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("VLLM_API_KEY", environment)

    config = EPDConfig(api=api)
    args = server_args(config, {"model": str(demo_folder)})
    http = TestClient(asyncio.run(make_app(config, args, make_parts({}), fake_status({}), Peers())))
    for key in ("from-a-secret", "configured", "another", ""):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        status = http.get("/v1/models", headers=headers).status_code
        assert status == (200 if key in accepted else 401), key
    for path in ("/health", "/status", "/"):  # for probes, and for the page, which asks for the key
        assert http.get(path).status_code == 200


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_every_served_name_is_the_models(make_api: Any) -> None:
    api = make_api(FakePipeline().stages, served_model_name=["one", "two"])
    assert [model["id"] for model in api.get("/v1/models").json()["data"]] == ["one", "two"]
    for name, status in (("one", 200), ("two", 200), ("three", 404)):
        answer = api.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES})
        assert answer.status_code == status, answer.text


def test_key_may_come_in_the_header_of_anthropics_clients(make_api: Any) -> None:
    api = make_api(FakePipeline().stages, api={"api_key": "secret"})
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4}
    for headers, status in (
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": "other"}, 401),
        ({"x-api-key": "other", "authorization": "Bearer secret"}, 200),
        ({"x-api-key": "secret", "authorization": "Bearer other"}, 401),
        ({}, 401),
    ):
        assert api.post("/v1/messages", json=body, headers=headers).status_code == status, headers
    assert api.post("/v1/messages/count_tokens", json=body, headers={"x-api-key": "secret"}).status_code == 200
    assert api.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200


# ---- below a route prefix


KEY = {"x-api-key": "secret"}


def below_a_prefix(api: TestClient) -> TestClient:
    """A client of an application with ``route_prefix: /epd``: Serve leaves the prefix in the path and names it as
    ``root_path``."""
    return TestClient(api.app, root_path="/epd", base_url="http://testserver/epd/", raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["v1/models", "v1/chat/completions", "v1/messages", "v1/responses/x", "v1"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_key_is_asked_for_below_a_prefix(make_api: Any, method: str, path: str) -> None:
    below = below_a_prefix(make_api({}, api={"api_key": "secret"}))
    assert below.request(method, path).status_code == 401
    assert below.request(method, path, headers=KEY).status_code != 401


@pytest.mark.parametrize("stream", [False, True])
def test_errors_below_a_prefix_have_the_routes_own_shape(make_api: Any, stream: bool) -> None:
    gone = StageUnavailable(Stage.DECODE, "is gone")
    below = below_a_prefix(make_api(FakePipeline(fails={"decode": [gone] * 9}).stages, media={"max_body_bytes": 4096}))
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4, "stream": stream}
    for each, status in ((body, 503), (body | {"messages": 3}, 400), (body | {"user": "x" * 4096}, 413)):
        answer = below.post("v1/messages", json=each)
        assert (answer.status_code, answer.json().get("type")) == (status, "error"), answer.text
        answer = below.post("v1/chat/completions", json=each)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    late = below.post("v1/messages", json=body, headers={"x-request-timeout-s": "soon"})
    assert (late.status_code, late.json()["type"]) == (400, "error")


def test_server_that_ends_says_so_below_a_prefix_in_the_routes_own_shape(make_api: Any) -> None:
    door = Door(make_api({}).app)
    door.close()
    below = TestClient(door, root_path="/epd", base_url="http://testserver/epd/")
    assert [below.post(path).json().get("type") for path in ("v1/messages", "v1/responses")] == ["error", None]


def test_page_docs_and_operations_are_below_the_prefix(make_api: Any) -> None:
    below = below_a_prefix(make_api({}))
    for path in ("health", "status", "metrics", "version", "page.js", "page.css"):
        assert below.get(path).status_code == 200, path
    for path in ("", "."):  # with and without the slash at its end, which the relative names in the page need
        answer = below.get("http://testserver/epd" + path.replace(".", "/"))
        assert answer.status_code == 200 and 'src="page.js"' in answer.text
        assert str(answer.url) == "http://testserver/epd/"
    assert "/epd/openapi.json" in below.get("docs").text
    schema = below.get("openapi.json").json()
    assert schema["servers"] == [{"url": "/epd"}] and "/v1/chat/completions" in schema["paths"]
    assert below.get("inference/v1/generate").status_code == 400


def test_requests_are_not_counted_for_a_page_that_nobody_can_read(make_api: Any) -> None:
    """vLLM's own server counts them for its /metrics, which is the engines' here."""
    layer = make_api({}).app.app.middleware_stack
    passed = []
    while hasattr(layer, "app"):
        passed.append(type(layer).__name__)
        layer = layer.app
    assert "CORSMiddleware" in passed, "the stack that serves"
    assert not [name for name in passed if "Prometheus" in name]
