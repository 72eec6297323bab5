"""What one ingress replica stores of `/v1/responses`, each of them finds, and it has a bound."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config import EPDConfig
from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import StageRequest
from serve_app.ingress import responses
from serve_app.ingress.peers import Peers
from serve_app.ingress.responses import Responses
from serve_app.ingress.server import make_app, server_args
from serve_app.launch.engine_args import ingress_args
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage
from tests.fakes import A, B, FakePeers, FakePipeline, Step, fake_status

GONE = StageUnavailable(Stage.DECODE, "is gone")
LAST = Step([*B, 1], "stop")
"""With the token that ends an answer, which is none of its text."""


async def ab(request: StageRequest) -> AsyncIterator[Step]:
    yield Step(A)
    yield LAST


class Replica(httpx.AsyncClient):
    """An ingress replica, by HTTP, and its memory."""

    def __init__(self, app: Any) -> None:
        super().__init__(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://ingress")
        self.memory: Responses = app.app.state.openai_serving_responses

    async def respond(self, status: int = 200, **body: Any) -> Any:
        answer = await self.post("/v1/responses", json={"input": "Hi"} | body)
        assert answer.status_code == status, answer.text
        return events(answer) if body.get("stream") and status == 200 else answer.json()

    async def state(self, response_id: str) -> str:
        answer = await self.get(f"/v1/responses/{response_id}")
        return str(answer.json()["status"]) if answer.status_code == 200 else str(answer.status_code)

    async def ended(self, response_id: str) -> str:
        """The state of a response once it has ended."""
        async with asyncio.timeout(5):
            while (state := await self.state(response_id)) in responses.UNFINISHED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return state


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def store(size_bytes: int | None) -> dict[str, Any]:
    return {"answers": {"response_store_bytes": size_bytes}}


Check = Callable[..., Awaitable[None]]


@pytest.fixture
def with_replicas(make_parts: Any, demo_folder: Path) -> Callable[..., None]:
    """Run a check with two ingress replicas in front of one pipeline."""

    def run(check: Check, pipeline: FakePipeline | None = None, peers: list[Peers] | None = None, **more: Any) -> None:
        stages = (pipeline or FakePipeline(steps=ab)).stages
        config = resolve(EPDConfig(**{"advanced": store(1 << 20)} | more), Cluster(0, 2)).config

        async def main() -> None:
            apps = [
                await make_app(
                    config,
                    server_args(config, ingress_args(config, str(demo_folder))),
                    make_parts(stages, **more),
                    fake_status(stages),
                    each,
                )
                for each in (FakePeers(2) if peers is None else peers)
            ]
            async with Replica(apps[0]) as one, Replica(apps[1]) as other:
                await check(one, other)

        asyncio.run(main())

    return run


class Paused:
    """A pipeline whose decode stops after its first token until it may go on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.goes_on, self.began, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.error = error
        self.pipeline = FakePipeline(steps=self.steps)

    async def steps(self, request: StageRequest) -> AsyncIterator[Step]:
        try:
            yield Step(A)
            self.began.set()
            await self.goes_on.wait()
            if self.error is not None:
                raise self.error
            yield LAST
        finally:
            self.closed.set()


@pytest.mark.parametrize("stream", [False, True])
def test_response_is_found_by_every_replica(with_replicas: Any, stream: bool) -> None:
    async def check(one: Replica, other: Replica) -> None:
        made = await one.respond(stream=stream)
        response = made[-1]["response"] if stream else made
        for replica in (one, other):
            found = await replica.get(f"/v1/responses/{response['id']}")
            assert (found.status_code, found.json()) == (200, response)

    with_replicas(check)


def test_conversation_goes_on_at_every_replica(with_replicas: Any) -> None:
    pipeline = FakePipeline(steps=ab)

    async def check(one: Replica, other: Replica) -> None:
        first = await one.respond(input="The first question")
        at_home = await one.respond(input="And then?", previous_response_id=first["id"])
        abroad = await other.respond(input="And then?", previous_response_id=first["id"])
        third = await one.respond(input="And now?", previous_response_id=abroad["id"])
        assert at_home["usage"]["input_tokens"] == abroad["usage"]["input_tokens"] < third["usage"]["input_tokens"]
        prompts = [request.prompt.token_ids for request in pipeline.prefiller.requests("prefill")]
        assert prompts[1] == prompts[2] != prompts[0]

    with_replicas(check, pipeline)


def test_response_made_in_the_background_is_followed_at_every_replica(with_replicas: Any) -> None:
    paused = Paused()

    async def check(one: Replica, other: Replica) -> None:
        queued = await one.respond(background=True)
        assert [await each.state(queued["id"]) for each in (one, other)] == ["queued"] * 2
        refused = await other.respond(400, input="And then?", previous_response_id=queued["id"])
        assert "still queued" in refused["error"]["message"]
        paused.goes_on.set()
        assert [await each.ended(queued["id"]) for each in (one, other)] == ["completed"] * 2
        await other.respond(input="And then?", previous_response_id=queued["id"])

    with_replicas(check, paused.pipeline)


def test_stream_of_a_background_response_comes_as_it_is_made_at_every_replica(
    with_replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "EVENT_S", 0.05)  # so that it is asked more than once
    paused = Paused()

    async def check(one: Replica, other: Replica) -> None:
        making = asyncio.create_task(one.respond(background=True, stream=True, request_id="resp_1"))
        await asyncio.wait_for(paused.began.wait(), 5)
        streams: list[Any] = [await each.memory.retrieve_responses("resp_1", None, True) for each in (one, other)]
        for stream in streams:
            while (event := await asyncio.wait_for(anext(stream), 5)).type != "response.output_text.delta":
                pass
            assert event.delta == "a"
        rest = [asyncio.create_task(drained(stream)) for stream in streams]
        await asyncio.sleep(0.2)  # longer than one question waits: both still stream
        assert not any(task.done() for task in rest)
        paused.goes_on.set()
        made = await making
        assert [each["sequence_number"] for each in made] == list(range(len(made)))
        assert made[-1]["type"] == "response.completed"
        for seen in await asyncio.gather(*rest):
            assert seen[0].delta == "b" and seen[-1].type == "response.completed"
        for each in (one, other):
            answer = await each.get("/v1/responses/resp_1", params={"stream": "true", "starting_after": 3})
            assert events(answer) == made[4:]

    with_replicas(check, paused.pipeline)


async def drained(stream: Any) -> list[Any]:
    return [event async for event in stream]


@pytest.mark.parametrize("stream", [False, True])
def test_response_is_cancelled_by_every_replica_where_it_is_made(with_replicas: Any, stream: bool) -> None:
    paused = Paused()

    async def check(one: Replica, other: Replica) -> None:
        making = asyncio.create_task(one.respond(background=True, stream=stream, request_id="resp_1"))
        await asyncio.wait_for(paused.began.wait(), 5)
        cancelled = await other.post("/v1/responses/resp_1/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        await asyncio.wait_for(paused.closed.wait(), 5)
        await asyncio.wait_for(making, 5)
        assert [await each.state("resp_1") for each in (one, other)] == ["cancelled"] * 2

    with_replicas(check, paused.pipeline)


def test_response_that_is_not_made_in_the_background_cannot_be_cancelled_or_streamed_anywhere(
    with_replicas: Any,
) -> None:
    async def check(one: Replica, other: Replica) -> None:
        response = await one.respond()
        for each in (one, other):
            assert (await each.post(f"/v1/responses/{response['id']}/cancel")).status_code == 400
            streamed = await each.get(f"/v1/responses/{response['id']}", params={"stream": "true"})
            assert streamed.status_code == 400 and "`background` and `stream`" in streamed.json()["error"]["message"]

    with_replicas(check)


@pytest.mark.parametrize("stream", [False, True])
def test_response_that_fails_in_the_background_says_so(with_replicas: Any, stream: bool) -> None:
    paused = Paused(ValueError("Broken"))

    async def check(one: Replica, other: Replica) -> None:
        making = asyncio.create_task(one.respond(background=True, stream=stream, request_id="resp_1"))
        await asyncio.wait_for(paused.began.wait(), 5)
        paused.goes_on.set()
        made = await asyncio.wait_for(making, 5)
        assert [await each.ended("resp_1") for each in (one, other)] == ["failed"] * 2
        if stream:
            assert made[-1]["type"] == "error" and "Broken" in made[-1]["message"]
            again = events(await other.get("/v1/responses/resp_1", params={"stream": "true"}))
            assert again == made

    with_replicas(check, paused.pipeline)


def test_stream_in_the_background_that_fails_before_its_first_token_has_the_failures_status(with_replicas: Any) -> None:
    async def check(one: Replica, other: Replica) -> None:
        refused = await one.respond(503, background=True, stream=True, request_id="resp_1")
        assert refused["error"]["message"] == "The decode stage is gone"
        assert await other.ended("resp_1") == "failed"

    with_replicas(check, FakePipeline(fails={"decode": [GONE] * 9}))


def test_stream_from_a_replica_that_goes_ends_with_an_error(with_replicas: Any) -> None:
    paused, peers = Paused(), FakePeers(2)

    async def check(one: Replica, other: Replica) -> None:
        making = asyncio.create_task(one.respond(background=True, stream=True, request_id="resp_1"))
        await asyncio.wait_for(paused.began.wait(), 5)
        stream: Any = await other.memory.retrieve_responses("resp_1", None, True)
        assert (await anext(stream)).type == "response.created"
        peers.pop(0)
        last = (await asyncio.wait_for(drained(stream), 5))[-1]
        assert last.type == "error" and "is gone" in last.message
        paused.goes_on.set()
        await making

    with_replicas(check, paused.pipeline, peers)


def test_least_recently_used_responses_make_room(with_replicas: Any) -> None:
    async def check(one: Replica, other: Replica) -> None:
        large: dict[str, Any] = {"user": "x" * 20_000}
        first, second = [(await one.respond(**large))["id"] for _ in range(2)]
        assert await other.state(first) == "completed"  # used by another replica
        third = (await one.respond(**large))["id"]
        for each in (one, other):
            assert [await each.state(id) for id in (first, second, third)] == ["completed", "404", "completed"]
        gone = (await other.get(f"/v1/responses/{second}")).json()["error"]
        assert gone["type"] == "invalid_request_error" and "makes room for others" in gone["message"]
        for path in (f"/v1/responses/{second}/cancel", "/v1/responses"):
            again = await other.post(path, json={"input": "Hi", "previous_response_id": second})
            assert (again.status_code, again.json()["error"]["message"]) == (404, gone["message"])
        serving = one.memory._serving
        assert serving.response_store.keys() == serving.msg_store.keys() == {first, third}

    with_replicas(check, advanced=store(50_000))


def test_response_in_the_making_does_not_make_room(with_replicas: Any) -> None:
    paused = Paused()

    async def check(one: Replica, other: Replica) -> None:
        making = (await one.respond(background=True))["id"]
        assert [await each.state(making) for each in (one, other)] == ["queued"] * 2
        paused.goes_on.set()
        assert [await each.ended(making) for each in (one, other)] == ["404"] * 2

    with_replicas(check, paused.pipeline, advanced=store(1))


def test_messages_of_a_stream_that_its_client_leaves_make_room_too(with_replicas: Any) -> None:
    paused = Paused()

    async def check(one: Replica, other: Replica) -> None:
        leaving = asyncio.create_task(one.respond(stream=True, input="x" * 3000, request_id="resp_1"))
        await asyncio.wait_for(paused.began.wait(), 5)
        assert "resp_1" in one.memory._serving.msg_store
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        paused.goes_on.set()
        last = (await one.respond())["id"]
        assert one.memory._serving.msg_store.keys() == {last}

    with_replicas(check, paused.pipeline, advanced=store(4000))


def test_nothing_is_stored_unless_it_is_turned_on(with_replicas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(one: Replica, other: Replica) -> None:
        response = await one.respond()
        for each in (one, other):
            gone = await each.get(f"/v1/responses/{response['id']}")
            assert (
                gone.status_code == 404 and "`advanced.answers.response_store_bytes`" in gone.json()["error"]["message"]
            )
            assert (await each.respond(404, previous_response_id=response["id"]))["error"]["param"] == "response_id"
        assert "VLLM_ENABLE_RESPONSES_API_STORE" in (await one.respond(400, background=True))["error"]["message"]

    monkeypatch.delenv("VLLM_ENABLE_RESPONSES_API_STORE", raising=False)
    with_replicas(check, advanced=store(None))
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with_replicas(check, advanced=store(0))


def test_vllms_own_switch_turns_it_on(with_replicas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(one: Replica, other: Replica) -> None:
        assert await other.state((await one.respond())["id"]) == "completed"

    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with_replicas(check, advanced=store(None))
