"""How a client learns how many tokens of its prompt were in a cache."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.v1.metrics.stats import PrefillStats

from serve_app.handoff.types import StageRequest
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


async def steps(request: StageRequest) -> AsyncIterator[Step]:
    """Of a decode that has all of the prompt: the blocks of prefill, or in a cache of its own."""
    yield Step(A, more={"prefill_stats": PrefillStats(8, num_cached_tokens=7)})
    yield Step(B, "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("without", "cached"), [((), 3), ((Stage.PREFILL,), 7)])
def test_header_tells_what_the_stage_that_prefills_had(
    make_api: Any, without: tuple[Stage, ...], cached: int, stream: bool
) -> None:
    answer = make_api(FakePipeline(without, steps=steps).stages).post(
        "/v1/chat/completions",
        json=CHAT | {"stream": stream, "stream_options": {"include_usage": True} if stream else None},
    )
    text = answer.text.replace("data: [DONE]", "").strip().splitlines()[-1].removeprefix("data: ")
    usage = json.loads(text)["usage"]
    assert answer.headers["x-epd-cached-tokens"] == f"{cached}/{usage['prompt_tokens']}"
    assert usage.get("prompt_tokens_details") is None  # as in one engine


def test_vllms_own_argument_puts_them_into_the_usage(make_api: Any) -> None:
    api = make_api(FakePipeline().stages, api={"enable_prompt_tokens_details": True})
    assert api.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    body = CHAT | {"max_tokens": 4}
    assert api.post("/v1/messages", json=body).json()["usage"]["cache_read_input_tokens"] == 3
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 4}
    assert api.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
