"""The page at ``/``, which asks the model and shows the steps of the request and the stages: plain files."""

from functools import partial
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

HEADERS = {
    # The page loads nothing from other servers.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    for path, (name, media_type) in FILES.items():
        get = partial(_get, (FOLDER / name).read_bytes(), media_type)
        app.add_route(path, get, ["GET"], include_in_schema=False)


async def _get(content: bytes, media_type: str, request: Request) -> Response:
    return Response(content, media_type=media_type, headers=HEADERS)
