"""The first request of an ingress replica is its own: what is done once is done before a client waits for it.

Imports, tokenizer, processors, connections to the replicas, NIXL's handshake of the prefill and the decode replica that it
meets. Others are met later, one by one.
"""

import asyncio
import logging

import httpx
from PIL import Image
from starlette.types import ASGIApp
from vllm.multimodal.utils import encode_image_url

logger = logging.getLogger("ray.serve")

TIMEOUT_S = 60.0
REQUEST_ID = "warm-up"


async def warm_up(app: ASGIApp, model: str, api_key: str | None, with_image: bool, tokens: int = 1) -> None:
    """Ask the app for two tokens about at least ``tokens``. Whatever comes of it, a failure too, the replica serves: it is
    told in the log."""
    content: list[dict[str, object]] = [{"type": "text", "text": " ".join(["Hello"] * max(tokens, 1))}]
    if with_image:
        picture = encode_image_url(Image.new("RGB", (224, 224), "grey"))
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": True}
    headers = {"x-request-id": REQUEST_ID} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        transport = httpx.ASGITransport(app=app)
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(transport=transport, base_url="http://ingress") as client,
        ):
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        if answer.status_code != 200:
            logger.warning(f"The request to warm up was answered {answer.status_code}: {answer.text[:300]}")
    except Exception as error:  # Starlette raises what it has answered
        logger.warning(f"The request to warm up failed: {type(error).__name__}: {error}")
