"""The baseline asks the stages for what the reference's proxy asks them for."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.baselines.proxy import CHAT, REMOTE_DECODE, Proxy, media_items

ITEM = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
TEXT = {"type": "text", "text": "Compare."}


def body(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": list(parts)}], "max_completion_tokens": 16} | more


class Stages:
    """Servers that note what they are asked, and answer as the stages do."""

    def __init__(self, encoder_status: int = 200) -> None:
        self.encoder_status = encoder_status
        self.asked: dict[str, list[dict[str, Any]]] = {"encode": [], "prefill": [], "decode": [], "second": []}

    async def ask(self, request: dict[str, Any], stages: tuple[str, ...] = ("encode", "prefill", "decode")) -> Any:
        servers = {stage: TestServer(self.app(stage)) for stage in self.asked}
        for server in servers.values():
            await server.start_server()
        urls = {stage: str(server.make_url("")).rstrip("/") for stage, server in servers.items()}
        try:
            lists = [[urls[stage]] if stage in stages else [] for stage in ("encode", "prefill", "decode")]
            lists[2] += [urls["second"]] if "second" in stages else []
            app = Proxy(*lists).app()
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy")
            async with app.router.lifespan_context(app), client:
                return [await client.post(CHAT, json=request) for _ in range(2 if "second" in stages else 1)]
        finally:
            for server in servers.values():
                await server.close()

    def app(self, stage: str) -> web.Application:
        async def chat(request: web.Request) -> web.StreamResponse:
            self.asked[stage].append(await request.json())
            if stage == "encode":
                return web.json_response({}, status=self.encoder_status)
            if stage == "prefill":
                return web.json_response({"kv_transfer_params": {"remote_port": 5600}})
            if not self.asked[stage][-1].get("stream"):
                return web.json_response({"choices": []})
            answer = web.StreamResponse()
            await answer.prepare(request)
            async for chunk in chunks():
                await answer.write(chunk)
            return answer

        app = web.Application()
        app.router.add_post(CHAT, chat)
        return app


async def chunks() -> AsyncIterator[bytes]:
    for word in ("a", "b"):
        yield f"data: {json.dumps(word)}\n\n".encode()


def test_media_is_found_in_every_message_and_text_is_not_media() -> None:
    messages = [{"content": "words"}, {"content": [TEXT, ITEM]}, {"content": [SOUND]}]
    assert media_items({"messages": messages}) == [ITEM, SOUND]


def test_each_item_is_encoded_by_itself_then_one_token_is_prefilled_then_decode_streams() -> None:
    stages = Stages()
    request = body(ITEM, SOUND, TEXT, stream=True, stream_options={"include_usage": True})
    (answer,) = asyncio.run(stages.ask(request))

    assert answer.text == 'data: "a"\n\ndata: "b"\n\n'
    assert [each["messages"] for each in stages.asked["encode"]] == [
        [{"role": "user", "content": [item]}] for item in (ITEM, SOUND)
    ]
    assert all(each["max_tokens"] == 1 and each["stream"] is False for each in stages.asked["encode"])
    (prefill,) = stages.asked["prefill"]
    assert prefill["kv_transfer_params"] == REMOTE_DECODE and "stream_options" not in prefill
    assert (prefill["max_tokens"], prefill["max_completion_tokens"], prefill["stream"]) == (1, 1, False)
    assert stages.asked["decode"] == [request | {"kv_transfer_params": {"remote_port": 5600}}]


def test_an_encoder_that_refuses_ends_the_request() -> None:
    stages = Stages(encoder_status=400)
    (answer,) = asyncio.run(stages.ask(body(ITEM)))
    assert answer.status_code == 400
    assert stages.asked["prefill"] == stages.asked["decode"] == []


def test_engines_by_themselves_are_asked_in_turn() -> None:
    stages = Stages()
    answers = asyncio.run(stages.ask(body(ITEM), ("decode", "second")))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [len(stages.asked[name]) for name in ("encode", "decode", "second")] == [0, 1, 1]
