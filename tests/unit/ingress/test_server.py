"""The status line waits for the first token, and the request id; over small hand-made apps."""

import asyncio
import json
import logging
import re
from contextlib import nullcontext
from http import HTTPStatus

import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.ingress.held_reply import ITEMS_TOLD
from tests.unit.asgi import EVENTS, JSON, Client, app_of, body, start, the_request


def test_start_of_a_stream_waits_for_the_first_token() -> None:
    client = Client()

    async def steps(send: Send) -> None:
        await send(start())
        await send(body(b"role;"))
        assert client.sent == []
        the_request().token(1)
        await send(body(b"one;"))
        assert client.body == b"role;one;"
        await send(body(b"two", more=False))

    asyncio.run(client.ask(app_of(steps)))
    assert client.status == 200
    assert client.body == b"role;one;two"
    assert client.headers["x-kept"] == "1"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (GracefulHTTPError("The decode stage is gone", HTTPStatus(503)), 503, "Service Unavailable"),
        (GracefulHTTPError("too slow", HTTPStatus(504)), 504, "Gateway Timeout"),
        (VLLMValidationError("too long"), 400, "BadRequestError"),
        (KeyError("ours"), 500, "InternalServerError"),
    ],
)
def test_failure_before_the_first_token_replaces_the_stream(error: Exception, status: int, kind: str) -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_request().fail(error)
        await send(body(b"data: an error event"))
        await send(body(b"data: [DONE]", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert client.status == status
    answer = json.loads(client.body)["error"]
    assert (answer["code"], answer["type"], answer["message"]) == (status, kind, str(error))
    assert client.headers["content-type"] == "application/json"
    assert int(client.headers["content-length"]) == len(client.body)
    assert client.headers["x-kept"] == "1"
    assert len(client.sent) == 2


def test_failure_after_the_first_token_passes_through() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_request().token(1)
        await send(body(b"one;"))
        the_request().fail(KeyError("late"))
        await send(body(b"error event", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert (client.status, client.body) == (200, b"one;error event")


def test_failure_before_the_stream_starts_replaces_it_too() -> None:
    async def steps(send: Send) -> None:
        the_request().fail(KeyError("early"))
        await send(start())
        await send(body(b"error event", more=False))

    assert asyncio.run(Client().ask(app_of(steps))).status == 500


@pytest.mark.parametrize("sent", [False, True])
def test_stream_that_its_app_gives_up_ends_with_the_failure(sent: bool) -> None:
    async def steps(send: Send) -> None:
        await send(start())
        await send(body(b"begun;"))
        if sent:
            the_request().token(1)
        raise RuntimeError("response already started") from VLLMValidationError("too odd")

    client = asyncio.run(Client().ask(app_of(steps)))
    message = {"message": "too odd", "type": "BadRequestError", "param": None, "code": 400}
    if sent:
        assert client.status == 200
        assert (
            client.body
            == f'begun;event: error\ndata: {{"error":{json.dumps(message, separators=(",", ":"))}}}\n\n'.encode()
        )
    else:
        assert (client.status, json.loads(client.body)) == (400, {"error": message})


def test_app_that_fails_without_a_stream_is_not_answered_for() -> None:
    async def steps(send: Send) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        asyncio.run(Client().ask(app_of(steps)))


def test_stream_that_ends_undecided_is_sent_as_it_is() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        await send(body(b"nothing to say", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert (client.status, client.body) == (200, b"nothing to say")


@pytest.mark.parametrize("failed", [False, True])
def test_answer_that_is_not_a_stream_is_never_held(failed: bool) -> None:
    client = Client()

    async def steps(send: Send) -> None:
        if failed:
            the_request().fail(KeyError("x"))
        await send(start(JSON, 418))
        assert client.status == 418
        await send(body(b"{}", more=False))

    asyncio.run(client.ask(app_of(steps)))
    assert (client.status, client.body) == (418, b"{}")


def test_replaced_stream_of_the_messages_api_is_anthropics_error() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_request().fail(GracefulHTTPError("The decode stage is gone", HTTPStatus(503)))
        await send(body(b"", more=False))

    client = asyncio.run(Client(path="/v1/messages").ask(app_of(steps)))
    answer = json.loads(client.body)
    assert (client.status, answer["type"]) == (503, "error")
    assert answer["error"]["message"] == "The decode stage is gone"
    assert int(client.headers["content-length"]) == len(client.body)


@pytest.mark.parametrize("after", ["its client leaves", "its app fails"])
def test_stream_that_was_replaced_is_over(caplog: pytest.LogCaptureFixture, after: str) -> None:
    client = Client()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        the_request().trace.rendered = 1.0  # its line is logged
        await send(start())
        the_request().fail(GracefulHTTPError("The decode stage is gone", HTTPStatus(503)))
        await send(body(b""))
        if after == "its app fails":
            raise KeyError("ours")
        client._messages[:] = [{"type": "http.disconnect"}]
        await receive()

    fails = pytest.raises(KeyError) if after == "its app fails" else nullcontext()
    with caplog.at_level(logging.INFO, "ray.serve"), fails:
        asyncio.run(client.ask(app))
    assert (client.status, len(client.sent)) == (503, 2)
    assert [" status=503 " in record.getMessage() for record in caplog.records if record.name == "ray.serve"] == [True]


async def echo_id(scope: Scope, receive: Receive, send: Send) -> None:
    seen = Headers(scope=scope)["x-request-id"]
    assert seen == the_request().id
    await send(start(JSON))
    await send(body(seen.encode(), more=False))


@pytest.mark.parametrize(
    ("sent", "kept"), [(b"gw1, gw2", b"gw1__gw2"), (b'a status=200 "', b"a_status_200__"), (b"x" * 900, b"x" * 128)]
)
def test_request_id_is_made_safe_for_the_engines(sent: bytes, kept: bytes) -> None:
    """NIXL renews leases of ids that it joins by commas; decode reads what lies in blocks that were not renewed."""
    assert asyncio.run(Client(headers=[(b"x-request-id", sent)]).ask(echo_id)).body == kept


def test_request_id_of_the_client_is_kept_for_the_engines() -> None:
    client = asyncio.run(Client(headers=[(b"x-request-id", b"mine")]).ask(echo_id))
    assert client.body == b"mine"
    assert "x-request-id" not in client.headers  # Serve's proxy adds it: a client would get it twice


def test_request_without_an_id_gets_one_of_its_own() -> None:
    first, second = (asyncio.run(Client().ask(echo_id)) for _ in range(2))
    assert first.body and second.body
    assert first.body != second.body


@pytest.mark.parametrize(("items", "told"), [(1, []), (2, [("1", "10.00", "e0"), ("2", "20.00", "e1")])])
def test_several_items_are_told_one_by_one_beside_the_steps(items: int, told: list[tuple[str, str, str]]) -> None:
    async def steps(send: Send) -> None:
        for index in range(items):
            the_request().trace.encoded(index, (index + 1) / 100, f"e{index}")
        the_request().trace.took("encode", 0.03)
        await send(start(JSON))
        await send(body(b"{}", more=False))

    timing = asyncio.run(Client().ask(app_of(steps))).headers["server-timing"]
    assert timing.startswith("encode;dur=30.0")
    assert re.findall(r'encode\.(\d);dur=([\d.]+);desc="(\w+)"', timing) == told


def test_header_of_many_items_is_one_that_clients_take() -> None:
    async def steps(send: Send) -> None:
        for index in range(1000):
            the_request().trace.encoded(index, 100.0, "replica0")
        the_request().trace.took("encode", 100.0)
        await send(start(JSON))
        await send(body(b"{}", more=False))

    timing = asyncio.run(Client().ask(app_of(steps))).headers["server-timing"]
    assert timing.count("encode.") == ITEMS_TOLD and len(timing) < 2048


@pytest.mark.parametrize(
    ("kind", "choices", "told"), [(EVENTS, 1, "3/9"), (JSON, 1, "3/9"), (JSON, 2, "3/9"), (EVENTS, 2, None)]
)
def test_cached_tokens_are_told_once_they_are_known(kind: tuple[bytes, bytes], choices: int, told: str | None) -> None:
    async def steps(send: Send) -> None:
        if kind == EVENTS:
            await send(start(kind))
        trace = the_request().trace
        trace.prompt_tokens, trace.cached_tokens, trace.choices = 9, 3, choices
        the_request().token(1)
        if kind == JSON:
            await send(start(kind))
        await send(body(b"one;"))
        await send(body(b"two", more=False))

    assert asyncio.run(Client().ask(app_of(steps))).headers.get("x-epd-cached-tokens") == told


def test_request_without_a_token_has_no_cached_ones() -> None:
    async def steps(send: Send) -> None:
        the_request().trace.prompt_tokens = 9
        await send(start(JSON, 400))
        await send(body(b"{}", more=False))

    assert "x-epd-cached-tokens" not in asyncio.run(Client().ask(app_of(steps))).headers
