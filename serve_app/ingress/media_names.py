"""Media that its client has given a name: vLLM's ``uuid`` beside an item of a chat.

::

    {"type": "image_url", "image_url": {"url": "https://…"}, "uuid": "cat-7"}    loaded, and remembered under its name
    {"type": "image_url", "image_url": None,                 "uuid": "cat-7"}    the same item; a URL is not fetched again

A name stands for the bytes of an item, at the door and nowhere behind it: to encoders, caches and engines an item is known
by its content, so a name can put nothing in another's place. (vLLM takes it for the hash of the item.) Names are a tenant's
own: the key of one is a hash with what tells the tenant apart, the request's ``cache_salt`` and the API key it came with.
Another ingress replica may remember what this one does not, and is asked.
"""

import hashlib
from collections import OrderedDict
from contextvars import ContextVar
from typing import NamedTuple

from serve_app.handoff.errors import BadRequest
from serve_app.ingress.peers import Peers
from serve_app.ingress.request import current

WHAT = "media"
"""By which ingress replicas ask each other for it."""

ENTRY_BYTES = 1024
"""What an item takes besides its own bytes, generously: or many small ones would take more than the bound."""

salt: ContextVar[str] = ContextVar("epd_cache_salt", default="")
"""``cache_salt`` of the request whose prompt is rendered."""


class Named(str):
    """The URL of an item that has a name; empty where the client sends the name alone. True even then: there is an item."""

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
    """What was behind a URL."""

    data: bytes
    jpegs: bool = False
    """A video as the text of a ``data:video/jpeg`` URL: JPEGs in base64, with commas in between."""


class MediaNames:
    """What one ingress replica remembers, up to ``max_bytes``; least recently used goes first. Used in its event loop only.

    An item lives on for the requests that use it when it is forgotten.
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
        """Of a name without bytes. Raises ``BadRequest`` where no replica knows it, or does any more."""
        content = self.get(key) or await self._peers.find(WHAT, key)
        if content is None:
            raise BadRequest(
                f"No media is remembered under the uuid {url.uuid[:80]!r}, or not any more: send it with its URL or data."
            )
        found: Content = content
        return found

    def remember(self, url: Named, key: str, content: Content) -> None:
        """Raises ``BadRequest`` where the name is another item's: one of the two answers would be about the wrong one."""
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
    """Of an item of the request in context. From a key nobody can tell the name, or find the key of another tenant's."""
    request = current.get()
    tenant = repr((salt.get(), request.credentials if request is not None else ""))
    secret = hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=32).digest()
    named = repr((modality, url.uuid)).encode(errors="surrogatepass")
    return hashlib.blake2b(named, key=secret, digest_size=32).hexdigest()
