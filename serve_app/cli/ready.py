"""Waits until the application of a Serve config can serve, and says what to try."""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

READY = """
────────────────────────────────────────────────────────────────────────────────
EPD is ready after {seconds:.0f} s: {url}/v1   (model: {model}; {stages})

Try, in another terminal:

  curl {url}/v1/{route} -H 'content-type: application/json'{key} -d '{{"model": "{model}",{tokens}
    "messages": [{{"role": "user", "content": [
{picture}      {{"type": "text", "text": "What is in this image?"}}]}}]}}'

  {python} -m serve_app status{at}
{ask}
{page}  {url}/docs      all routes
  {url}/health    state per stage
Ctrl-C ends everything.
────────────────────────────────────────────────────────────────────────────────
"""

ASK = """  {python} -m serve_app ask{at} --timing "What is in this image?" picture.png
"""

DEFAULT_URL = "http://127.0.0.1:8000"

ANSWER_S = 5.0
"""Seconds for a reply. With `http: proxy` a request waits while there is no ingress, and hides a failed start."""


def picture_part(args: dict[str, Any]) -> str:
    """The example's line with a picture; empty if the server may not read the file."""
    folder = (args.get("media") or {}).get("allowed_local_path")
    path = Path(folder or "", "shapes.png").absolute()
    line = f'      {{"type": "image_url", "image_url": {{"url": "file://{path}"}}}},\n'
    return line if folder and path.is_file() else ""


def base_url(http: dict[str, Any], prefix: str) -> str:
    """The URL of an application on this machine, from Serve's ``http_options`` and its ``route_prefix``."""
    host = http.get("host") or "127.0.0.1"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{http.get('port') or 8000}{prefix.rstrip('/')}"


def at(url: str) -> str:
    """The option of ``ask`` and ``status`` for a server at another URL than the default."""
    return "" if url == DEFAULT_URL else f" --url {url}"


def key_of(args: dict[str, Any]) -> str | None:
    """The server's API key, from its config or its environment."""
    configured = (args.get("api") or {}).get("api_key")
    keys = configured if isinstance(configured, list) else [configured]
    return next((str(key) for key in keys if key), None) or os.environ.get("VLLM_API_KEY")


def this_python() -> str:
    """The path of this interpreter, relative to the current folder if it is below."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def get(url: str, key: str | None = None) -> dict[str, Any] | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            body: dict[str, Any] = json.load(response)
            return body
    except (OSError, ValueError):
        return None


def says_ready(config: Path, began: float) -> bool:
    """Print what to try if every stage can serve. Returns whether it can."""
    serve = yaml.safe_load(config.read_text()) or {}
    application = (serve.get("applications") or [{}])[0]
    args = application.get("args") or {}
    url = base_url(serve.get("http_options") or {}, application.get("route_prefix") or "")
    if (health := get(f"{url}/health")) is None:
        return False
    key = key_of(args)
    generates = (args.get("engine_args") or {}).get("runner") != "pooling"
    command = {"python": this_python(), "at": at(url)}
    models = (get(f"{url}/v1/models", key) or {}).get("data")
    example = READY.format(
        seconds=time.time() - began,
        url=url,
        model=models[0]["id"] if models else "?",
        stages=", ".join(stage for stage in health if stage != "ingress"),
        picture=picture_part(args),
        route="chat/completions" if generates else "embeddings",
        tokens=' "max_tokens": 24,' if generates else "",
        ask=ASK.format(**command) if generates else "",
        page=f"  {url}/          ask, draw pictures, and watch the stages\n"
        if generates and args.get("page", True)
        else "",
        key=' -H "Authorization: Bearer $VLLM_API_KEY"' if key else "",
        **command,
    )
    print(example, flush=True)
    return True
