"""Who is inside ends, and nobody else comes in."""

import asyncio
import json

import pytest
from starlette.types import Receive, Scope, Send

from serve_app.ingress.door import CLOSED, FULL, Door
from tests.unit.asgi import JSON, Client, body, start


class App:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        await send(start(JSON))
        await self.goes_on.wait()
        await send(body(b"{}", more=False))


async def ask(door: Door, path: str = "/v1/chat/completions", kind: str = "http") -> Client:
    client = Client(path=path, type=kind)
    await door(client.scope, client.receive, client.send)
    return client


def test_request_under_way_ends_behind_a_closed_door_and_is_counted_until_then() -> None:
    async def main() -> None:
        app = App()
        door = Door(app)
        asking = asyncio.create_task(ask(door))
        await app.begun.wait()
        assert door.close() == 1
        app.goes_on.set()
        client = await asking
        assert (client.status, client.body) == (200, b"{}")
        assert door.close() == 0

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/health"])
def test_closed_door_answers_503_in_the_shape_of_the_route(path: str) -> None:
    door = Door(App())
    door.close()
    client = asyncio.run(ask(door, path))
    assert (client.status, client.headers["retry-after"]) == (503, "1")
    answer = json.loads(client.body)
    assert answer["error"]["message"] == CLOSED
    assert (answer.get("type") == "error") == (path == "/v1/messages")


def test_no_more_come_in_than_it_holds() -> None:
    async def main() -> None:
        app = App()
        door = Door(app, limit=2)
        inside = [asyncio.create_task(ask(door)) for _ in range(2)]
        await app.begun.wait()
        assert door.inside == 2
        refused = await ask(door)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert json.loads(refused.body)["error"]["message"] == FULL
        app.goes_on.set()
        assert [client.status for client in await asyncio.gather(*inside)] == [200, 200]
        assert (await ask(door)).status == 200

    asyncio.run(main())


def test_request_whose_client_leaves_is_no_longer_under_way() -> None:
    async def main() -> None:
        app = App()
        door = Door(app)
        asking = asyncio.create_task(ask(door))
        await app.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert door.close() == 0

    asyncio.run(main())


def test_life_of_the_app_is_no_request() -> None:
    async def main() -> None:
        app = App()
        door = Door(app)
        living = asyncio.create_task(ask(door, kind="lifespan"))
        await app.begun.wait()
        assert door.close() == 0
        app.goes_on.set()
        await living

    asyncio.run(main())
