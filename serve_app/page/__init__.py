"""The page at ``/``: ask the model, see the steps of the request, watch the stages. Plain files, served as they are."""

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
    # Its own script and style, pictures that the page made itself, and calls of this server; nothing from outside.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    for path, (name, media_type) in FILES.items():
        app.add_route(path, _File((FOLDER / name).read_bytes(), media_type).get, ["GET"], include_in_schema=False)


class _File:
    def __init__(self, content: bytes, media_type: str) -> None:
        self._content, self._media_type = content, media_type

    async def get(self, request: Request) -> Response:
        return Response(self._content, media_type=self._media_type, headers=HEADERS)
