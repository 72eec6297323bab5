"""The reference's way from stage to stage: an HTTP proxy in front of OpenAI servers, one per stage.

It does what vLLM's ``disagg_epd_proxy.py`` does for ``/v1/chat/completions``: every media item is its own chat request to
an encoder server, all at once; the whole request then goes to a prefill server for one token, and with the
``kv_transfer_params`` of its answer to a decode server, whose answer is passed on as it comes. A stream is begun before any
stage has worked, so whatever fails breaks it off. Left out, to the baseline's advantage: log lines, the middleware that
writes them, and the access log.

Without encoder and prefill servers it hands requests to the decode servers in turn: so many engines, each by itself.
"""

import argparse
import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serve_app.handoff.types import REMOTE_DECODE

MEDIA = {"image_url", "audio_url", "input_audio"}
CHAT = "/v1/chat/completions"


def media_items(body: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message.get("content") for message in body.get("messages", [])]
    return [part for content in contents if isinstance(content, list) for part in content if part.get("type") in MEDIA]


def encoder_request(body: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "user", "content": [item]}
    return {"model": body.get("model"), "messages": [message], "max_tokens": 1, "stream": False}


def prefill_request(body: dict[str, Any]) -> dict[str, Any]:
    request = {key: value for key, value in body.items() if key != "stream_options"}
    request |= {"kv_transfer_params": REMOTE_DECODE, "stream": False, "max_tokens": 1}
    if "max_completion_tokens" in request:
        request["max_completion_tokens"] = 1
    return request


class Proxy:
    def __init__(self, encode: list[str], prefill: list[str], decode: list[str]) -> None:
        self.encode = encode
        self.servers = encode + prefill + decode
        self._prefill = itertools.cycle(prefill) if prefill else None
        self._decode = itertools.cycle(decode)
        self.session: aiohttp.ClientSession  # made where the loop runs

    async def ask(self, server: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        async with self.session.post(server + CHAT, json=body, headers={"x-request-id": request_id}) as answer:
            if answer.status != 200:
                raise HTTPException(answer.status, await answer.text())
            found: dict[str, Any] = await answer.json()
            return found

    async def before_decode(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        """Encode and prefill; the request for decode."""
        if self.encode:
            items = zip(media_items(body), itertools.cycle(self.encode), strict=False)
            calls = (
                self.ask(server, encoder_request(body, item), f"{request_id}:{index}:{uuid.uuid4().hex[:6]}")
                for index, (item, server) in enumerate(items)
            )
            await asyncio.gather(*calls)
        if self._prefill is None:
            return body
        answer = await self.ask(next(self._prefill), prefill_request(body), request_id)
        params = answer.get("kv_transfer_params")
        return body | {"kv_transfer_params": params} if params else body

    async def stream(self, body: dict[str, Any], request_id: str) -> AsyncIterator[bytes]:
        body = await self.before_decode(body, request_id)
        url, headers = next(self._decode) + CHAT, {"x-request-id": request_id}
        async with self.session.post(url, json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_chunked(1024):
                yield chunk

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        request_id = request.headers.get("x-request-id", str(uuid.uuid4()))
        if body.get("stream", False):
            return StreamingResponse(self.stream(body, request_id), media_type="text/event-stream")
        body = await self.before_decode(body, request_id)
        return JSONResponse(await self.ask(next(self._decode), body, request_id))

    async def health(self) -> Response:
        async def healthy(server: str) -> bool:
            try:
                async with self.session.get(server + "/health") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        states = await asyncio.gather(*map(healthy, self.servers))
        return JSONResponse(dict(zip(self.servers, states, strict=True)), 200 if all(states) else 503)

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(100_000)
            ) as self.session:
                yield

        app = FastAPI(lifespan=lifespan)
        app.add_api_route(CHAT, self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage in ("encode", "prefill", "decode"):
        parser.add_argument(f"--{stage}", nargs="*", default=[], help=f"addresses of {stage} servers")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = Proxy(options.encode, options.prefill, options.decode).app()
    uvicorn.run(app, host="127.0.0.1", port=options.port, loop="uvloop", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
