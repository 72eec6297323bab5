"""What clients must not get past the ingress, through vLLM's whole app; no stage is called."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve_app.stage import Stage
from tests.fakes import FakePipeline
from tools.harness.media import data_url, png

HI = [{"role": "user", "content": "Hi"}]
MakeAPI = Callable[..., TestClient]


def refused(make_api: MakeAPI, body: dict[str, Any], encoder: Any = None, **config: Any) -> str:
    """The message of the 400 that a chat request gets, streaming or not. At most ``encoder`` is called."""
    pipeline = FakePipeline()
    api = make_api(pipeline.stages | ({Stage.ENCODER: encoder} if encoder else {}), **config)
    messages = set()
    for streaming in (False, True):
        answer = api.post("/v1/chat/completions", json={"messages": HI} | body | {"stream": streaming})
        assert answer.status_code == 400, answer.text
        messages.add(answer.json()["error"]["message"])
    assert pipeline.log == []
    (message,) = messages
    return message


@pytest.mark.parametrize(
    "options",
    [{"top_k": 2**70, "temperature": 1}, {"structured_outputs": {"json": {"type": "integer", "maximum": 2**70}}}],
    ids=["parameter", "schema"],
)
def test_number_that_no_engine_could_be_sent_is_refused(make_api: MakeAPI, options: dict[str, Any]) -> None:
    assert "64 bits" in refused(make_api, options)


@pytest.mark.parametrize("penalty", [1e300, -1e300, 11])
def test_length_penalty_that_no_score_survives_is_refused(make_api: MakeAPI, penalty: float) -> None:
    message = refused(make_api, {"use_beam_search": True, "n": 2, "max_tokens": 2, "length_penalty": penalty})
    assert "length_penalty must be between -10 and 10" in message


def image(width: int, height: int) -> dict[str, Any]:
    url = data_url("image/png", png(Image.new("RGB", (width, height))))
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(params=["from media", "from features"])
def way(request: pytest.FixtureRequest, make_encoder: Callable[..., Any]) -> dict[str, Any]:
    """To the encoder."""
    if request.param == "from media":
        return {"encoder": make_encoder()}
    return {"advanced": {"encode": {"from_media": False}}}


def test_prompt_truncated_within_its_image_is_refused(make_api: MakeAPI, way: dict[str, Any]) -> None:
    content = [image(84, 84), {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}], "truncate_prompt_tokens": 3}
    assert "The prompt and its media cannot be processed" in refused(make_api, body, **way)


def test_image_that_the_models_processor_refuses_is_answered_with_its_reason(
    make_api: MakeAPI, way: dict[str, Any]
) -> None:
    message = refused(make_api, {"messages": [{"role": "user", "content": [image(2000, 2)]}]}, **way)
    assert "aspect ratio" in message and "PIL" not in message


def test_more_choices_than_queues_hold_are_refused(make_api: MakeAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.launch.engine_args import INGRESS_ENV

    for name, value in INGRESS_ENV.items():
        monkeypatch.setenv(name, value)
    assert "n must be at most 1024" in refused(make_api, {"n": 1025, "temperature": 1})
