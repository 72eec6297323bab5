"""Bounds what an ingress replica has under way: requests, items, bytes of media and embeddings.

Only the number of requests bounds text, so it keeps flowing when media are at their limit.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from serve_app.config import AdmissionConfig
from serve_app.handoff.errors import BadRequest, Overloaded
from serve_app.handoff.types import Item, Media


class Admission:
    """Counts what is outstanding at one ingress replica, and calls ``changed`` after each change.

    ``embed_bytes``: size of one embedding.
    """

    def __init__(
        self, config: AdmissionConfig, embed_bytes: int, changed: Callable[["Admission"], None] = lambda _: None
    ) -> None:
        self._config = config
        self._embed_bytes = embed_bytes
        self._changed = changed
        self.requests = self.items = self.media_bytes = self.embed_bytes = 0
        self._arriving = threading.Lock()
        self.arrived_items = self.arrived_bytes = 0

    def load(self) -> dict[str, float]:
        """The load of the ingress, whose unit is a request."""
        return {"calls": float(self.requests), "outstanding": float(self.requests)}

    def check_request(self) -> None:
        """Raise ``Overloaded`` where one more request does not fit in. Called before rendering."""
        self._check("requests", self.requests, 1, self._config.max_requests)

    @contextmanager
    def admit(self, items: tuple[Item, ...]) -> Iterator[None]:
        """Count one request. Raises ``Overloaded`` where it does not fit in."""
        self.check_request()
        self.requests += 1
        try:
            media_bytes = sum(item.size_bytes for item in items)
            embed_bytes = self._embed_bytes * sum(item.num_embeds for item in items)
            with self._hold(len(items), media_bytes, embed_bytes):
                yield
        finally:
            self.requests -= 1
            self._changed(self)

    def admit_media(self, media: Collection[Media]) -> AbstractContextManager[None]:
        """Count items that are encoded before their request is rendered. Raises ``Overloaded``."""
        return self._hold(len(media), sum(len(each.data) for each in media), 0)

    def arrives(self, intake: "Intake", items: int = 0, size_bytes: int = 0) -> None:
        """Count what is about to be in memory for a request, apart from whole items. From any thread.

        Raises ``Overloaded``, and ``BadRequest`` where the request alone has more than fits.
        """
        with self._arriving:
            if intake.closed:  # this thread has outlived its request
                return
            own_items, own_bytes = intake.items + items, intake.size_bytes + size_bytes
            if own_items > 1:
                self._check_alone("media items", own_items, self._config.max_items)
                self._check_alone("bytes of media", own_bytes, self._config.max_media_bytes)
            if items:
                self._check("media items", self.arrived_items - intake.items, own_items, self._config.max_items)
            else:
                others = self.arrived_bytes - intake.size_bytes
                self._check("bytes of media", others, own_bytes, self._config.max_media_bytes)
            intake.items, intake.size_bytes = own_items, own_bytes
            self.arrived_items += items
            self.arrived_bytes += size_bytes

    def leaves(self, intake: "Intake") -> None:
        with self._arriving:
            self.arrived_items -= intake.items
            self.arrived_bytes -= intake.size_bytes
            intake.items, intake.size_bytes, intake.closed = 0, 0, True

    @contextmanager
    def _hold(self, items: int, media_bytes: int, embed_bytes: int) -> Iterator[None]:
        if items:
            self._check("media items", self.items, items, self._config.max_items)
            self._check("bytes of media", self.media_bytes, media_bytes, self._config.max_media_bytes)
            self._check("bytes of embeddings", self.embed_bytes, embed_bytes, self._config.max_embed_bytes)
        self.items += items
        self.media_bytes += media_bytes
        self.embed_bytes += embed_bytes
        self._changed(self)
        try:
            yield
        finally:
            self.items -= items
            self.media_bytes -= media_bytes
            self.embed_bytes -= embed_bytes
            self._changed(self)

    @staticmethod
    def _check_alone(what: str, own: int, limit: int) -> None:
        if own > limit:
            raise BadRequest(f"The request has {own} {what} or more, and this server takes {limit} at a time.")

    @staticmethod
    def _check(what: str, outstanding: int, more: int, limit: int) -> None:
        # A single request above the limit passes on an idle server: it could never be served otherwise.
        if outstanding and outstanding + more > limit:
            raise Overloaded(
                f"This server has {outstanding} {what} under way and takes {limit}: try again in a moment."
            )


@dataclass
class Intake:
    """The media that one request has in memory, until it ends."""

    admission: Admission
    items: int = 0
    size_bytes: int = 0
    closed: bool = False

    def begin(self) -> None:
        """Count one more item."""
        self.admission.arrives(self, items=1)

    def add(self, size_bytes: int) -> None:
        self.admission.arrives(self, size_bytes=size_bytes)

    def close(self) -> None:
        self.admission.leaves(self)
