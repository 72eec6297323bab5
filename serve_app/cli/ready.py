"""Waits until the application of a Serve config can serve, and says what to try."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

READY = """
────────────────────────────────────────────────────────────────────────────────
EPD is ready after {seconds:.0f} s: {url}/v1   (model: {model}; {stages})

Try, in another terminal:

  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{{"model": "{model}",
    "max_tokens": 24, "messages": [{{"role": "user", "content": [
{picture}      {{"type": "text", "text": "What is in this image?"}}]}}]}}'

  {python} -m serve_app status{at}
  {python} -m serve_app ask{at} --timing "What is in this image?" picture.png

{page}  {url}/docs      all routes
  {url}/health    state per stage
Ctrl-C ends everything.
────────────────────────────────────────────────────────────────────────────────
"""

PICTURE = """\
      {{"type": "image_url", "image_url": {{"url": "file://{path}"}}}},
"""

KEY = ' -H "Authorization: Bearer $VLLM_API_KEY"'

PAGE = "  {url}/          ask, draw pictures, and watch the stages\n"

DEFAULT_URL = "http://127.0.0.1:8000"

ANSWER_S = 5.0
"""With `http: proxy` a request waits while there is no ingress; a failed start is not seen meanwhile."""


def arguments_of(config: Path) -> dict[str, Any]:
    """``args:`` of the application of a Serve config."""
    applications = (yaml.safe_load(config.read_text()) or {}).get("applications") or [{}]
    return applications[0].get("args") or {}


def picture_part(config: Path) -> str:
    """The line of the example that shows a picture; empty where the config lets no local file be read."""
    folder = (arguments_of(config).get("media") or {}).get("allowed_local_path")
    path = Path(folder or "", "shapes.png").absolute()
    return PICTURE.format(path=path) if folder and path.is_file() else ""


def base_url(config: Path) -> str:
    """Where the application of a Serve config listens, as this machine reaches it, with its ``route_prefix``."""
    serve = yaml.safe_load(config.read_text()) or {}
    http = serve.get("http_options") or {}
    prefix = (serve.get("applications") or [{}])[0].get("route_prefix") or ""
    host = http.get("host") or "127.0.0.1"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{http.get('port') or 8000}{prefix.rstrip('/')}"


def at(url: str) -> str:
    """The option by which ``ask`` and ``status`` find a server."""
    return "" if url == DEFAULT_URL else f" --url {url}"


def key_of(config: Path) -> str | None:
    """What the server asks for: of the config, or of the environment that it is started in too."""
    configured = (arguments_of(config).get("api") or {}).get("api_key")
    keys = configured if isinstance(configured, list) else [configured]
    return next((str(key) for key in keys if key), None) or os.environ.get("VLLM_API_KEY")


def this_python() -> str:
    """The interpreter that has the packages, as one types it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def get(url: str, key: str | None = None) -> dict[str, object] | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            body: dict[str, object] = json.load(response)
            return body
    except (OSError, urllib.error.HTTPError, ValueError):
        return None


def says_ready(config: Path, began: float) -> bool:
    """Whether every stage can serve; then what to try is printed."""
    url = base_url(config)
    if (health := get(f"{url}/health")) is None:
        return False
    key = key_of(config)
    models = get(f"{url}/v1/models", key) or {}
    listed = models.get("data")
    model = listed[0]["id"] if isinstance(listed, list) and listed else "?"
    example = READY.format(
        seconds=time.time() - began,
        url=url,
        model=model,
        stages=", ".join(stage for stage in health if stage != "ingress"),
        picture=picture_part(config),
        page=PAGE.format(url=url) if arguments_of(config).get("page", True) else "",
        key=KEY if key else "",
        python=this_python(),
        at=at(url),
    )
    print(example, flush=True)
    return True


def wait_ready(config: Path, began: float) -> int:
    while not says_ready(config, began):
        time.sleep(0.5)
    return 0
