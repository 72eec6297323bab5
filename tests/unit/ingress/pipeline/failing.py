"""Requests through a pipeline of fake stages that fail, and what came of them."""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from serve_app.handoff.errors import HandoffLost, StageUnavailable
from serve_app.handoff.types import StageRequest
from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import Request, current
from serve_app.observe.trace import Trace
from serve_app.stage import Stage
from tests.fakes import FakePipeline, Step
from tests.unit.running import Make, background, generate, run


def once(make: Make) -> Make:
    """Clients that try nothing again."""
    return functools.partial(make, advanced={"retry": {"attempts": 1}})


def traced(make: Make, pipeline: FakePipeline, *colours: str, **more: Any) -> tuple[list[RequestOutput], Trace]:
    """A request, and its trace."""
    request = Request("req")
    token = current.set(request)
    try:
        return generate(make, pipeline, *colours, **more), request.trace
    finally:
        current.reset(token)


def texts(outputs: list[RequestOutput]) -> list[str]:
    """What a client of one choice sees."""
    return [output.outputs[0].text for output in outputs]


def given_back(pipeline: FakePipeline) -> list[Any]:
    """The blocks that were released."""
    names = [name for name, _ in pipeline.released()]
    assert len(set(names)) == len(names) and all(name.startswith("release-") for name in names)
    return [kv_transfer_params["remote_block_ids"] for _, kv_transfer_params in pipeline.released()]


def pixels(request: StageRequest) -> list[bool]:
    return ["pixel_values" in item.data for item in request.prompt.items]


def blocks(request: StageRequest) -> Any:
    return request.params.extra_args["kv_transfer_params"]["remote_block_ids"]


WHOLE = RequestOutputKind.FINAL_ONLY
streamed_or_whole = pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, WHOLE], ids=["streamed", "whole"])

PREFILL_GONE = StageUnavailable(Stage.PREFILL, "is gone")
DECODE_GONE = StageUnavailable(Stage.DECODE, "is gone")
PREFILL_LOST = HandoffLost(Stage.PREFILL, "lost the embeddings")
DECODE_LOST = HandoffLost(Stage.DECODE, "lost the blocks")


STRUCTURE = {"structured_outputs": StructuredOutputsParams(regex="a+")}


SAYS = "h\u00e9llo \U0001f389 \u4e16\u754c"
"""Characters of two, three and four tokens too."""


class BreaksOff:
    """A decode that says ``SAYS``, a token per step, and breaks off after each ``said`` of them."""

    def __init__(self, said: int = 1, times: int = 1) -> None:
        self.said, self.times = said, times
        self.calls: list[StageRequest] = []

    def speak_as(self, client: EPDClient) -> EPDClient:
        self.tokens = client.renderer.get_tokenizer().encode(SAYS)
        return client

    async def __call__(self, request: StageRequest) -> AsyncIterator[Step]:
        self.calls.append(request)
        prompt = self.calls[0].prompt.token_ids
        before = len(request.prompt.token_ids) - len(prompt)
        assert request.prompt.token_ids == prompt + self.tokens[:before]
        for count, token in enumerate(self.tokens[before:], 1):
            more: dict[str, Any] = {}
            if count == 1:
                more["prefill_stats"] = PrefillStats(num_cached_tokens=before)
            if request.params.num_logprobs is not None:
                more["new_logprobs"] = logprobs_of(token)
            yield Step([token], "length" if before + count == len(self.tokens) else None, more=more)
            if count == self.said and len(self.calls) <= self.times:
                raise DECODE_GONE


def logprobs_of(*tokens: int) -> LogprobsLists:
    """Of tokens that were sampled, and each time of one that was likely too."""
    pairs = [[token, token + 1] for token in tokens]
    logprobs = [[-0.5, -1.0 - token] for token in tokens]
    return LogprobsLists(np.array(pairs), np.array(logprobs), np.ones(len(tokens), dtype=int))


class Said(NamedTuple):
    """All outputs of one choice together."""

    text: str
    token_ids: list[int]
    logprobs: list[Any]
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


def together(outputs: list[RequestOutput]) -> Said:
    choices = [output.outputs[0] for output in outputs]
    token_ids = [token for choice in choices for token in choice.token_ids]
    logprobs = [position for choice in choices for position in choice.logprobs or ()]
    last = choices[-1]
    return Said(
        "".join(texts(outputs)), token_ids, logprobs, last.cumulative_logprob, last.finish_reason, last.stop_reason
    )


def spoken(make: Make, decode: BreaksOff, **more: Any) -> Said:
    """What a client hears of it."""

    async def main() -> Said:
        client = decode.speak_as(make(FakePipeline(steps=decode).stages))
        outputs = await run(client, **{"max_tokens": 99} | more)
        await background(client)
        return together(outputs)

    return asyncio.run(main())
