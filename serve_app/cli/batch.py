"""``python -m serve_app batch requests.jsonl answers.jsonl``: a file of requests in OpenAI's batch format, as
`vllm run-batch` takes it, answered by a server that others use at the same time.

Each answer is written when it comes, so a batch that was cut goes on where it ended when it is run again. Its requests have
a ``priority`` after that of all others; engines heed it with ``scheduling_policy: priority``.
"""

import asyncio
import json
import random
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serve_app.cli.client import Unusable, api_key, base_url

PRIORITY = 100
"""Of vLLM's priorities, of which 0 is everybody's and a higher one is served later."""
BUSY = (429, 503)
"""Statuses of a server that has no room now: the request is sent again, for as long as it takes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TRIES = 5
"""For connections that break: the server may be gone."""


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ``custom_id`` and all of each request. Raises ``Unusable`` for a line that is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = json.loads(line)
                custom_id, body = request["custom_id"], request["body"]
            except (ValueError, TypeError, KeyError):
                body = None
            if not isinstance(body, dict):
                raise Unusable(f"{path}, line {number}: not a request with `custom_id`, `url` and `body`.")
            if request.get("method", "POST") != "POST" or not str(request.get("url", "")).startswith("/"):
                raise Unusable(
                    f"{path}, line {number}: `method` must be POST, and `url` a path such as /v1/chat/completions."
                )
            if body.get("stream"):
                raise Unusable(f"{path}, line {number}: answers of a batch are not streamed.")
            yield str(custom_id), request


def unanswered(requests: Path, answers: Path) -> list[tuple[str, dict[str, Any]]]:
    """The requests that have no answer yet. Raises ``Unusable``, also for a ``custom_id`` that comes twice."""
    found = list(lines_of(requests))
    twice = [custom_id for custom_id, times in Counter(custom_id for custom_id, _ in found).items() if times > 1]
    if twice:
        raise Unusable(f"{requests}: the `custom_id` {min(twice)} comes more than once.")
    done = answered(answers) if answers.exists() else set()
    return [(custom_id, request) for custom_id, request in found if custom_id not in done]


def answered(answers: Path) -> set[str]:
    """The ``custom_id`` of each answer of an earlier run. A last line that was cut is taken out of the file."""
    text = answers.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        found = {json.loads(line)["custom_id"] for line in whole.splitlines()}
    except (ValueError, TypeError, KeyError):
        raise Unusable(f"{answers} is no file of answers: name another.") from None
    if whole != text:
        answers.write_text(whole, encoding="utf-8")
    return found


def answer_of(custom_id: str, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """A line of OpenAI's output."""
    failed = status != 200
    told = body.get("error", body) if failed and isinstance(body, dict) else body
    response = {"status_code": status, "request_id": request_id, "body": None if failed else body}
    return {
        "id": f"vllm-{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": told if failed else None,
    }


async def ask(session: aiohttp.ClientSession, custom_id: str, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, once the server has room for it. Raises ``Unusable`` if the server is gone."""
    body, wait_s, broken = {"priority": PRIORITY} | request["body"], FIRST_WAIT_S, 0
    while True:
        try:
            async with session.post(request["url"], json=body) as response:
                if response.status not in BUSY:
                    content = await response.text()
                    try:
                        said = json.loads(content)
                    except ValueError:
                        said = {"message": content}
                    return answer_of(custom_id, response.status, response.headers.get("x-request-id", ""), said)
                wait_s = max(wait_s, float(response.headers.get("retry-after", 0)))
        except (aiohttp.ClientError, TimeoutError) as error:
            broken += 1
            if broken == TRIES:
                raise Unusable(f"The server is gone ({error}). Run the same again to go on.") from error
        await asyncio.sleep(min(wait_s, LONGEST_WAIT_S) * random.uniform(0.5, 1.0))
        wait_s *= 2


async def answer_all(url: str, todo: list[tuple[str, dict[str, Any]]], at_a_time: int, out: TextIO, step: Any) -> int:
    """Ask ``at_a_time`` and write each answer to ``out`` when it comes. Returns how many were refused."""
    failed, left = 0, iter(todo)
    headers = {"authorization": f"Bearer {key}"} if (key := api_key()) else {}
    endless = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, headers=headers, timeout=endless) as session:

        async def work() -> None:
            nonlocal failed
            for custom_id, request in left:
                answer = await ask(session, custom_id, request)
                failed += answer["error"] is not None
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()
                step()

        workers = [asyncio.create_task(work()) for _ in range(at_a_time)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
    return failed


def batch(url: str, requests: Path, answers: Path, at_a_time: int, console: Console) -> bool:
    """Answer what has no answer yet. Returns whether all was answered with 200. Raises ``Unusable``."""
    try:
        todo = unanswered(requests, answers)
        out = answers.open("a", encoding="utf-8")
    except OSError as error:
        raise Unusable(f"{error.filename}: {error.strerror}.") from None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with out, Progress(*columns, console=console) as progress:
        task = progress.add_task(answers.name, total=len(todo))
        failed = asyncio.run(answer_all(url, todo, at_a_time, out, lambda: progress.advance(task)))
    console.print(f"{len(todo)} answered, {failed} of them refused: {answers}")
    return not failed


def run(arguments: Any) -> int:
    """Returns the exit code: 1 if something was refused or the batch did not end, with one sentence on stderr."""
    try:
        return int(
            not batch(base_url(arguments), arguments.requests, arguments.answers, arguments.at_a_time, Console())
        )
    except Unusable as error:
        print(error, file=sys.stderr)
        return 1
