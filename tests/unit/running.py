"""Run one request through an ``EPDClient`` in front of fake stages, with vLLM's own renderer and validation."""

import asyncio
from collections.abc import Callable
from typing import Any

from PIL import Image
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve_app.ingress.client import EPDClient
from tests.fakes import FakePipeline

Make = Callable[..., EPDClient]


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "output_kind": RequestOutputKind.DELTA} | more)


async def render(client: EPDClient, *colours: str) -> Any:
    """A prompt with an image of each colour, rendered by vLLM."""
    prompt: dict[str, Any] = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>" * len(colours) + " what?"}
    if colours:
        prompt["multi_modal_data"] = {"image": [Image.new("RGB", (56, 56), colour) for colour in colours]}
    (rendered,) = await client.renderer.render_cmpl_async([prompt])  # type: ignore[list-item]
    return rendered


async def run(client: EPDClient, *colours: str, **more: Any) -> list[RequestOutput]:
    prompt = await render(client, *colours)
    return [output async for output in client.generate(prompt, params(**more), "req")]


def generate(make: Make, pipeline: FakePipeline, *colours: str, **more: Any) -> list[RequestOutput]:
    async def main() -> list[RequestOutput]:
        client = make(pipeline.stages)
        try:
            return await run(client, *colours, **more)
        finally:
            await background(client)

    return asyncio.run(main())


async def background(client: EPDClient) -> None:
    await asyncio.gather(*client.pipeline.background, return_exceptions=True)
