"""A file of requests is answered once each, however often it is cut."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from serve_app.cli import batch
from serve_app.cli.client import Unusable

URL = "/v1/chat/completions"
Handler = Callable[[web.Request], Awaitable[web.Response]]


def line(custom_id: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "demo"} | body})


def answered(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines), "each once"
    return {each["custom_id"]: each for each in lines}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., bool]:
    """Answer a file of requests by a server with this handler; returns whether all was well."""

    def run(lines: list[str], handler: Handler, at_a_time: int = 2) -> bool:
        (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")

        async def main() -> str:
            app = web.Application()
            app.router.add_post(URL, handler)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0]
            try:
                return await asyncio.to_thread(
                    batch.batch,
                    f"http://{host}:{port}",
                    tmp_path / "in.jsonl",
                    tmp_path / "out.jsonl",
                    at_a_time,
                    QUIET,
                )
            finally:
                await runner.cleanup()

        return bool(asyncio.run(main()))

    return run


QUIET = Console(file=io.StringIO())


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"said": await request.json()}, headers={"x-request-id": "r"})


def test_each_request_is_answered_after_everybody_elses(run: Callable[..., bool], tmp_path: Path) -> None:
    assert run([line("a"), "", line("b", priority=7)], echo)
    found = answered(tmp_path / "out.jsonl")
    assert found["a"]["response"] == {
        "status_code": 200,
        "request_id": "r",
        "body": {"said": {"model": "demo", "priority": batch.PRIORITY}},
    }
    assert found["a"]["error"] is None
    assert found["b"]["response"]["body"]["said"]["priority"] == 7, "the client's own"


def test_no_more_are_asked_at_a_time_than_it_says(run: Callable[..., bool]) -> None:
    under_way, most = 0, 0

    async def count(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return await echo(request)

    assert run([line(str(number)) for number in range(12)], count, at_a_time=3)
    assert most == 3


def test_server_without_room_is_asked_until_it_has_some(run: Callable[..., bool], tmp_path: Path) -> None:
    statuses = [429, 503, 429, 503, 503, 503, 503, 503]

    async def busy(request: web.Request) -> web.Response:
        return web.Response(status=statuses.pop()) if statuses else await echo(request)

    assert run([line("a")], busy)
    assert answered(tmp_path / "out.jsonl")["a"]["response"]["status_code"] == 200


def test_refusal_is_its_requests_answer_and_the_others_have_theirs(run: Callable[..., bool], tmp_path: Path) -> None:
    async def picky(request: web.Request) -> web.Response:
        bad = "bad" in await request.json()
        return web.json_response({"error": {"message": "no"}}, status=400) if bad else await echo(request)

    assert not run([line("a", bad=1), line("b")], picky)
    found = answered(tmp_path / "out.jsonl")
    assert found["a"]["error"] == {"message": "no"} and found["a"]["response"]["status_code"] == 400
    assert found["a"]["response"]["body"] is None and found["b"]["error"] is None


def test_batch_that_was_cut_goes_on_where_it_ended(run: Callable[..., bool], tmp_path: Path) -> None:
    asked = []

    async def note(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return await echo(request)

    done = json.dumps(batch.answer_of("a", 200, "r", {}))
    (tmp_path / "out.jsonl").write_text(f"{done}\n{done[:20]}")
    assert run([line("a"), line("b")], note)
    assert len(asked) == 1 and set(answered(tmp_path / "out.jsonl")) == {"a", "b"}


def test_server_that_is_gone_ends_the_batch_and_keeps_what_it_had(run: Callable[..., bool], tmp_path: Path) -> None:
    first = True

    async def once(request: web.Request) -> web.Response:
        nonlocal first
        if first:
            first = False
            return await echo(request)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    with pytest.raises(Unusable, match="Run the same again"):
        run([line("a"), line("b")], once, at_a_time=1)
    assert set(answered(tmp_path / "out.jsonl")) == {"a"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["nonsense"], "line 1: not a request"),
        ([line("a"), line("a")], "`custom_id` a comes more than once"),
        ([line("a", stream=True)], "not streamed"),
        (['{"custom_id": "a", "method": "GET", "url": "/v1", "body": {}}'], "`method` must be POST"),
    ],
)
def test_file_that_is_no_batch_is_refused_before_anything_is_asked(
    run: Callable[..., bool], tmp_path: Path, lines: list[str], words: str
) -> None:
    async def never(request: web.Request) -> web.Response:
        raise AssertionError("asked")

    with pytest.raises(Unusable, match=words):
        run(lines, never)
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_are_another_file_are_left_alone(run: Callable[..., bool], tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(Unusable, match="no file of answers"):
        run([line("a")], echo)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
