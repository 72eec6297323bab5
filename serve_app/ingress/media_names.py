"""Remembers media by the names that clients give: vLLM's ``uuid`` beside an item of a chat.

::

    {"type": "image_url", "image_url": {"url": "https://…"}, "uuid": "cat-7"}    loaded, and remembered under its name
    {"type": "image_url", "image_url": None,                 "uuid": "cat-7"}    the same item; a URL is not fetched again

A name stands for the bytes of an item at the ingress alone. Encoders, caches and engines know an item by its content, so a
name cannot replace another's item, as it could in vLLM, where it is the item's hash. Tenants have names of their own: the
key of a name is a hash that covers the request's ``cache_salt`` and API key. Where this ingress replica does not know a
name, it asks the others.
"""

import hashlib
from collections import OrderedDict
from contextvars import ContextVar
from typing import NamedTuple

from serve_app.handoff.errors import BadRequest
from serve_app.ingress.peers import Peers
from serve_app.ingress.request import current

WHAT = "media"
"""The subject under which ingress replicas ask each other."""

ENTRY_BYTES = 1024
"""Bytes that an item takes besides its own, rounded up: they bound the number of small items."""

salt: ContextVar[str] = ContextVar("epd_cache_salt", default="")
"""``cache_salt`` of the request whose prompt is rendered."""


class Named(str):
    """The URL of an item that has a name; empty, but true, where the client sends the name alone."""

    uuid: str

    def __new__(cls, url: str, uuid: str) -> "Named":
        named = super().__new__(cls, url)
        named.uuid = uuid
        return named

    def __bool__(self) -> bool:
        return True

    @property
    def inline(self) -> bool:
        """Whether the bytes are in the URL itself."""
        return self[:5].lower() == "data:"


class Content(NamedTuple):
    """The bytes behind a URL."""

    data: bytes
    jpegs: bool = False
    """Whether they are the text of a ``data:video/jpeg`` URL: JPEGs in base64, with commas in between."""


class MediaNames:
    """The media that one ingress replica remembers, up to ``max_bytes``; least recently used goes first.

    Used in its event loop only.
    """

    def __init__(self, max_bytes: int, peers: Peers | None = None) -> None:
        self._max_bytes = max_bytes
        self._peers = peers or Peers()
        self._peers.offer(WHAT, self._tell)
        self._kept: OrderedDict[str, Content] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: str) -> Content | None:
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
        return content

    async def find(self, url: Named, key: str) -> Content:
        """The content of a name that came without bytes. Raises ``BadRequest`` where no replica remembers it."""
        content: Content | None = self.get(key) or await self._peers.find(WHAT, key)
        if content is None:
            raise BadRequest(
                f"No media is remembered under the uuid {url.uuid[:80]!r}, or not any more: send it with its URL or data."
            )
        return content

    def remember(self, url: Named, key: str, content: Content) -> None:
        """Keep an item under its name. Raises ``BadRequest`` where the name is another item's."""
        if (known := self.get(key)) is not None:
            if known != content:
                raise BadRequest(
                    f"The uuid {url.uuid[:80]!r} is the name of other media: give this one another uuid, or none."
                )
            return
        if len(content.data) + ENTRY_BYTES > self._max_bytes:
            return
        self._kept[key] = content
        self.size_bytes += len(content.data) + ENTRY_BYTES
        while self.size_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= len(oldest.data) + ENTRY_BYTES

    async def _tell(self, key: str) -> Content | None:
        return self.get(key)


def key_of(url: Named, modality: str | None) -> str:
    """Key of an item of the current request: it does not tell the name, and other tenants cannot compute it."""
    request = current.get()
    tenant = repr((salt.get(), request.credentials if request is not None else ""))
    secret = hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=32).digest()
    named = repr((modality, url.uuid)).encode(errors="surrogatepass")
    return hashlib.blake2b(named, key=secret, digest_size=32).hexdigest()
