"""serve_app.openai_app: routes that speak for all replicas of all stages."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve_app.config import EPDConfig, Stage
from serve_app.errors import BadRequest, StageUnavailable
from serve_app.openai_app import NOT_HERE, _add_routes, make_app, server_args
from tests.fakes import FakeStage, fake_status


class Ingress:
    """Stages whose replicas answer every broadcast with ``replies``, and what is asked of them."""

    def __init__(self, **replies: list[Any] | Exception) -> None:
        self.stages = {Stage(name): FakeStage(Stage(name), **self._methods(each)) for name, each in replies.items()}
        self.states = dict.fromkeys(replies, "healthy")
        app = FastAPI()
        _add_routes(app, self, fake_status(self.stages, self.states))  # type: ignore[arg-type]
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
    make_client: Any,
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
    http = TestClient(
        asyncio.run(
            make_app(config, server_args(config, {"model": str(demo_folder)}), make_client({}), fake_status({}))
        )
    )
    for key in ("from-a-secret", "configured", "another", ""):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        status = http.get("/v1/models", headers=headers).status_code
        assert status == (200 if key in accepted else 401), key
    for path in ("/health", "/status", "/"):  # for probes, and for the page, which asks for the key
        assert http.get(path).status_code == 200
