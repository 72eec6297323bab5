"""``python -m serve_app ask`` and ``status``: they use a running server."""

import base64
import mimetypes
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import requests
from openai import APIConnectionError, APIError, APIStatusError, OpenAI
from rich.console import Console
from rich.table import Table

from serve_app.stage import Stage

BAR_WIDTH = 40
# Python 3.11 knows these only if the system has a list of types, which containers often lack.
for extension, mime_type in {
    ".webp": "image/webp",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".m4a": "audio/mp4",
    ".mkv": "video/x-matroska",
}.items():
    mimetypes.add_type(mime_type, extension)

LABELS = {"ec_transfer": "EC transfer", "kv_transfer": "KV transfer"}


class Unusable(Exception):
    """The command cannot be done; the message is for the user."""


def content(question: str, files: Iterable[Path]) -> list[dict[str, Any]]:
    """The parts of the user's message: files as data URLs, of the type in their names, then the question."""
    parts: list[dict[str, Any]] = []
    for path in files:
        mime = mimetypes.guess_type(path.name)[0] or ""
        kind = mime.partition("/")[0]
        if kind not in ("image", "audio", "video"):
            raise Unusable(f"{path} is named like no image, audio or video.")
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise Unusable(f"{path} cannot be read: {error.strerror}.") from None
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}})
    return [*parts, {"type": "text", "text": question}]


def ask(url: str, question: str, files: Iterable[Path], max_tokens: int, timing: bool, out: Console) -> None:
    """Print the answer as it comes; with ``timing`` also the steps of the request. Raises ``Unusable``."""
    client: Any = OpenAI(base_url=f"{url}/v1", api_key=api_key() or "none", max_retries=0)
    messages = [{"role": "user", "content": content(question, files)}]
    response = None
    try:
        model = next(iter(client.models.list())).id
        began = time.perf_counter()
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
        )
        first = time.perf_counter()
        for chunk in response.parse():
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()
    except APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise Unusable(f"The server answers {error.status_code}: {body.get('message') or error.message}") from None
    except APIConnectionError:
        broke = "\nThe connection broke in the middle of the answer. Ask again."
        raise Unusable(broke if response else no_server(url)) from None
    except APIError as error:  # an event of the stream
        raise Unusable(f"\nThe answer ends early: {error.message}") from None
    if timing:
        ended = time.perf_counter()
        out.print(waterfall(response.headers, first - began, ended - first))


def waterfall(headers: Mapping[str, str], first_token_s: float, stream_s: float) -> Table:
    """The steps of a request from its header ``server-timing``, and the stream as the client measured it. Several items have
    a row each, from the same start. Without the header there is only the time to the first token."""
    told = re.findall(r'([\w.]+);dur=([\d.]+)(?:;desc="([^"]*)")?', headers.get("server-timing", ""))
    timed = [(name, float(ms) / 1000, replicas) for name, ms, replicas in told]
    items = [each for each in timed if "." in each[0]]  # parts of a step that overlap
    steps = [each for each in timed if "." not in each[0]] or [("first_token", first_token_s, "")]
    steps.append(("tokens_after_the_first", stream_s, ""))
    total = sum(seconds for _, seconds, _ in steps) or 1.0
    table = Table("step", "ms", "", "replica", box=None)
    table.columns[1].justify = "right"
    before = 0.0
    for step in steps:
        own = [item for item in items if item[0].startswith(f"{step[0]}.")]
        start = round(BAR_WIDTH * before / total)
        for name, seconds, replicas in own or [step]:
            width = max(round(BAR_WIDTH * (before + seconds) / total) - start, 1)
            label = re.sub(r"[_.]", " ", name)
            table.add_row(LABELS.get(name, label), f"{seconds * 1000:.2f}", " " * start + "█" * width, replicas)
        before += step[1]
    if rungs := headers.get("x-epd-rungs"):
        table.caption = f"failed and done otherwise: {rungs}"
    return table


def status(url: str, out: Console) -> bool:
    """Print stages, replicas, queues and health as a table. Returns whether all stages are healthy. Raises ``Unusable``."""
    try:
        stages: list[dict[str, Any]] = requests.get(f"{url}/status", timeout=30).json()
        table = status_table(stages)
    except (ValueError, TypeError, KeyError):
        raise Unusable(
            f"{url} is no server of this kind: `/status` does not tell the stages. A `route_prefix:` belongs to the URL."
        ) from None
    out.print(table)
    return all(stage["state"] == "healthy" for stage in stages)


def status_table(stages: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("stage", "health", "replica", "calls", "work", "done per s", "wait s", "KV in use", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for stage in stages:
        colour = "green" if stage["state"] == "healthy" else "red"
        name, shown = stage["stage"], f"[{colour}]{stage['state']}[/]"
        others = {state: count for state, count in stage["replicas"].items() if state != "RUNNING"}
        rows = [load_cells(load, stage) for load in stage["loads"]] or [["none"]]
        rows += [[f"{count} {state.lower()}"] for state, count in others.items()]
        for cells in rows:
            table.add_row(name, shown, *cells)
            name = shown = ""
    return table


def load_cells(load: Mapping[str, Any], stage: Mapping[str, Any]) -> list[str]:
    rate, work = load.get("rate", 0.0), load["outstanding"]
    return [
        load["replica"],
        f"{load['calls']:.0f}",
        f"{work:.0f} {stage['unit']}",
        *([f"{rate:.1f}" if rate else "?", f"{work / rate:.2f}" if rate else "?"] if "rate" in load else ["", ""]),
        f"{load['kv_use']:.0%}" if stage["stage"] in (Stage.PREFILL, Stage.DECODE) else "",
    ]


def api_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY")


def base_url(arguments: Any) -> str:
    """Of ``--url``, which may be what an OpenAI client takes."""
    return str(arguments.url).rstrip("/").removesuffix("/v1")


def no_server(url: str) -> str:
    return f"Nothing answers at {url}. Start a server with `make serve`, or name another with `--url`."


def run(arguments: Any) -> int:
    """Returns the exit code: 1 if the server cannot serve or refuses, with one sentence on stderr."""
    out, url = Console(), base_url(arguments)
    try:
        if arguments.command == "status":
            return int(not status(url, out))
        ask(url, arguments.question, arguments.files, arguments.max_tokens, arguments.timing, out)
        return 0
    except requests.RequestException:
        print(no_server(url), file=sys.stderr)
    except Unusable as error:
        print(error, file=sys.stderr)
    return 1
