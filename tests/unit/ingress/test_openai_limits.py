"""Body limit, log line, scopes that pass, and arguments that are refused."""

import asyncio
import json
import logging
from argparse import Namespace
from typing import Any

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.ingress.middleware import PipelineMiddleware
from serve_app.ingress.request import current
from serve_app.launch.vllm_args import SERVER_ARGS, check_api_args, check_engine_args, check_speculation
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.tracing import Tracing
from tests.unit.asgi import JSON, LIMIT, Client, app_of, body, start, the_request


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        pass
    await send(start(JSON))
    await send(body(b"read", more=False))


def fastapi_app() -> FastAPI:
    """A route that reads its body, with vLLM's exception handlers."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post("/")
    async def read(value: dict[str, Any] = Body()) -> str:  # noqa: B008
        return "read"

    return app


def refused(client: Client) -> None:
    assert client.status == 413
    assert json.loads(client.body)["error"]["code"] == 413
    assert f"{LIMIT} bytes" in json.loads(client.body)["error"]["message"]


@pytest.mark.parametrize(("length", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_announced_body_beyond_the_limit_is_refused_unread(length: int, status: int) -> None:
    client = Client(b"x", headers=[(b"content-length", b"%d" % length)])
    asyncio.run(client.ask(read_all))
    assert client.status == status
    if status == 413:
        refused(client)
        assert len(client._messages) == 1


@pytest.mark.parametrize(("chunks", "status"), [([50, 50], 200), ([50, 50, 1], 413)])
def test_streamed_body_is_counted(chunks: list[int], status: int) -> None:
    client = asyncio.run(Client(*(b"x" * size for size in chunks)).ask(read_all))
    assert client.status == status
    if status == 413:
        refused(client)


def test_streamed_body_beyond_the_limit_is_refused_in_front_of_fastapi_too() -> None:
    chunks = (b'{"a": "', b"x" * LIMIT, b'"}')
    refused(asyncio.run(Client(*chunks, headers=[JSON], query_string=b"").ask(fastapi_app())))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ray.serve"]


@pytest.mark.parametrize(("rendered", "logged"), [(None, 0), (1.0, 1)])
def test_request_that_reached_a_stage_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, rendered: float | None, logged: int
) -> None:
    async def steps(send: Send) -> None:
        the_request().trace.rendered = rendered
        await send(start(JSON, 418))
        await send(body(b"", more=False))

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(Client(headers=[(b"x-request-id", b"mine")]).ask(app_of(steps)))
    assert len(lines(caplog)) == logged
    assert all("request=mine status=418" in line for line in lines(caplog))


@pytest.mark.parametrize(("error", "status"), [(asyncio.CancelledError(), "cancelled"), (KeyError("x"), "failed")])
def test_client_that_leaves_or_an_app_that_fails_is_logged_and_passed_on(
    caplog: pytest.LogCaptureFixture, error: BaseException, status: str
) -> None:
    async def steps(send: Send) -> None:
        the_request().trace.rendered = 1.0
        raise error

    async def main() -> None:
        with pytest.raises(type(error)):
            await Client().ask(app_of(steps))
        assert current.get() is None

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(main())
    assert len(lines(caplog)) == 1
    assert f"status={status} " in lines(caplog)[0]


@pytest.mark.parametrize(
    "scope",
    [{"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET", "headers": []}],
    ids=["lifespan", "websocket", "GET"],
)
def test_other_scopes_pass_untouched(scope: dict[str, Any]) -> None:
    client = Client()
    client.scope = scope
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive, send])

    asyncio.run(client.ask(app))
    assert seen == [scope, client.receive, client.send]


@pytest.mark.parametrize("key", sorted(SERVER_ARGS))
def test_argument_of_the_http_server_is_refused_naming_its_place_here(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`api.{key}` is Ray Serve's here: set `http_options:`"):
        check_api_args({key: 1})


def test_unknown_api_argument_is_refused_and_known_ones_are_not() -> None:
    with pytest.raises(ConfigError, match=r"`api\.chat_tempalte` is not an argument"):
        check_api_args({"chat_tempalte": "x"})
    check_api_args({"chat_template": "x", "api_key": "k", "tool_call_parser": "hermes"})


def test_adapters_that_no_stage_would_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`api\.lora_modules` needs"):
        check_api_args({"lora_modules": []})
    check_api_args({"lora_modules": []}, takes_adapters=True)
    with pytest.raises(ConfigError, match="the tower's merged in"):
        check_engine_args({"enable_lora": True, "enable_tower_connector_lora": True}, "engine_args")


def test_draft_model_is_decodes_only_with_prefills_blocks_of_it() -> None:
    draft, guess = {"method": "eagle", "model": "x"}, {"method": "ngram", "num_speculative_tokens": 2}
    for where in (
        {"engine_args": {"speculative_config": draft}},
        {"decode": {"engine_args": {"speculative_config": guess}}},
        {"decode": {"engine_args": {"speculative_config": draft}}, "prefill": None},
    ):
        check_speculation(EPDConfig.model_validate(where))
    with pytest.raises(ConfigError, match="which prefill makes"):
        check_speculation(EPDConfig.model_validate({"decode": {"engine_args": {"speculative_config": draft}}}))


def test_middleware_serves_a_real_fastapi_app() -> None:
    answer = TestClient(PipelineMiddleware(fastapi_app(), LIMIT, IngressMetrics(), Tracing())).post("/", json={"a": 1})
    assert (answer.status_code, answer.json()) == (200, "read")
