"""A made-up Internet on the loopback: names resolve to addresses of ours, and every dialled address is one small server."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import BaseModel

from serve_app.config import EPDConfig, MediaLimits, Timeouts
from serve_app.media.fetch import Fetcher

PUBLIC = "93.184.215.14"
NAMES: dict[str, list[str]] = {
    "example.org": [PUBLIC],
    "cdn.example.org": [PUBLIC],
    "other.test": ["8.8.8.8"],
    "xn--bcher-kva.example": [PUBLIC],
    "private.test": ["10.0.0.1"],
    "rebound.test": ["127.0.0.1"],
    "mixed.test": [PUBLIC, "192.168.1.1"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "v6.test": ["fd00::1"],
}

Handler = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), "Connection": "close"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return response(b"elsewhere", status, Location=to)


def media_config(**keys: Any) -> EPDConfig:
    """A config by keys of ``media:``, ``advanced.media:`` and ``timeouts:``, whose names differ."""

    def of(part: type[BaseModel]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key in part.model_fields}

    limits, timeouts = of(MediaLimits), of(Timeouts)
    media = {key: value for key, value in keys.items() if key not in limits | timeouts}
    return EPDConfig(media=media, advanced={"media": limits}, timeouts=timeouts)


class Names(AbstractResolver):
    """Names as ``NAMES`` has them. Raises ``error`` instead, where one is given."""

    def __init__(self, names: dict[str, list[str]], error: Exception | None = None) -> None:
        self.names = names
        self.error = error

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        if self.error is not None:
            raise self.error
        name = host.rstrip(".").lower()
        if name not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.names[name]
        ]

    async def close(self) -> None:
        pass


class Web:
    """``handlers``: path → the raw response, or a function that writes one. Anything else answers 404.

    ``requests`` are the heads that arrived, ``dialled`` the addresses that the client meant.
    """

    def __init__(self, handlers: dict[str, Handler], error: Exception | None = None) -> None:
        self.handlers = handlers
        self.names = Names(dict(NAMES), error)
        self.requests: list[str] = []
        self.dialled: list[str] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._server.close()

    def fetcher(self, config: EPDConfig | None = None) -> Fetcher:
        config = config or EPDConfig()
        limits, timeout_s = config.advanced.media, config.timeouts.media_fetch_s
        return Fetcher(config.media, limits, timeout_s, resolver=self.names, make_socket=self._socket)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not reader.at_eof():
                start = await reader.readexactly(1)
                if start == b"\x16":  # a TLS handshake, which this server does not speak
                    return
                head = (start + await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                handler = self.handlers.get(head.split()[1], response(b"nothing here", "404 Not Found"))
                if not isinstance(handler, bytes):
                    return await handler(writer)
                writer.write(handler)
                await writer.drain()
                if b"Connection: keep-alive" not in handler:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _socket(self, info: AddrInfoType) -> socket.socket:
        web = self

        class Wired(socket.socket):
            def connect(self, address: Any) -> None:
                web.dialled.append(address[0])
                super().connect(("127.0.0.1", web.port))

        return Wired(info[0], info[1], info[2])
