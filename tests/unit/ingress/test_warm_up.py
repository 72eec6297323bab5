"""An ingress replica asks itself first, through vLLM's whole app, and serves whatever comes of it."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.ingress.start import warm_up
from serve_app.stage import Stage
from tests.fakes import FakePipeline

MakeAPI = Callable[..., TestClient]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING and "warm up" in each.msg]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    return caplog


@pytest.mark.parametrize("with_image", [False, True])
def test_every_stage_is_asked_once(make_api: MakeAPI, make_encoder: Any, told: Any, with_image: bool) -> None:
    pipeline, encoder = FakePipeline(), make_encoder()
    api = make_api(pipeline.stages | {Stage.ENCODER: encoder}, api={"api_key": "secret"})
    asyncio.run(warm_up(api.app, "/v1/chat/completions", "demo", "secret", with_image))
    assert warnings(told) == []
    assert [method for method, _ in encoder.calls] == ["encode_media"] * with_image
    assert [call for call in pipeline.log if "release" not in call] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("model", "key", "words"), [("demo", "wrong", "answered 401"), ("other", "secret", "answered 404")]
)
def test_refusal_is_told_and_no_more(make_api: MakeAPI, told: Any, model: str, key: str, words: str) -> None:
    api = make_api(FakePipeline().stages, api={"api_key": "secret"})
    asyncio.run(warm_up(api.app, "/v1/chat/completions", model, key, False))
    (warning,) = warnings(told)
    assert words in warning


def test_failure_is_told_and_no_more(told: Any) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("no stage")

    asyncio.run(warm_up(broken, "/v1/chat/completions", "demo", None, False))
    assert warnings(told) == ["The request to warm up failed: RuntimeError: no stage"]
