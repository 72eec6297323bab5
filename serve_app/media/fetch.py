"""Gets the bytes behind a client's URL: over HTTP with a guard, from the allowed folder, or out of the URL itself.

Every error is the client's: ``VLLMValidationError`` (400) for what may not be read, ``VLLMUnprocessableEntityError`` (422)
for what could not be fetched. No message tells a path, an address or a redirect of the server's side, and a name with a
private address gets the same answer as a name that does not exist.
"""

import asyncio
import binascii
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
import pybase64
from aiohttp.abc import AbstractResolver, ResolveResult
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.version import __version__ as vllm_version
from yarl import URL

from serve_app.config import MediaConfig, MediaLimits
from serve_app.media.address import may_dial

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_CONNECTIONS = 64
CHUNK_BYTES = 64 * 1024

Room = Callable[[int], None]
"""Called with a number of bytes before they are in memory; raises where there is no room for them."""


def unlimited(size_bytes: int) -> None: ...


class ForbiddenAddress(Exception):
    """An address that may not be dialled for a client."""


def short(url: str) -> str:
    """A URL for messages."""
    return url if len(url) <= 80 else url[:77] + "…"


def too_large(what: str, limits: MediaLimits) -> VLLMValidationError:
    return VLLMValidationError(
        f"{what} is larger than the {limits.max_bytes} bytes that this server takes per item: send a smaller one."
    )


# ---- http:, https:


class _GuardedResolver(AbstractResolver):
    """Refuses a name if any of its addresses is forbidden: aiohttp chooses which one it dials."""

    def __init__(self, inner: AbstractResolver, allow_private: bool) -> None:
        self._inner = inner
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        try:
            found = await self._inner.resolve(host, port, family)
        except UnicodeError as error:  # an empty label, or one that is too long
            raise socket.gaierror(socket.EAI_NONAME, "no host name") from error
        if not all(may_dial(result["host"], self._allow_private) for result in found):
            raise ForbiddenAddress(host)
        return found

    async def close(self) -> None:
        await self._inner.close()


class Fetcher:
    """Fetches over HTTP, with one pool of connections.

    The guard checks the very address that a socket is made for, so nothing can change between check and dial, and numbers
    in any notation, names and redirects all pass it. A proxy would dial for us, unguarded, so there is none. Clients share
    the pool, but no cookies and no ``netrc``. Tests replace the system's ``resolver`` and ``make_socket``.
    """

    def __init__(
        self,
        rules: MediaConfig,
        limits: MediaLimits,
        timeout_s: float,
        *,
        resolver: AbstractResolver | None = None,
        make_socket: aiohttp.SocketFactoryType = lambda info: socket.socket(*info[:3]),
    ) -> None:
        self._rules = rules
        self._limits = limits
        self._timeout_s = timeout_s
        self._resolver = resolver
        self._make_socket = make_socket
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str, room: Room = unlimited) -> bytes:
        """The body behind an ``http:`` or ``https:`` URL, within the rules and the limits."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url, room)
        except VLLMError:
            raise
        except TimeoutError as error:
            raise VLLMUnprocessableEntityError(f"Could not fetch {short(url)}: it took too long.") from error
        except (ForbiddenAddress, aiohttp.ClientConnectorDNSError) as error:
            if isinstance(error, aiohttp.ClientConnectorDNSError) and error.errno == socket.EAI_AGAIN:
                raise VLLMUnprocessableEntityError(
                    f"Could not fetch {short(url)}: names cannot be looked up at the moment, try again."
                ) from error
            raise VLLMValidationError(
                f"{short(url)} is not fetched: its host, or one that it redirects to, has no address that is open to this "
                "server. Use a public URL, or send the media as a data: URL."
            ) from error
        except ValueError as error:  # yarl's, and aiohttp.InvalidURL
            raise VLLMValidationError(f"{short(url)} is no valid URL, or redirects to one that is not.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise VLLMUnprocessableEntityError(
                f"Could not fetch {short(url)}: the connection failed ({type(error).__name__})."
            ) from error

    def check_url(self, url: str) -> None:
        """Raise where a URL may not be fetched, whatever the address of its host."""
        try:
            self._check(URL(url), url)
        except ValueError as error:
            raise VLLMValidationError(f"{short(url)} is no valid URL.") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _follow(self, url: str, room: Room) -> bytes:
        target = URL(url)
        for _ in range(self._limits.max_redirects + 1):
            self._check(target, url)
            async with self._pool().get(target, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or location is None:
                    return await self._body(response, url, room)
                target = target.join(URL(location))
        raise VLLMUnprocessableEntityError(
            f"Could not fetch {short(url)}: it redirects more than {self._limits.max_redirects} times."
        )

    def _check(self, target: URL, url: str) -> None:
        if target.scheme not in ("http", "https"):
            raise VLLMValidationError(f"{short(url)} redirects to something that is not http: or https:.")
        if not target.raw_host:
            raise VLLMValidationError(f"{short(url)} names no host.")
        if target.raw_user is not None or target.raw_password is not None:
            raise VLLMValidationError(
                "URLs with a user name or password are not fetched: use a signed URL, or send the media as a data: URL."
            )
        host = target.raw_host.lower().removesuffix(".")
        allowed = self._rules.allowed_domains
        if allowed and not any(host == d or (d[0] == "." and f".{host}".endswith(d)) for d in allowed):
            raise VLLMValidationError(
                f"{short(url)} is not, or redirects to what is not, on a host in `media.allowed_domains`, the only ones "
                "that this server fetches from."
            )

    def _pool(self) -> aiohttp.ClientSession:
        """The pool, made on first use in the event loop that uses it."""
        if self._session is None:
            resolver = _GuardedResolver(
                self._resolver or aiohttp.ThreadedResolver(), self._rules.allow_private_addresses
            )
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=resolver, socket_factory=self._guarded_socket, limit=MAX_CONNECTIONS
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Media is compressed already. A body that is compressed again is counted after decompression.
                headers={"User-Agent": f"vLLM/{vllm_version}", "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None),  # fetch() has one for all redirects together
            )
        return self._session

    def _guarded_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        address = str(info[4][0])
        if not may_dial(address, self._rules.allow_private_addresses):
            raise ForbiddenAddress(address)
        return self._make_socket(info)

    async def _body(self, response: aiohttp.ClientResponse, url: str, room: Room) -> bytes:
        if not 200 <= response.status < 300:
            raise VLLMUnprocessableEntityError(f"Could not fetch {short(url)}: the server answered {response.status}.")
        if (response.content_length or 0) > self._limits.max_bytes:
            raise too_large(short(url), self._limits)
        body = bytearray()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            room(len(chunk))
            body += chunk
            if len(body) > self._limits.max_bytes:
                raise too_large(short(url), self._limits)
        return bytes(body)


# ---- data:


def split_data_url(url: str) -> tuple[str, str]:
    """Media type and base64 text of a ``data:`` URL (RFC 2397)."""
    head, comma, text = url[len("data:") :].partition(",")
    media_type, *parameters = head.split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise VLLMValidationError("A data: URL must look like data:image/png;base64,… — only base64 is read.")
    return media_type.strip().lower(), text


def decode_base64(text: str, limits: MediaLimits) -> bytes:
    if len(text) > (limits.max_bytes + 2) // 3 * 4:
        raise too_large("The data: URL", limits)
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VLLMValidationError("The data: URL is not valid base64: encode the media again.") from error


# ---- file:


def read_file(url: str, allowed: Path | None, limits: MediaLimits, room: Room = unlimited) -> bytes:
    """A regular file below ``media.allowed_local_path``; ``file:///path`` as in RFC 8089.

    The target of links counts. The path is checked before it is opened, because opening a device can act on it, and the
    open file is checked again, because a link can change in between.
    """
    if allowed is None:
        raise VLLMValidationError(
            "This server reads no local files: send the media as a data: URL (its operator can allow a folder with "
            "`media.allowed_local_path`)."
        )
    outside = VLLMValidationError(f"{short(url)} is not in the folder that this server may read.")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise VLLMValidationError(f"{short(url)} names no file: write file:// and an absolute path.")
        folder = allowed.resolve()
        path = Path(unquote(parts.path)).resolve()
        if folder not in path.parents:
            raise outside
        # O_NONBLOCK: a pipe without a writer would block the opening itself.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            if folder not in Path(f"/proc/self/fd/{descriptor}").resolve().parents:
                raise outside
            room(min(status.st_size, limits.max_bytes + 1))
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise VLLMValidationError(
            f"Cannot read {short(url)}: no such file in the folder that this server may read."
        ) from error
    if len(data) > limits.max_bytes:
        raise too_large(short(url), limits)
    return data
